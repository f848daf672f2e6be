"""Hidden patches: exact counts, uniformity, the shape of blocks."""

import numpy as np
import pytest

from mmssl.draws import Draws
from mmssl.masking.image import hide_patches, num_visible


@pytest.mark.parametrize("strategy", ["random", "block", "multi_block"])
@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (6, 10), (2, 2)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_every_picture_hides_the_same_number(strategy: str, grid: tuple[int, int], ratio: float) -> None:
    n = grid[0] * grid[1]
    for seed in range(50):
        visible, hidden = hide_patches(grid, Draws(seed), ratio=ratio, strategy=strategy)
        assert len(visible) == num_visible(n, ratio) == int(n * (1 - ratio))
        assert (np.diff(visible) > 0).all()
        assert (np.diff(hidden) > 0).all()
        assert set(visible) | set(hidden) == set(range(n))


def test_random_is_uniform() -> None:
    hits = np.zeros(64)
    for seed in range(10_000):
        hits[hide_patches((8, 8), Draws(seed), ratio=0.75).hidden] += 1
    assert np.abs(hits - 7500).max() < 5 * np.sqrt(10_000 * 0.75 * 0.25)


@pytest.mark.parametrize("strategy", ["block", "multi_block"])
def test_blocks_hang_together(strategy: str) -> None:
    def neighbours(strategy: str) -> float:
        """Mean share of a hidden patch's four neighbours that are hidden too."""
        share = []
        for seed in range(200):
            grid = np.zeros((16, 16))
            grid[1:-1, 1:-1].flat[hide_patches((14, 14), Draws(seed), ratio=0.5, strategy=strategy).hidden] = 1
            inner = grid[1:-1, 1:-1]
            around = grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:]
            share.append((around * inner).sum() / (4 * inner.sum()))
        return float(np.mean(share))

    assert neighbours(strategy) > 0.75
    assert neighbours("random") < 0.55


def test_ratios_as_mae_counts_them() -> None:
    assert num_visible(196, 0.75) == 49
    assert num_visible(64, 0.6) == 25
    assert num_visible(10, 0.7) == 3  # 10 * (1 - 0.7) is 3.0000000000000004 or 2.9999999999999996
