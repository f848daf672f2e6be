"""Which rank the others wait for."""

import statistics
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from mmssl.training.messages import warn

SHARE = 0.2  # of a step that a rank may be slower than the others
WINDOWS = 10  # logged ones in a row that it has to be slower in, before it is named
SECONDS = 120.0  # that these have to last; twice as long the next time, then four times, ...


class Pace(NamedTuple):
    """A rank's seconds in a window of steps, outside of what it does together with the others."""

    host: str
    data: float  # waiting for its loader
    work: float  # from the batch at hand to the first collective: the forward of a step's first batch

    @property
    def own(self) -> float:
        return self.data + self.work


class Slowest:
    """Names a rank that stays slower than the others.

    All ranks take equally long for a step, because they meet in it.  What tells them apart is how long each takes until
    it is there.
    """

    def __init__(self) -> None:
        self._rank = -1
        self._windows = 0
        self._seconds = 0.0
        self._next = 0.0

    def judge(self, paces: list[Pace], steps: int, seconds: float) -> dict[str, float]:
        """``slowest_rank``, and ``imbalance``: by how much it is slower than the median rank, as a part of a step."""
        rank = max(range(len(paces)), key=lambda number: paces[number].own)
        slow, usual = paces[rank], statistics.median_low(pace.own for pace in paces)
        imbalance = (slow.own - usual) / seconds
        if imbalance <= SHARE or rank != self._rank:
            self._rank, self._windows, self._seconds, self._next = rank, 0, 0.0, SECONDS
        if imbalance > SHARE:
            self._windows, self._seconds = self._windows + 1, self._seconds + seconds
        if self._windows >= WINDOWS and self._seconds >= self._next:
            self._next = 2 * self._seconds  # rarer and rarer
            rank_zero_only(warn)(
                f"rank {rank} on {slow.host} is slower than the others, for {self._windows * steps} steps now: it "
                f"takes {slow.own / steps:.3g} s of a step of {seconds / steps:.3g} s until it meets them (waiting for "
                f"data {slow.data / steps:.3g} s, computing {slow.work / steps:.3g} s); {usual / steps:.3g} s is usual"
            )
        return {"slowest_rank": float(rank), "imbalance": imbalance}
