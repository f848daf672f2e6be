"""The budget: how many samples of a run may be bad before it stops."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from mmssl.types import Batch

_AT_LEAST = 1000  # samples that the budget is a part of at first, so that one bad sample does not stop a run
_NAMED = 3


class TooManyBadSamples(ValueError):
    """More samples had to be replaced than the budget allows; names the worst shards and reasons."""


class Budget:
    """Counts the samples that a run has used and those of them that were replaced.

    Batches are counted in the order in which they are trained on, so the number of workers changes nothing.

    Args:
        part: of the samples that may be bad, over all ranks, counted from 1,000 samples on: in training
            since the last start, in evaluation in every pass.
        bad_samples: the file that lists them, for the message.
        alone: check at every batch; otherwise the ranks do it together, when somebody calls :meth:`check`.

    Raises:
        ValueError: for a part outside 0 to 1.
    """

    def __init__(self, part: float, bad_samples: str | None = None, *, alone: bool = True) -> None:
        if not 0 <= part <= 1:
            raise ValueError(f"budget is {part}; give the part of samples that may be bad, from 0 to 1")
        self.part, self.bad_samples, self.alone = part, bad_samples, alone
        self.seen = 0
        self.bad: Counter[tuple[str, str]] = Counter()  # by (shard, reason)

    def begin(self) -> None:
        """Forget what was counted: another pass over the same samples is no new information."""
        self.seen = 0
        self.bad.clear()

    def count(self, batch: Batch) -> None:
        self.seen += batch.size
        self.bad.update(batch.bad)
        if self.alone and batch.bad:
            self.check(lambda mine: [mine])

    def check(self, gather: Callable[[Any], list[Any]]) -> None:
        """Raises TooManyBadSamples, on all ranks alike.  ``gather`` brings every rank's object to every rank."""
        every = gather((self.seen, self.bad.total(), self.bad.most_common(_NAMED)))
        seen, bad = sum(rank[0] for rank in every), sum(rank[1] for rank in every)
        if bad > self.part * max(seen, _AT_LEAST):
            worst: Counter[tuple[str, str]] = Counter()
            for _, _, named in every:
                worst.update(dict(named))
            raise TooManyBadSamples(
                f"{bad} of {seen + bad} samples cannot be used, over the budget of {self.part:.2%} "
                f"(of at least {_AT_LEAST}); {worst_shards(worst, self.bad_samples)}"
            )


def worst_shards(bad: Counter[tuple[str, str]], bad_samples: str | None) -> str:
    """The end of a message: which shards are the worst, and what to do."""
    shards: dict[str, list[str]] = {}
    for (shard, reason), n in bad.most_common():
        shards.setdefault(shard, []).append(f"{n} x {reason}")
    worst = "; ".join(f"{shard}: {', '.join(reasons)}" for shard, reasons in list(shards.items())[:_NAMED])
    where = f"; all are listed in {bad_samples}" if bad_samples else ""
    labels = any(reason == "label_out_of_range" for _, reason in bad)
    asked = "Does num_classes fit these labels? Else repair" if labels else "Repair"
    return f"worst shards: {worst}{where}. {asked} or leave out these shards, or raise data.budget"
