"""The order of samples: a pure function of integers, without any reading.

Words:
    position j   counts the samples of a source without end; its epoch is j // samples
    lane         one of C sequences that are read side by side; position j lies in lane j mod C
    block        neighbouring samples of the shards, read together (about 128)

Construction, for every epoch: cut the samples into blocks, permute the blocks, lay them end to end, cut this
sequence into C stretches, one for each lane, and shuffle inside windows of each stretch.  Global batch s of G
samples takes the positions from s * G up to (s + 1) * G, that is G / C consecutive samples of every lane, and
rank r owns the lanes c with c mod world = r.  From this follows:

- every epoch visits every sample exactly once; nothing is dropped, a batch may reach over the end of an epoch;
- all world sizes that divide C see the same global batches, and no two ranks read the same sample;
- a lane reads its blocks one after the other, a window at a time: reading stays local, whatever the data's size;
- any position is found directly, so going on in mid-epoch costs nothing.

The shuffle is made of keyed hashes (SplitMix64), since NumPy does not promise its own streams between versions.
"""

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mmssl.draws import mix

Integers = NDArray[np.int64]


def permutation(n: int, *key: int) -> Integers:
    """A keyed permutation of range(n): sort by hash.

    The index sits in the hash's low bits, so no two keys are equal and a plain sort gives the order everywhere.
    """
    index = np.arange(n, dtype=np.uint64)
    z = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64(mix(*key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    low = np.uint64((1 << max(1, n - 1).bit_length()) - 1)
    keyed = (z & ~low) | index
    keyed.sort()
    return (keyed & low).astype(np.int64)


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def choose_lanes(batch_size: int, lanes: int | None = None) -> int:
    """The number of lanes C: the given one, or the largest divisor of the global batch that is at most 64.

    From batches of 1,024 on the limit grows to a sixteenth of the batch, up to 256.  It depends on the
    batch alone, never on the number of ranks.

    Raises:
        ValueError: if the given number does not divide the batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1 sample")
    if lanes is None:
        limit = min(256, max(64, batch_size // 16))
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


class Order:
    """Which samples of one source a batch holds.

    Args:
        samples: how many there are.
        lanes: C; see :func:`choose_lanes`.
        seed: another seed, another order.
        source: number of the source among several; it keys the order as well.
        block: samples of a block; by default 128, fewer where there would not be 16 blocks for every lane.
        window: blocks of a window.  Inside it a lane is shuffled sample by sample.
    """

    def __init__(
        self, samples: int, *, lanes: int, seed: int, source: int = 0, block: int | None = None, window: int = 16
    ) -> None:
        if samples < 1:
            raise ValueError("there are no samples to order; give shards that hold some")
        self.samples, self.lanes = samples, lanes
        self._key = (seed, source)
        self.block = block or max(1, min(128, samples // (16 * lanes)))
        self.window = window * self.block
        self._blocks = -(-samples // self.block)
        # Caches of pure functions.  Two epochs are alive at an epoch's end, every owned lane has one open window.
        self._permuted = functools.lru_cache(2)(self._permute_blocks)
        self._shuffled = functools.lru_cache(2 * lanes)(self._shuffle_window)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.samples, self.lanes, self._key, self.block, self.window)

    def batch(self, number: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Integers, Integers]:
        """Epochs and sample indices of one rank's part of a global batch, each of batch_size / world entries."""
        assert batch_size % self.lanes == 0, "checked by choose_lanes"
        assert self.lanes % world == 0, "checked by check_world"
        turns = batch_size // self.lanes
        first = number * turns
        lanes = range(rank, self.lanes, world)
        epochs = np.empty((len(lanes), turns), np.int64)
        places = np.empty((len(lanes), turns), np.int64)
        for row, lane in enumerate(lanes):
            turn = first
            while turn < first + turns:  # once, or once more for every end of an epoch inside the batch
                epoch = (turn * self.lanes + lane) // self.samples
                begin, end = self._turns(epoch, lane)
                stop = min(first + turns, end)
                part = slice(turn - first, stop - first)
                epochs[row, part] = epoch
                places[row, part] = self._places(epoch, lane, turn - begin, stop - begin)
                turn = stop
        indices = np.empty_like(places)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            chosen = epochs == epoch
            indices[chosen] = self._index(epoch, places[chosen])
        # By turn, then lane: the order of positions, so that ranks' parts interleave to the same global batch.
        return epochs.T.ravel(), indices.T.ravel()

    def _turns(self, epoch: int, lane: int) -> tuple[int, int]:
        """The lane's turns that belong to an epoch: j = turn * C + lane lies in [epoch, epoch + 1) * samples."""
        begin, end = epoch * self.samples, (epoch + 1) * self.samples
        return -((lane - begin) // self.lanes), -((lane - end) // self.lanes)

    def _places(self, epoch: int, lane: int, first: int, stop: int) -> Integers:
        """Places in the epoch's sequence of blocks, for turns ``first`` up to ``stop`` of the lane's stretch."""
        begin, length = self._stretch(epoch, lane)
        parts = []
        while first < stop:
            window = first // self.window
            start = window * self.window
            shuffled = self._shuffled(epoch, lane, window, min(self.window, length - start))
            parts.append(begin + start + shuffled[first - start : stop - start].astype(np.int64))
            first = min(stop, start + self.window)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _stretch(self, epoch: int, lane: int) -> tuple[int, int]:
        """Begin and length of the lane's stretch.  Lengths differ by one; whose is longer moves on every epoch."""
        short, longer = divmod(self.samples, self.lanes)
        shift = epoch * self.samples % self.lanes  # the lane of the epoch's first position
        before = min(max(lane - shift, 0), longer) + min(lane, max(0, shift + longer - self.lanes))
        extra = (lane - shift) % self.lanes < longer
        return lane * short + before, short + extra

    def _index(self, epoch: int, places: Integers) -> Integers:
        """Sample indices at places of the epoch's sequence of blocks."""
        permuted, short_slot = self._permuted(epoch)
        # One block is short. Behind it, count as if it were whole.
        missing = self._blocks * self.block - self.samples
        places = places + missing * (places >= (short_slot + 1) * self.block - missing)
        return permuted[places // self.block].astype(np.int64) * self.block + places % self.block

    def _permute_blocks(self, epoch: int) -> tuple[NDArray[np.int32], int]:
        permuted = permutation(self._blocks, *self._key, epoch, 1).astype(np.int32)
        return permuted, int(np.argmax(permuted))  # the last block is the short one

    def _shuffle_window(self, epoch: int, lane: int, window: int, length: int) -> NDArray[np.int32]:
        return permutation(length, *self._key, epoch, 2, lane, window).astype(np.int32)


def _rebuild(samples: int, lanes: int, key: tuple[int, int], block: int, window: int) -> Order:
    return Order(samples, lanes=lanes, seed=key[0], source=key[1], block=block, window=window // block)


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

    @staticmethod
    def _taken(share: Fraction, number: int) -> int:
        # Floor of share * number + 1/2, in whole numbers.
        return (2 * share.numerator * number + share.denominator) // (2 * share.denominator)
