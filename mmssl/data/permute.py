"""Keyed permutations of range(n) from SplitMix64 hashes: NumPy does not promise its own streams to stay the same."""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from mmssl.draws import mix

Integers = NDArray[np.int64]
_ROUNDS = 10
_SMALL = 1 << 14  # so many are worked out at once and kept: 3 ms, 128 KiB


def _hash(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def permutation(n: int, *key: int) -> Integers:
    """The whole of a permutation, exactly uniform: sort by hash.

    The index sits in the hash's low bits, so no two keys are equal and a plain sort gives the order everywhere.
    """
    index = np.arange(n, dtype=np.uint64)
    low = np.uint64((1 << max(1, n - 1).bit_length()) - 1)
    keyed = (_hash(index, mix(*key)) & ~low) | index
    keyed.sort()
    return (keyed & low).astype(np.int64)


class Permutation:
    """A permutation of which any part is found directly, without making or keeping the whole.

    An alternating Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): a number is
    written as two digits, each is moved in turn by a hash of the other, and what falls behind the end (fewer
    than sqrt(n) + 1 numbers do) walks on until it is inside.

    Args:
        n: how many, at least 1.
        key: another key, another permutation.
    """

    def __init__(self, n: int, *key: int) -> None:
        self._n = np.uint64(n)
        self._high = np.uint64(isqrt(n - 1) + 1)
        self._low = np.uint64(-(-n // int(self._high)))
        self._keys = [mix(*key, number) for number in range(_ROUNDS)]
        self._table = self._walk(np.arange(n, dtype=np.int64)) if n <= _SMALL else None

    def __call__(self, values: Integers) -> Integers:
        """Where the permutation takes each of ``values``."""
        return self._walk(values) if self._table is None else self._table[values]

    def _walk(self, values: Integers) -> Integers:
        out = self._forward(values.astype(np.uint64))
        while (outside := out >= self._n).any():
            out[outside] = self._forward(out[outside])
        return out.astype(np.int64)

    def inverse(self, values: Integers) -> Integers:
        """What the permutation takes to each of ``values``."""
        out = self._backward(values.astype(np.uint64))
        while (outside := out >= self._n).any():
            out[outside] = self._backward(out[outside])
        return out.astype(np.int64)

    def _forward(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values // self._low, values % self._low
        for number, key in enumerate(self._keys):
            if number % 2:
                low = (low + _hash(high, key) % self._low) % self._low
            else:
                high = (high + _hash(low, key) % self._high) % self._high
        return high * self._low + low

    def _backward(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values // self._low, values % self._low
        for number, key in reversed(list(enumerate(self._keys))):
            if number % 2:
                low = (low + (self._low - _hash(high, key) % self._low)) % self._low
            else:
                high = (high + (self._high - _hash(low, key) % self._high)) % self._high
        return high * self._low + low
