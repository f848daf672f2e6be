"""The order of samples: a pure function of integers, without any reading.

Words:
    position j   counts the samples of a source without end; an epoch is as many of them as the source has samples
    lane         one of C sequences that are read side by side; position j lies in lane j mod C
    turn         position within a lane: j = turn * C + lane
    block        neighbouring samples of the shards, read together (about 128)

Construction, for every epoch: cut the samples into blocks, permute the blocks, lay them end to end, cut this
sequence into C stretches, one for each lane, and shuffle inside windows of each stretch.  Global batch s of G
samples takes the positions from s * G up to (s + 1) * G, that is G / C consecutive samples of every lane, and
rank r owns the lanes c with c mod world = r.  From this follows:

- every epoch visits every sample exactly once; nothing is dropped, a batch may reach over the end of an epoch;
- all world sizes that divide C see the same global batches, and no two ranks read the same sample;
- a lane reads its blocks one after the other, a window at a time: reading stays local, whatever the data's size;
- any position is found directly, so going on in mid-epoch costs nothing.

Samples may be appended between two starts of a run: the epoch that was begun is finished without them, and the next
one has them all.  docs/data.md explains the guarantees and their limits.
"""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

import numpy as np

from mmssl.data.permute import Integers, Permutation, permutation


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def choose_lanes(batch_size: int, lanes: int | None = None) -> int:
    """The number of lanes C: the given one, or the largest divisor of the global batch that is at most 64.

    From batches of 1,024 on the limit grows to a sixteenth of the batch, up to 1,024.  It depends on the
    batch alone, never on the number of ranks.

    Raises:
        ValueError: if the given number does not divide the batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1 sample")
    if lanes is None:
        limit = min(1024, max(64, batch_size // 16))
        return max(d for d in divisors(batch_size) if d <= limit)
    if lanes < 1 or batch_size % lanes:
        raise ValueError(
            f"lanes is {lanes}, which does not divide batch_size {batch_size}; "
            f"give one of {', '.join(map(str, divisors(batch_size)))}"
        )
    return lanes


def check_world(lanes: int, world: int, batch_size: int) -> None:
    """Raises ValueError, naming the sizes that work, if the lanes cannot be dealt evenly to ``world`` ranks."""
    if lanes % world:
        remedy = f"; or set lanes to a multiple of {world}" if batch_size % world == 0 else ""
        raise ValueError(
            f"{lanes} lanes (batch_size {batch_size}) cannot be dealt evenly to {world} ranks; "
            f"run on {', '.join(map(str, divisors(lanes)))}{remedy}"
        )


class _Window(NamedTuple):
    """Turns ``first`` up to ``stop`` of a lane, which lie in one epoch and are shuffled together."""

    first: int
    stop: int
    epoch: int
    place: int  # in the epoch's sequence of blocks
    number: int  # within the lane's stretch


class Order:
    """Which samples of one source a batch holds.

    Args:
        samples: how many there are; or, for a source that grew, a history [(0, n0), (e1, n1), ...]: from epoch e1
            on there are n1 samples.
        lanes: C; see :func:`choose_lanes`.
        seed: another seed, another order.
        source: number of the source among several; it keys the order as well.
        block: samples of a block; by default 128, fewer where there would not be 16 blocks for every lane.
        window: blocks of a window.  Inside it a lane is shuffled sample by sample.

    Raises:
        ValueError: if there are no samples, or the history does not begin at epoch 0 and grow.
    """

    def __init__(
        self,
        samples: int | Sequence[Sequence[int]],
        *,
        lanes: int,
        seed: int,
        source: int = 0,
        block: int | None = None,
        window: int = 16,
    ) -> None:
        history = [(0, samples)] if isinstance(samples, int) else [(int(e), int(n)) for e, n in samples]
        if not history or history[0][1] < 1:
            raise ValueError("there are no samples to order; give shards that hold some")
        if history[0][0] != 0 or any(a >= b for (a, _), (b, _) in pairwise(history)):
            raise ValueError(f"history is {history}; the epochs must begin at 0 and grow")
        self.history, self.lanes = history, lanes
        self._key = (seed, source)
        # Of the first samples: it must stay when samples are appended.
        self.block = block or max(1, min(128, history[0][1] // (16 * lanes)))
        self.window = window * self.block
        self._begins = [0]  # position of the first sample of each entry of the history
        for (epoch, count), (following, _) in pairwise(history):
            self._begins.append(self._begins[-1] + (following - epoch) * count)
        # Caches of pure functions: two epochs are alive at an epoch's end, and every owned lane has an open window.
        self._blocks = functools.lru_cache(4)(self._permuted_blocks)
        self._open: dict[int, tuple[_Window, Integers]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.history, self.lanes, self._key, self.block, self.window)

    def epoch_at(self, position: int) -> tuple[int, int, int]:
        """(epoch, its first position, its number of samples) of a position."""
        entry = bisect_right(self._begins, position) - 1
        first, count = self.history[entry]
        passed = (position - self._begins[entry]) // count
        return first + passed, self._begins[entry] + passed * count, count

    def samples_in(self, epoch: int) -> int:
        """Number of samples of an epoch."""
        return self.history[bisect_right(self.history, (epoch, 1 << 62)) - 1][1]

    def batch(self, number: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Integers, Integers]:
        """Epochs and sample indices of one rank's part of a global batch, each of batch_size / world entries."""
        assert batch_size % self.lanes == 0, "checked by choose_lanes"
        assert self.lanes % world == 0, "checked by check_world"
        turns = batch_size // self.lanes
        first = number * turns
        lanes = range(rank, self.lanes, world)
        epochs = np.empty((turns, len(lanes)), np.int64)
        indices = np.empty((turns, len(lanes)), np.int64)
        for column, lane in enumerate(lanes):
            turn = first
            while turn < first + turns:  # once, or once more for every end of a window inside the batch
                window, samples = self._opened(lane, turn)
                stop = min(first + turns, window.stop)
                epochs[turn - first : stop - first, column] = window.epoch
                indices[turn - first : stop - first, column] = samples[turn - window.first : stop - window.first]
                turn = stop
        # By turn, then lane: the order of positions, so that ranks' parts interleave to the same global batch.
        return epochs.ravel(), indices.ravel()

    def ahead(self, number: int, batch_size: int, rank: int = 0, world: int = 1, *, start: bool = False) -> list[int]:
        """The first samples of blocks that batches soon after this one need, for fetching them in time.

        While a lane walks through a window, the blocks of its next window are named at an even pace.  With ``start``
        all are named that should have been before: the present window's first.
        """
        turns = batch_size // self.lanes
        first = number * turns
        wanted: list[int] = []
        for lane in range(rank, self.lanes, world):
            if start:
                wanted += self._blocks_of(self._window(lane, first))
        for lane in range(rank, self.lanes, world):
            window = self._window(lane, first)
            following = self._blocks_of(self._window(lane, window.stop))
            length = window.stop - window.first
            begin, end = 0 if start else first - window.first, min(first + turns, window.stop) - window.first
            wanted += following[begin * len(following) // length : end * len(following) // length]
        return wanted

    # ---- one lane

    def _opened(self, lane: int, turn: int) -> tuple[_Window, Integers]:
        """The window that holds a turn, with its sample indices in their shuffled order."""
        found = self._open.get(lane)
        if found is None or not found[0].first <= turn < found[0].stop:
            window = self._window(lane, turn)
            length = window.stop - window.first
            shuffled = permutation(length, *self._key, window.epoch, 2, lane, window.number)
            found = self._open[lane] = window, self._indices(window.epoch, window.place + shuffled)
        return found

    def _window(self, lane: int, turn: int) -> _Window:
        epoch, begin, count = self.epoch_at(turn * self.lanes + lane)
        first = -((lane - begin) // self.lanes)  # the lane's first turn in this epoch
        place, length = self._stretch(begin, count, lane)
        number = (turn - first) // self.window
        start = number * self.window
        stop = min(start + self.window, length)
        return _Window(first + start, first + stop, epoch, place + start, number)

    def _stretch(self, begin: int, count: int, lane: int) -> tuple[int, int]:
        """Begin and length of the lane's stretch.  Lengths differ by one; whose is longer moves on every epoch."""
        short, longer = divmod(count, self.lanes)
        shift = begin % self.lanes  # the lane of the epoch's first position
        before = min(max(lane - shift, 0), longer) + min(lane, max(0, shift + longer - self.lanes))
        extra = (lane - shift) % self.lanes < longer
        return lane * short + before, short + extra

    # ---- blocks

    def _indices(self, epoch: int, places: Integers) -> Integers:
        """Sample indices at places of the epoch's sequence of blocks; the places are neighbours, in any order."""
        blocks, slots, offsets = self._slots(epoch, places)
        first = int(slots.min())
        return blocks(np.arange(first, int(slots.max()) + 1))[slots - first] * self.block + offsets

    def _blocks_of(self, window: _Window) -> list[int]:
        ends = np.array([window.place, window.place + window.stop - window.first - 1])
        blocks, slots, _ = self._slots(window.epoch, ends)
        samples: list[int] = (blocks(np.arange(slots[0], slots[1] + 1)) * self.block).tolist()
        return samples

    def _slots(self, epoch: int, places: Integers) -> tuple[Permutation, Integers, Integers]:
        """The epoch's permutation of blocks; the slot of each place and its offset within the slot."""
        blocks, short_slot, missing = self._blocks(epoch)
        # One block is short. Behind it, count as if it were whole.
        places = places + missing * (places >= (short_slot + 1) * self.block - missing)
        return blocks, places // self.block, places % self.block

    def _permuted_blocks(self, epoch: int) -> tuple[Permutation, int, int]:
        count = self.samples_in(epoch)
        blocks = -(-count // self.block)
        permuted = Permutation(blocks, *self._key, epoch, 1)
        last = int(permuted.inverse(np.array([blocks - 1]))[0])  # where the last block went, the short one
        return permuted, last, blocks * self.block - count


def _rebuild(history: list[tuple[int, int]], lanes: int, key: tuple[int, int], block: int, window: int) -> Order:
    return Order(history, lanes=lanes, seed=key[0], source=key[1], block=block, window=window // block)


class Mixture:
    """Which source a batch is taken from, and how many batches that source gave before.

    Whole batches come from one source, the same on every rank.  The choice is a low-discrepancy sequence: after
    any number of batches every source is within (number of sources) batches of its due share.

    Args:
        weights: above 0, in any unit.
    """

    def __init__(self, weights: Sequence[float | int]) -> None:
        exact = [Fraction(weight).limit_denominator(1_000_000) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"weights are {list(weights)}; every source needs a weight above 0")
        # Share of source k among the sources from k on: they are split off one after the other.
        self._shares = [weight / sum(exact[k:]) for k, weight in enumerate(exact)]

    def at(self, number: int) -> tuple[int, int]:
        """(source, batches it gave before) for a global batch."""
        for source, share in enumerate(self._shares):
            before = self._taken(share, number)
            if self._taken(share, number + 1) > before:
                return source, before
            number -= before
        raise AssertionError("the last source's share is 1")

    def given(self, number: int) -> list[int]:
        """How many of the first ``number`` global batches each source gave."""
        counts = []
        for share in self._shares:
            counts.append(self._taken(share, number))
            number -= counts[-1]
        return counts

    @staticmethod
    def _taken(share: Fraction, number: int) -> int:
        # Floor of share * number + 1/2, in whole numbers.
        return (2 * share.numerator * number + share.denominator) // (2 * share.denominator)
