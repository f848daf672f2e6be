"""The stream: order -> read -> prepare -> Batch, in the loader's workers.

Every global batch is a pure function of its number.  Of W workers, worker w builds the batches w, w + W, ... whole and
the DataLoader hands them out in turn, so the number of workers changes nothing.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mmssl.data.order import Mixture, Order, check_world
from mmssl.data.shards import ShardSet
from mmssl.data.tar import ShardError
from mmssl.draws import Draws, mix
from mmssl.types import BadSample, Batch, Prepare

_TRIES = 16


class TooManyBadSamples(ValueError):
    """More samples had to be replaced than the budget allows; names the worst shards and reasons."""


StreamError = ShardError | TooManyBadSamples


@dataclass
class Source:
    """Shards with a name and a weight in the mixture."""

    name: str
    shards: ShardSet
    weight: float = 1.0


class _Samples:
    """Reads and prepares single samples; replaces, counts, reports the bad ones.

    The budget is the part of this worker's samples that may be bad; up to 1,000 samples the same number is
    allowed as for 1,000, so that one bad sample at the start does not stop a run.
    """

    def __init__(self, sources: list[Source], prepare: Prepare, budget: float, bad_samples: str | None) -> None:
        if not 0 <= budget <= 1:
            raise ValueError(f"budget is {budget}; give the part of samples that may be bad, from 0 to 1")
        self.sources, self.prepare, self.budget, self.bad_samples = sources, prepare, budget, bad_samples
        self.seen = 0
        self.bad: Counter[tuple[str, str]] = Counter()  # by (shard, reason)
        self._listed: set[tuple[str, str, int]] = set()  # every validation meets the same bad samples again

    def get(self, source: int, index: int, key: tuple[int, ...], epoch: int, batch: int) -> tuple[Any, str, list[str]]:
        """A prepared example, its name, and the reasons for which others were passed over.

        ``key`` and the sample's index key the draws.  A substitute is a sample of the same source, chosen by hash.
        """
        shards = self.sources[source].shards
        reasons: list[str] = []
        chosen = index
        self.seen += 1
        while len(reasons) < _TRIES:
            sample = shards.read(chosen)
            name = f"{os.path.basename(sample.shard)}/{sample.key}"
            try:
                return self.prepare.sample(sample, Draws(*key, chosen), batch), name, reasons
            except BadSample as error:
                reasons.append(error.reason)
                self._report(sample.shard, sample.key, error, epoch)
            except Exception as error:
                error.add_note(f"while preparing sample {sample.key} of shard {sample.shard}")
                raise
            chosen = mix(*key, index, len(reasons)) % len(shards)
        raise TooManyBadSamples(f"{_TRIES} samples in a row cannot be used; {self._worst()}")

    def _report(self, shard: str, key: str, error: BadSample, epoch: int) -> None:
        self.bad[shard, error.reason] += 1
        if self.bad_samples is not None and (shard, key, epoch) not in self._listed:
            if len(self._listed) > 100_000:
                self._listed.clear()
            self._listed.add((shard, key, epoch))
            entry = {"shard": shard, "key": key, "reason": error.reason, "detail": error.detail, "epoch": epoch}
            # One write to a file opened for appending: lines of several workers and ranks do not mix.
            fd = os.open(self.bad_samples, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, (json.dumps(entry) + "\n").encode())
            finally:
                os.close(fd)
        total = self.bad.total()
        if total > self.budget * max(self.seen, 1000):
            raise TooManyBadSamples(
                f"{total} of {self.seen} samples cannot be used, over the budget of {self.budget:.2%}; {self._worst()}"
            )

    def _worst(self) -> str:
        worst = "; ".join(f"{shard}: {n} x {reason}" for (shard, reason), n in self.bad.most_common(3))
        where = f"; all are listed in {self.bad_samples}" if self.bad_samples else ""
        return f"worst shards: {worst}{where}. Repair or leave out these shards, or raise data.budget"


def _mine() -> tuple[int, int]:
    """(this worker, number of workers); (0, 1) in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _until_error(batch: Callable[[int], Batch], numbers: Iterable[int]) -> Iterator[Batch | StreamError]:
    """The batches of these numbers; an error that a person must mend comes last, as an item."""
    for number in numbers:
        try:
            made = batch(number)
        except (ShardError, TooManyBadSamples) as error:
            yield error
            return
        yield made


