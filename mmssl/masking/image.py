"""Which patches of a picture are hidden.

Axes: h x w patches, N = h * w, numbered row by row; U hidden, V = N - U visible.
Every strategy hides exactly the same number of patches in every picture, so that a batch needs no padding.
"""

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from mmssl.draws import Draws

ImageStrategy = Literal["random", "block", "multi_block"]
Ids = NDArray[np.int64]


class HiddenPatches(NamedTuple):
    """``visible`` [V] and ``hidden`` [U], ascending, together every patch once."""

    visible: Ids
    hidden: Ids


def check_image_strategy(strategy: str) -> None:
    if strategy not in get_args(ImageStrategy):
        raise ValueError(f"image masking {strategy!r} is unknown; use one of {', '.join(get_args(ImageStrategy))}")


def num_visible(num_patches: int, ratio: float) -> int:
    """MAE's count: the whole part of N * (1 - ratio), at least one."""
    return max(1, int(num_patches * (1 - ratio) + 1e-9))


def hide_patches(
    grid_size: tuple[int, int], draws: Draws, *, ratio: float, strategy: ImageStrategy = "random"
) -> HiddenPatches:
    """Draw the hidden patches of one picture.

    - random: uniformly without replacement (He et al. 2022).
    - block: rectangles of at least 16 patches (fewer in small grids) and aspect 0.3 to 1/0.3 until the count is
      reached (BEiT, Bao et al. 2022, algorithm 1); the last one is cut to the exact count.
    - multi_block: several rectangles of 15 to 20 % of the picture and aspect 0.75 to 1.5 (the targets of I-JEPA,
      Assran et al. 2023), the last one cut likewise.
    """
    h, w = grid_size
    count = h * w - num_visible(h * w, ratio)
    if strategy == "random":
        chosen = np.zeros(h * w, bool)
        chosen[draws.permutation(h * w)[:count]] = True
        return HiddenPatches(np.flatnonzero(~chosen), np.flatnonzero(chosen))
    is_hidden = np.zeros((h, w), bool)
    while (missing := count - int(is_hidden.sum())) > 0:
        if strategy == "block":
            # BEiT draws the area between 16 and what is missing; a small grid must allow smaller blocks.
            area = draws.one(min(16, max(1, count // 4), missing), missing + 1)
            low, high = 0.3, 1 / 0.3
        else:
            area, low, high = draws.one(0.15, 0.2) * h * w, 0.75, 1.5
        aspect = math.exp(draws.one(math.log(low), math.log(high)))
        rows = min(h, max(1, round(math.sqrt(area * aspect))))
        columns = min(w, max(1, round(math.sqrt(area / aspect))))
        top, left = draws.integer(h - rows + 1), draws.integer(w - columns + 1)
        block = np.zeros((h, w), bool)
        block[top : top + rows, left : left + columns] = True
        new = np.flatnonzero(block & ~is_hidden)
        # Cut the surplus from one end, so that what stays is still one piece.
        is_hidden.ravel()[new[:missing] if draws.one() < 0.5 else new[-missing:]] = True
    return HiddenPatches(np.flatnonzero(~is_hidden), np.flatnonzero(is_hidden))
