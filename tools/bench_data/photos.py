"""Pictures like photographs, made without any: for benchmarks, where only the JPEG's size and statistics count.

The dead-leaves model (Lee, Mumford and Huang 2001): shapes of all sizes cover each other, which gives the edges and
the power spectrum of natural scenes; texture of several scales lies over them, and the sensor's noise.  At quality 85
to 90 with 4:2:0 colour a picture of 375 to 512 pixels a side takes 33 to 72 KB, 49 on average.  The three photographs
inside scikit-learn and matplotlib, encoded alike, would take 29, 48 and 63 KB at the average of these sizes.
"""

import io

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import NDArray

SIDES = (375, 512)


def photograph(seed: int, sides: tuple[int, int] = SIDES) -> bytes:
    """One JPEG; its sides, content and quality depend on the seed alone (and on NumPy's and Pillow's versions)."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
    pixels = _leaves(rng, width, height) + _texture(rng, width, height)
    pixels += rng.normal(0, rng.uniform(0.2, 1.2), pixels.shape[:2])[..., None]  # the sensor's noise is mostly grey
    file = io.BytesIO()
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=int(rng.integers(85, 91)), subsampling="4:2:0")
    return file.getvalue()


def _leaves(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    image = PIL.Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(40, 216, 3)))
    draw = PIL.ImageDraw.Draw(image)
    palette = rng.normal(128, 50, (6, 3))
    radii = np.sort(6 * rng.power(1, 250) ** -0.75)[::-1].clip(max=200)  # a power law: large shapes below, small on top
    for radius in radii:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        colour = tuple(int(c) for c in (palette[rng.integers(6)] + rng.normal(0, 18, 3)).clip(0, 255))
        corners = int(rng.integers(3, 9))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        lengths = radius * rng.uniform(0.5, 1.2, corners)
        points = np.stack([x + lengths * np.cos(angles), y + lengths * np.sin(angles)], 1)
        if rng.random() < 0.5:
            draw.polygon([tuple(point) for point in points.tolist()], fill=colour)
        else:
            wide, high = radius * rng.uniform(0.4, 1, 2)
            draw.ellipse((x - wide, y - high, x + wide, y + high), fill=colour)
    return np.asarray(image, np.float64)


def _texture(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """Noise at scales from the whole picture to two pixels, the finer the weaker; stronger in some places."""
    total = np.zeros((height, width, 3), np.float64)
    size = 2
    while size < min(width, height):
        grid = rng.normal(0, 1, (size, size, 1)) + 0.3 * rng.normal(0, 1, (size, size, 3))
        amplitude = 18 * size**-0.45
        total += amplitude * np.stack([_enlarge(grid[..., c], width, height) for c in range(3)], -1)
        size *= 2
    where = _enlarge(rng.uniform(0, 1.6, (6, 6)), width, height).clip(0.1)
    return total * where[..., None]


def _enlarge(grid: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    image = PIL.Image.fromarray(grid.astype(np.float32))
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC), np.float64)
