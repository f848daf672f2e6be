"""Draws: fixed numbers for fixed keys, one sequence however it is taken, and distributions as promised."""

import math
from collections import Counter

import numpy as np
import pytest

from mmssl.draws import Draws, mix


def test_words_are_splitmix64s() -> None:
    """The published numbers of seed 1234567 (Steele, Lea and Flood's own Java code gives them as well)."""
    draws = Draws(0)
    draws._start, draws._step = 1234567, 0x9E3779B97F4A7C15
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert draws.uniform(5).tolist() == [(word >> 11) * 2.0**-53 for word in words]


def test_numbers_are_the_same_on_every_machine() -> None:
    """Changing these changes every augmentation and mask: say so in the CHANGELOG."""
    assert mix(1, 2, 3) == 5246500226706903259
    assert Draws(1, 2, 3).uniform(3).tolist() == [0.09360919928281175, 0.8631322058144965, 0.15269874435100161]
    assert Draws(-1, 2**70).one() == 0.026754904118898915


def test_one_sequence_however_it_is_taken() -> None:
    whole = Draws(7, 8).uniform(1500)
    draws = Draws(7, 8)
    taken = [draws.one(), *draws.uniform(20), draws.one(), draws.one(), *draws.uniform(1100), *draws.uniform(377)]
    assert taken == whole.tolist()
    draws = Draws(7, 8)
    assert draws.one(2.0, 4.0) == 2 + 2 * whole[0]
    assert draws.integer(10) == int(whole[1] * 10)
    assert draws.integers(10, 3).tolist() == [int(number * 10) for number in whole[2:5]]
    assert draws.permutation(9).tolist() == np.argsort(whole[5:14]).tolist()
    assert draws.one() == whole[14]


@pytest.mark.parametrize("key", [(0, 0), (1, 0), (0, 1), (0,), (0, 0, 0), (2**63,)])
def test_keys_matter(key: tuple[int, ...]) -> None:
    numbers = Draws(*key).uniform(4)
    for other in [(0, 0), (1, 0), (0, 1), (0,), (0, 0, 0), (2**63,)]:
        assert np.array_equal(numbers, Draws(*other).uniform(4)) == (other == key)


def test_numbers_are_uniform_and_unrelated() -> None:
    """Over neighbouring keys, as the samples of an epoch have them; bounds are passed once in 10,000 times or less."""
    samples, n = 20_000, 23
    table = np.array([Draws(0, 3, 0, sample).uniform(n) for sample in range(samples)])
    assert 0 <= table.min() <= table.max() < 1
    for column in table.T:
        counts = np.histogram(column, 64, (0, 1))[0]
        assert ((counts - samples / 64) ** 2 / (samples / 64)).sum() < 63 + 4.5 * math.sqrt(2 * 63)
    correlations = np.corrcoef(np.hstack([table[:-1], table[1:]]).T) - np.eye(2 * n)
    assert np.abs(correlations).max() < 5.5 / math.sqrt(samples)


def test_permutations_are_uniform() -> None:
    counts = Counter(tuple(Draws(5, i).permutation(4).tolist()) for i in range(24_000))
    assert len(counts) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 23 + 4.5 * math.sqrt(2 * 23)


@pytest.mark.parametrize("n", [0, 1, 2, 196, 5000])
def test_permutations_hold_everything(n: int) -> None:
    assert np.array_equal(np.sort(Draws(n).permutation(n)), np.arange(n))
