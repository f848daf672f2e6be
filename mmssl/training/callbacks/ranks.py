"""Which rank the others wait for."""

import statistics
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from mmssl.training.messages import warn

SHARE = 0.1  # of a step that a rank may be slower than the others
WINDOWS = 3  # logged ones that it has to be, before it is named


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

    def judge(self, paces: list[Pace], steps: int, seconds: float) -> dict[str, float]:
        """``slowest_rank``, and ``imbalance``: by how much it is slower than the median rank, as a part of a step."""
        rank = max(range(len(paces)), key=lambda number: paces[number].own)
        slow, usual = paces[rank], statistics.median_low(pace.own for pace in paces)
        imbalance = (slow.own - usual) / seconds
        self._windows = (self._windows + 1 if rank == self._rank else 1) if imbalance > SHARE else 0
        self._rank = rank
        if self._windows % WINDOWS == 0 and (self._windows // WINDOWS).bit_count() == 1:  # rarer and rarer
            rank_zero_only(warn)(
                f"rank {rank} on {slow.host} is slower than the others, for {self._windows * steps} steps now: it "
                f"takes {slow.own / steps:.3g} s of a step of {seconds / steps:.3g} s until it meets them (waiting for "
                f"data {slow.data / steps:.3g} s, computing {slow.work / steps:.3g} s); {usual / steps:.3g} s is usual"
            )
        return {"slowest_rank": float(rank), "imbalance": imbalance}