class TrainStream(IterableDataset[Batch | StreamError]):
    """Batches for training, without end; for ``DataLoader(stream, batch_size=None)``.

    An error that a person must mend is *yielded*, so that it reaches the main process as one clear line; the loader of
    :class:`mmssl.DataModule` raises it.

    Args:
        sources: one, or several that are mixed by weight; every batch comes from one source.
        prepare: the objective's half.
        seed: of the order, the mixture of samples, and every draw.
        batch_size: global, over all ranks.
        lanes: see :mod:`mmssl.data.order`.
        rank, world: whose part of each batch this is.
        start_batch: number of the first batch.
        budget: the part of samples that may be bad.
        bad_samples: file to which every bad sample is appended as a line of JSON.

    Raises:
        ValueError: if the lanes cannot be dealt to the ranks, or for a weight or budget that makes no sense.
    """

    def __init__(
        self,
        sources: list[Source],
        prepare: Prepare,
        *,
        seed: int,
        batch_size: int,
        lanes: int,
        rank: int = 0,
        world: int = 1,
        start_batch: int = 0,
        budget: float = 0.01,
        bad_samples: str | None = None,
    ) -> None:
        check_world(lanes, world, batch_size)
        self.seed, self.batch_size, self.rank, self.world, self.start_batch = seed, batch_size, rank, world, start_batch
        self.mixture = Mixture([source.weight for source in sources])
        self.orders = [
            Order(len(source.shards), lanes=lanes, seed=seed, source=number) for number, source in enumerate(sources)
        ]
        self.samples = _Samples(sources, prepare, budget, bad_samples)

    def batch(self, number: int) -> Batch:
        """This rank's part of a global batch.  Raises ShardError or TooManyBadSamples."""
        source, before = self.mixture.at(number)
        epochs, indices = self.orders[source].batch(before, self.batch_size, self.rank, self.world)
        examples, names, notes = [], [], Counter[str]()
        for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
            example, name, reasons = self.samples.get(source, index, (self.seed, epoch, source), epoch, number)
            examples.append(example)
            names.append(name)
            notes.update(f"bad/{reason}" for reason in reasons)
        batch = self.samples.prepare.collate(examples)
        batch.index, batch.keys, batch.notes = number, names, dict(notes)
        return batch

    def __iter__(self) -> Iterator[Batch | StreamError]:
        worker, workers = _mine()
        return _until_error(self.batch, itertools.count(self.start_batch + worker, workers))


class EvalSet(IterableDataset[Batch | StreamError]):
    """Batches for evaluation: finite, in order, the same in every epoch, equally many on every rank.

    What is missing to whole batches is filled with samples from the beginning, for which ``valid`` is False; so it
    is for the substitute of a bad sample.  Draws are keyed by (seed, sample).  The global batch that ``prepare``
    is told is always 0 and means nothing: an objective's evaluation half rests at the end of its schedules.

    Args:
        shards: the samples.
        prepare: the objective's half.
        seed: of the draws.
        batch_size: global, over all ranks; the ranks must divide it.
        limit: use this many samples, spread evenly over the shards.
        rank, world, budget, bad_samples: as in :class:`TrainStream`.
    """

    def __init__(
        self,
        shards: ShardSet,
        prepare: Prepare,
        *,
        seed: int,
        batch_size: int,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        budget: float = 0.01,
        bad_samples: str | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"val_batch_size is {batch_size}; it counts over all {world} ranks, which must divide it")
        if limit is not None and limit < 1:
            raise ValueError(f"val_samples is {limit}; give at least 1, or null for all")
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.total = len(shards)
        self.count = min(limit or self.total, self.total)
        self.samples = _Samples([Source("val", shards)], prepare, budget, bad_samples)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def batch(self, number: int) -> Batch:
        """This rank's part of global batch ``number``."""
        part = self.batch_size // self.world
        first = number * self.batch_size + self.rank * part
        examples, names, valid, notes = [], [], [], Counter[str]()
        for position in range(first, first + part):
            index = position % self.count * self.total // self.count
            example, name, reasons = self.samples.get(0, index, (self.seed, 0), 0, 0)
            examples.append(example)
            names.append(name)
            valid.append(position < self.count and not reasons)
            notes.update(f"bad/{reason}" for reason in reasons)
        batch = self.samples.prepare.collate(examples, valid)
        batch.index, batch.keys, batch.notes = number, names, dict(notes)
        batch.valid = torch.tensor(valid)
        return batch

    def __iter__(self) -> Iterator[Batch | StreamError]:
        worker, workers = _mine()
        return _until_error(self.batch, range(worker, len(self), workers))
