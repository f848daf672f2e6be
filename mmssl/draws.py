"""Random draws that depend on named integers alone: never on a rank, a worker, a clock or a NumPy version."""

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1


def mix(*values: int) -> int:
    """Hash integers to 64 bits (SplitMix64's finaliser, folded over the values)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (int(value) & _WORD)) & _WORD
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


class Draws:
    """A stream of draws keyed by integers, such as (seed, epoch, sample).

    Built on the raw words of Philox-4x64 (Salmon et al. 2011), whose sequence NumPy guarantees; the
    distributions are made here because NumPy does not promise those to stay the same between versions.
    """

    def __init__(self, *key: int) -> None:
        self._words = np.random.Philox(key=np.array([mix(*key), mix(0x6D6D73736C, *key)], np.uint64))

    def uniform(self, n: int) -> NDArray[np.float64]:
        """n numbers in [0, 1)."""
        words: NDArray[np.uint64] = self._words.random_raw(n)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        return low + (high - low) * float(self.uniform(1)[0])

    def integer(self, high: int) -> int:
        """One integer in [0, high)."""
        return int(self.one() * high)

    def integers(self, high: int, n: int) -> NDArray[np.int64]:
        """n integers in [0, high)."""
        return (self.uniform(n) * high).astype(np.int64)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """A uniform permutation of range(n)."""
        return np.argsort(self.uniform(n), kind="stable")
