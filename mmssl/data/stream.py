"""The stream: order -> read -> prepare -> Batch, in the loader's workers.

Every global batch is a pure function of its number.  Of W workers, worker w builds the batches w, w + W, ... whole and
the DataLoader hands them out in turn, so the number of workers changes nothing.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mmssl.data.budget import TooManyBadSamples, worst_shards
from mmssl.data.lines import append_line
from mmssl.data.order import Mixture, Order, check_world
from mmssl.data.shards import ShardSet
from mmssl.data.tar import ShardError
from mmssl.draws import Draws, mix
from mmssl.types import BadSample, Batch, Prepare

_TRIES = 16

StreamError = ShardError | TooManyBadSamples


@dataclass
class Source:
    """Shards with a name and a weight in the mixture, and what prepares them, if not what prepares the others."""

    name: str
    shards: ShardSet
    weight: float = 1.0
    prepare: Prepare | None = None


class _Samples:
    """Reads and prepares single samples; replaces and reports the bad ones."""

    def __init__(self, sources: list[Source], prepare: Prepare, bad_samples: str | None) -> None:
        self.sources, self.prepare, self.bad_samples = sources, prepare, bad_samples
        self._listed: set[tuple[str, str, int]] = set()  # every validation meets the same bad samples again

    def prepare_of(self, source: int) -> Prepare:
        return self.sources[source].prepare or self.prepare

    def get(
        self, source: int, index: int, key: tuple[int, ...], epoch: int, batch: int, count: int
    ) -> tuple[Any, str, list[tuple[str, str]]]:
        """A prepared example, its name, and (shard, reason) of those that were passed over.

        ``key`` and the sample's index key the draws.  A substitute is one of the source's first ``count`` samples,
        chosen by hash.
        """
        shards, prepare = self.sources[source].shards, self.prepare_of(source)
        bad: list[tuple[str, str]] = []
        chosen = index
        while len(bad) < _TRIES:
            sample = shards.read(chosen, alone=bool(bad))
            name = f"{sample.shard.rpartition('/')[2]}/{sample.key}"
            try:
                return prepare.sample(sample, Draws(*key, chosen), batch), name, bad
            except BadSample as error:
                bad.append((sample.shard, error.reason))
                self._report(sample.shard, sample.key, error, epoch)
            except Exception as error:
                error.add_note(f"while preparing sample {sample.key} of shard {sample.shard}")
                raise
            chosen = mix(*key, index, len(bad)) % count
        raise TooManyBadSamples(
            f"{_TRIES} samples in a row cannot be used; {worst_shards(Counter(bad), self.bad_samples)}"
        )

    def _report(self, shard: str, key: str, error: BadSample, epoch: int) -> None:
        if self.bad_samples is None or (shard, key, epoch) in self._listed:
            return
        if len(self._listed) > 100_000:
            self._listed.clear()
        self._listed.add((shard, key, epoch))
        entry = {"shard": shard, "key": key, "reason": error.reason, "detail": error.detail, "epoch": epoch}
        try:
            append_line(self.bad_samples, entry)
        except OSError as failed:
            raise ShardError(
                f"cannot name a bad sample in {self.bad_samples}: {failed.strerror}; free space or make it writable"
            ) from None


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
        bad_samples: file to which every bad sample is appended as a line of JSON.

    Raises:
        ValueError: if the lanes cannot be dealt to the ranks, or for a weight that makes no sense.
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
        bad_samples: str | None = None,
    ) -> None:
        check_world(lanes, world, batch_size)
        self.seed, self.batch_size, self.rank, self.world, self.start_batch = seed, batch_size, rank, world, start_batch
        self.mixture = Mixture([source.weight for source in sources])
        self.samples = _Samples(sources, prepare, bad_samples)
        self.orders = self._make_orders([len(source.shards) for source in sources], lanes)

    def _make_orders(self, counts: Sequence[int | Sequence[Sequence[int]]], lanes: int) -> list[Order]:
        orders = [Order(n, lanes=lanes, seed=self.seed, source=number) for number, n in enumerate(counts)]
        for source, order in zip(self.samples.sources, orders, strict=True):
            source.shards.group = order.block  # fetched together: nobody else reads of a block in this epoch
        return orders

    def grow(self, histories: Sequence[Sequence[Sequence[int]]]) -> None:
        """Go on with sources to which samples were appended; see :class:`mmssl.data.order.Order`."""
        self.orders = self._make_orders(histories, self.orders[0].lanes)

    def batch(self, number: int) -> Batch:
        """This rank's part of a global batch.  Raises ShardError or TooManyBadSamples."""
        source, before = self.mixture.at(number)
        order = self.orders[source]
        epochs, indices = order.batch(before, self.batch_size, self.rank, self.world)
        examples, names, bad = [], [], []
        for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
            key, count = (self.seed, epoch, source), order.samples_in(epoch)
            example, name, replaced = self.samples.get(source, index, key, epoch, number, count)
            examples.append(example)
            names.append(name)
            if replaced:
                bad += replaced
        batch = self.samples.prepare_of(source).collate(examples)
        batch.source = self.samples.sources[source].name
        batch.index, batch.keys, batch.bad = number, names, bad
        return batch

    def epochs(self, batches: int) -> dict[str, float]:
        """How often each source's samples have been seen after so many global batches, by name; 1.5: one and a half."""
        passed = {}
        for number, (source, order) in enumerate(zip(self.samples.sources, self.orders, strict=True)):
            position = self.mixture.given(batches)[number] * self.batch_size
            epoch, begin, count = order.epoch_at(position)
            passed[source.name] = epoch + (position - begin) / count
        return passed

    def __iter__(self) -> Iterator[Batch | StreamError]:
        worker, workers = _mine()
        return _until_error(self._prefetched(), itertools.count(self.start_batch + worker, workers))

    def _prefetched(self) -> Callable[[int], Batch]:
        """``batch``, which first sees to it that remote shards are fetched before they are needed."""
        remote = [source.shards.remote for source in self.samples.sources]
        started: set[int] = set()

        def made(number: int) -> Batch:
            source, before = self.mixture.at(number)
            if remote[source]:
                order, shards = self.orders[source], self.samples.sources[source].shards
                start = source not in started
                started.add(source)
                shards.prefetch(order.ahead(before, self.batch_size, self.rank, self.world, start=start))
            return self.batch(number)

        return made if any(remote) else self.batch


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
        rank, world, bad_samples: as in :class:`TrainStream`.
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
        bad_samples: str | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"val_batch_size is {batch_size}; it counts over all {world} ranks, which must divide it")
        if limit is not None and limit < 1:
            raise ValueError(f"val_samples is {limit}; give at least 1, or null for all")
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.total = len(shards)
        self.count = min(limit or self.total, self.total)
        self.samples = _Samples([Source("val", shards)], prepare, bad_samples)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def batch(self, number: int) -> Batch:
        """This rank's part of global batch ``number``."""
        examples, names, valid, bad = [], [], [], []
        for position in self._positions(number):
            example, name, replaced = self.samples.get(0, self._index(position), (self.seed, 0), 0, 0, self.total)
            examples.append(example)
            names.append(name)
            valid.append(position < self.count and not replaced)
            bad += replaced
        batch = self.samples.prepare.collate(examples, valid)
        batch.index, batch.keys, batch.bad = number, names, bad
        batch.valid = torch.tensor(valid)
        return batch

    def _positions(self, number: int) -> range:
        part = self.batch_size // self.world
        first = number * self.batch_size + self.rank * part
        return range(first, first + part)

    def _index(self, position: int) -> int:
        return position % self.count * self.total // self.count

    def __iter__(self) -> Iterator[Batch | StreamError]:
        worker, workers = _mine()
        numbers = range(worker, len(self), workers)
        shards = self.samples.sources[0].shards
        # Neighbours that one rank reads in one batch; with a limit there are none.
        shards.group = self.batch_size // self.world if self.count == self.total else 1
        if not shards.remote:
            return _until_error(self.batch, numbers)

        def made(number: int) -> Batch:
            soon = range(number, min(number + 2 * workers, len(self)), workers)
            shards.prefetch(self._index(position) for later in soon for position in self._positions(later))
            return self.batch(number)

        return _until_error(made, numbers)
