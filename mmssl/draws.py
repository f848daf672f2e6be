"""Random draws that depend on named integers alone: never on a rank, a worker, a clock or a NumPy version."""

import functools

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*values: int, start: int = _GOLDEN) -> int:
    """Hash integers to 64 bits (SplitMix64's finaliser, folded over the values).

    It folds from the left: mix(a, b, c) equals mix(c, start=mix(a, b)).
    """
    state = start
    for value in values:
        state = _scramble(((state ^ (int(value) & _WORD)) + _GOLDEN) & _WORD)
    return state


def _scramble(z: int) -> int:
    """SplitMix64's finaliser, a bijection of 64 bits."""
    z = ((z ^ (z >> 30)) * _FIRST) & _WORD
    z = ((z ^ (z >> 27)) * _SECOND) & _WORD
    return z ^ (z >> 31)


# Made once: a NumPy scalar takes longer to make than to use.
_U30, _U27, _U31, _U11 = (np.uint64(bits) for bits in (30, 27, 31, 11))
_UFIRST, _USECOND = np.uint64(_FIRST), np.uint64(_SECOND)
_COUNT = np.arange(1024, dtype=np.uint64)


def _count(n: int) -> NDArray[np.uint64]:
    return _COUNT[:n] if n <= len(_COUNT) else np.arange(n, dtype=np.uint64)


def _words(start: int, step: int, first: int, n: int) -> NDArray[np.uint64]:
    """Words ``first`` up to ``first + n`` of SplitMix64 (Steele, Lea and Flood 2014): start + i * step, scrambled."""
    z = _count(n) * np.uint64(step)
    z += np.uint64((start + first * step) & _WORD)
    z ^= z >> _U30
    z *= _UFIRST
    z ^= z >> _U27
    z *= _USECOND
    z ^= z >> _U31
    return z


@functools.lru_cache(64)
def _prefix(key: tuple[int, ...]) -> int:
    return mix(*key)


class Draws:
    """A stream of draws keyed by integers, such as (seed, epoch, sample).

    SplitMix64 with a start and a step of its own for every key, made here and not by NumPy: NumPy does not promise its
    distributions to stay the same between versions, and its generators take ten times as long to begin, a system call
    included, where most samples need a few dozen numbers.  Keys are hashed when the first number is drawn.
    """

    __slots__ = ("_key", "_next", "_start", "_step")

    def __init__(self, *key: int) -> None:
        self._key = key
        self._start = self._step = 0  # a real step is odd, so 0 says: not hashed yet
        self._next = 1

    def _take(self, n: int) -> int:
        """Reserve n words; the number of the first."""
        if not self._step:
            # Of the keys (seed, epoch, source, sample) of a batch only the last number differs.
            self._start = mix(*self._key[-1:], start=_prefix(self._key[:-1]))
            self._step = _scramble(self._start ^ _GOLDEN) | 1
        first = self._next
        self._next += n
        return first

    def uniform(self, n: int) -> NDArray[np.float64]:
        """n numbers in [0, 1)."""
        first = self._take(n)
        return (_words(self._start, self._step, first, n) >> _U11).astype(np.float64) * 2.0**-53

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        word = _scramble((self._take(1) * self._step + self._start) & _WORD)
        return low + (high - low) * ((word >> 11) * 2.0**-53)

    def integer(self, high: int) -> int:
        """One integer in [0, high)."""
        return int(self.one() * high)

    def integers(self, high: int, n: int) -> NDArray[np.int64]:
        """n integers in [0, high)."""
        return (self.uniform(n) * high).astype(np.int64)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """A uniform permutation of range(n)."""
        # The order of random words; the index sits in their low bits, so no two are equal and any sort will do.
        low = np.uint64((1 << max(1, n - 1).bit_length()) - 1)
        first = self._take(n)
        keyed = (_words(self._start, self._step, first, n) | low) - (low - _count(n))
        keyed.sort()
        return (keyed & low).astype(np.int64)
