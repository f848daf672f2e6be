import pickle
import time

import numpy as np
import pytest

from mmssl.data.order import Mixture, Order, check_world, choose_lanes, divisors, permutation


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
    assert Order(1000, lanes=4, seed=0).batch(3, 8)[1].tolist() == [825, 88, 336, 225, 509, 108, 341, 33]
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


def test_large_data_are_quick() -> None:
    start = time.perf_counter()
    order = Order(100_000_000, lanes=256, seed=1)
    order.batch(0, 4096, 3, 64)
    assert time.perf_counter() - start < 2
    start = time.perf_counter()
    for number in range(1_000_000, 1_000_100):
        order.batch(number, 4096, 3, 64)
    assert (time.perf_counter() - start) / 100 / 64 < 100e-6  # a tenth of it on an idle core


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
