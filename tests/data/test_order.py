import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from mmssl.data.order import Mixture, Order, check_world, choose_lanes, divisors
from mmssl.data.permute import Permutation, permutation


def sequence(order: Order, batch_size: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [order.batch(number, batch_size) for number in range(batches)]
    return np.concatenate([e for e, _ in parts]), np.concatenate([i for _, i in parts])


@pytest.mark.parametrize("samples", [1, 2, 5, 17, 64, 100, 1000, 4097])
@pytest.mark.parametrize(("batch_size", "lanes"), [(4, None), (8, 4), (8, 1), (64, None), (60, 12)])
def test_every_epoch_visits_every_sample_once(samples: int, batch_size: int, lanes: int | None) -> None:
    order = Order(samples, lanes=choose_lanes(batch_size, lanes), seed=3)
    epochs, indices = sequence(order, batch_size, -(-3 * samples // batch_size))
    np.testing.assert_array_equal(epochs, np.arange(len(epochs)) // samples)
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(samples))


@pytest.mark.parametrize("block", [1, 7, 128])
def test_blocks_that_do_not_fit(block: int) -> None:
    order = Order(1001, lanes=4, seed=0, block=block, window=3)
    epochs, indices = sequence(order, 8, 400)
    assert all(sorted(indices[epochs == epoch]) == list(range(1001)) for epoch in range(3))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_world_sizes_see_the_same_global_batches(world: int) -> None:
    order = Order(777, lanes=8, seed=1)
    for number in [0, 1, 23, 24, 25, 1000]:
        whole = order.batch(number, 32)
        parts = [order.batch(number, 32, rank, world) for rank in range(world)]
        assert all(len(indices) == 32 // world for _, indices in parts)
        pairs = sorted(zip(*map(np.concatenate, zip(*parts, strict=True)), strict=True))
        assert pairs == sorted(zip(*whole, strict=True))


def test_any_batch_is_found_directly_and_a_copy_agrees() -> None:
    order = Order(5000, lanes=16, seed=9)
    _, ahead = sequence(order, 32, 400)
    fresh = pickle.loads(pickle.dumps(Order(5000, lanes=16, seed=9)))  # noqa: S301
    for number in [399, 0, 156, 157]:
        np.testing.assert_array_equal(fresh.batch(number, 32)[1], ahead[number * 32 : number * 32 + 32])


def test_the_order_is_frozen() -> None:
    """A change here breaks every checkpoint's position: raise the version and say so in the changelog."""
    assert Order(1000, lanes=4, seed=0).batch(3, 8)[1].tolist() == [360, 528, 126, 225, 64, 203, 131, 813]
    assert permutation(8, 1, 2).tolist() == [1, 2, 6, 3, 7, 4, 0, 5]


def test_seed_epoch_and_source_change_the_order() -> None:
    base = Order(1000, lanes=4, seed=0)
    first = sequence(base, 8, 125)[1]
    others = [
        sequence(base, 8, 250)[1][1000:],
        sequence(Order(1000, lanes=4, seed=1), 8, 125)[1],
        sequence(Order(1000, lanes=4, seed=0, source=1), 8, 125)[1],
    ]
    for other in others:
        assert (first == other).mean() < 0.02
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_permutation_is_uniform() -> None:
    counts = np.zeros((7, 7))
    for key in range(7000):
        counts[np.arange(7), permutation(7, key)] += 1
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 70  # 36 degrees of freedom: mean 36, deviation 8.5
    assert permutation(1, 5).tolist() == [0]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100, 1001, 16_384, 20_000])
def test_a_permutation_in_parts(n: int) -> None:
    permuted = Permutation(n, 4, 2)
    whole = permuted(np.arange(n))
    assert sorted(whole) == list(range(n))
    np.testing.assert_array_equal(permuted(np.arange(n)[::-3]), whole[::-3])
    np.testing.assert_array_equal(permuted.inverse(whole), np.arange(n))


def test_permutations_in_parts_are_uniform() -> None:
    """All 24 orders of four; places, and pairs of neighbours' places, of sixteen; far places of many."""
    orders = Counter(tuple(Permutation(4, key)(np.arange(4)).tolist()) for key in range(12_000))
    assert len(orders) == 24
    assert sum((count - 500) ** 2 / 500 for count in orders.values()) < 23 + 6 * 6.8
    places, pairs = np.zeros((16, 16)), np.zeros((16, 16))
    for key in range(8000):
        values = Permutation(16, key, 1)(np.arange(16))
        places[np.arange(16), values] += 1
        pairs[values[0], values[1]] += 1
    assert ((places - 500) ** 2 / 500).sum() < 225 + 6 * 21
    expected = 8000 / 240
    assert ((pairs[~np.eye(16, dtype=bool)] - expected) ** 2 / expected).sum() < 239 + 6 * 22
    many = Permutation(7_812_500, 3)(np.arange(100_000))
    tenths = np.bincount(many * 10 // 7_812_500, minlength=10)
    assert ((tenths - 10_000) ** 2 / 10_000).sum() < 9 + 6 * 4.3
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 4 / 100_000**0.5
    assert abs(np.corrcoef(many, np.arange(100_000))[0, 1]) < 4 / 100_000**0.5


@pytest.mark.parametrize("samples", [600, 20_000])
def test_batches_are_mixed(samples: int) -> None:
    """A batch's samples are spread like independent draws, and neighbours are not followed by neighbours."""
    order = Order(samples, lanes=choose_lanes(64), seed=4)
    batches = samples // 64
    _, indices = sequence(order, 64, batches)
    tenth = indices.reshape(batches, 64) * 10 // samples
    counts = np.stack([np.bincount(row, minlength=10) for row in tenth])
    assert counts.var() < 1.3 * 64 * 0.1 * 0.9  # the variance of independent draws
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 4 * len(indices) ** -0.5
    assert (np.abs(np.diff(indices)) == 1).mean() < 0.02
    assert abs(np.corrcoef(indices, np.arange(len(indices)))[0, 1]) < 4 * len(indices) ** -0.5


def test_where_a_sample_comes_is_uniform_over_epochs() -> None:
    order = Order(64, lanes=4, seed=2)
    _, indices = sequence(order, 8, 8 * 400)
    place = np.arange(len(indices)) % 64 // 8
    counts = np.zeros((64, 8))
    np.add.at(counts, (indices, place), 1)
    chi2 = ((counts - 50) ** 2 / 50).sum()
    assert chi2 < 448 + 6 * 30  # 64 x 7 degrees of freedom


def test_a_lane_reads_its_blocks_one_window_at_a_time() -> None:
    order = Order(128 * 16 * 8 * 4, lanes=4, seed=0)
    assert order.block == 128
    _, indices = sequence(order, 4, 3 * 2048)
    lane = indices.reshape(-1, 4)[:, 1]  # turns of lane 1
    blocks = [set((lane[start : start + 2048] // 128).tolist()) for start in (0, 2048, 4096)]
    assert [len(b) for b in blocks] == [16, 16, 16]
    assert not blocks[0] & blocks[1]
    assert not blocks[1] & blocks[2]


@pytest.mark.parametrize(("world", "rank"), [(1024, 1023), (16, 3)])
def test_a_thousand_million_samples_without_holding_them(world: int, rank: int) -> None:
    """Nothing grows with the data: tools/bench_order.py measures the time."""
    order = Order(1_000_000_000, lanes=1024, seed=1)
    tracemalloc.start()
    indices = np.concatenate([order.batch(number, 16384, rank, world)[1] for number in range(2_000_000, 2_000_020)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20
    assert len(np.unique(indices)) == len(indices) == 20 * 16384 // world
    assert len(np.unique(indices // 128)) <= 2 * 17 * 1024 // world  # of a lane, at most two windows are open


def grown(order: Order, batch_size: int, batches: int) -> list[list[int]]:
    """The samples of each epoch, in their order."""
    epochs, indices = sequence(order, batch_size, batches)
    return [indices[epochs == epoch].tolist() for epoch in range(int(epochs.max()))]


@pytest.mark.parametrize(("first", "second"), [(100, 130), (1000, 1001), (7, 500), (64, 128)])
def test_appended_samples_come_with_the_next_epoch(first: int, second: int) -> None:
    before = Order(first, lanes=4, seed=5)
    after = Order([(0, first), (2, second)], lanes=4, seed=5)
    batches = -(-(2 * first + 2 * second) // 8) + 1
    epochs = grown(after, 8, batches)
    assert [len(epoch) for epoch in epochs] == [first, first, second, second]
    assert [sorted(epoch) == list(range(len(epoch))) for epoch in epochs] == [True] * 4
    assert epochs[:2] == grown(before, 8, batches)[:2]
    assert after.epoch_at(2 * first) == (2, 2 * first, second)
    for number in (0, 2 * first // 8, batches - 1):  # found directly, by any rank
        parts = [Order(after.history, lanes=4, seed=5).batch(number, 8, rank, 2) for rank in (0, 1)]
        pairs = sorted(zip(*map(np.concatenate, zip(*parts, strict=True)), strict=True))
        assert pairs == sorted(zip(*after.batch(number, 8), strict=True))


@pytest.mark.parametrize("history", [[], [(0, 0)], [(1, 5)], [(0, 5), (0, 6)], [(0, 5), (3, 6), (2, 7)]])
def test_a_history_must_make_sense(history: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"no samples to order|epochs must begin at 0"):
        Order(history, lanes=1, seed=0)


@pytest.mark.parametrize(("samples", "batch_size", "lanes"), [(20_000, 64, 8), (1001, 8, 4), (300, 32, 32)])
@pytest.mark.parametrize("world", [1, 2])
def test_blocks_are_named_before_they_are_needed(samples: int, batch_size: int, lanes: int, world: int) -> None:
    order = Order(samples, lanes=lanes, seed=2)
    for rank in range(world):
        named: list[int] = []
        for number in range(3, 3 + 2 * samples // batch_size):
            now = order.ahead(number, batch_size, rank, world, start=number == 3)
            _, indices = order.batch(number, batch_size, rank, world)
            named += now
            assert {int(i) // order.block for i in indices} <= {start // order.block for start in named}
            assert all(start % order.block == 0 for start in now)
        # A block can be cut by the ends of windows, so some are named twice, but hardly more than once an epoch.
        assert len(named) <= 2.3 * (2 + 34 * lanes * order.block / samples) * (samples / order.block) / world


def test_lanes() -> None:
    assert [choose_lanes(n) for n in (1, 16, 64, 96, 100, 256, 4096)] == [1, 16, 64, 48, 50, 64, 256]
    assert choose_lanes(96, 12) == 12
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(ValueError, match="lanes is 7, which does not divide batch_size 64; give one of 1, 2, 4"):
        choose_lanes(64, 7)
    with pytest.raises(ValueError, match="batch_size is 0"):
        choose_lanes(0)
    with pytest.raises(ValueError, match=r"8 lanes .* to 3 ranks; run on 1, 2, 4, 8; or set lanes to a multiple of 3"):
        check_world(8, 3, 24)
    with pytest.raises(ValueError, match="no samples"):
        Order(0, lanes=1, seed=0)


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 2, 1], [0.5, 0.3, 0.2], [10, 0.1], [1, 2, 3, 4, 5, 6]])
def test_mixture_counts_and_shares(weights: list[float | int]) -> None:
    mixture = Mixture(weights)
    counts = np.zeros(len(weights), int)
    for number in range(10_000):
        source, before = mixture.at(number)
        assert before == counts[source]
        counts[source] += 1
        if number % 97 == 0:
            assert np.abs(counts - (number + 1) * np.array(weights) / sum(weights)).max() <= len(weights)
    np.testing.assert_allclose(counts / 10_000, np.array(weights) / sum(weights), atol=0.001)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1]])
def test_mixture_refuses(weights: list[float | int]) -> None:
    with pytest.raises(ValueError, match="weight above 0"):
        Mixture(weights)
