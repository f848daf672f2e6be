"""RandAugment and random erasing, as MAE fine-tunes with them, from a sample's own draws.

Axes: S side of the square picture; h, w height and width of a rectangle in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import PIL.Image
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor

from mmssl.draws import Draws

Arguments = tuple[float, ...]

_LAYERS, _PROBABILITY, _SPREAD = 2, 0.5, 0.5  # timm's rand-m9-mstd0.5-inc1


def _enhanced(level: float, sign: int) -> Arguments:
    return (max(0.1, 1.0 + sign * (level * 0.9)),)  # 1 is no change


#: What a level in [0, 1] and a sign (-1, 1) mean to each of timm's operations, as in its ``LEVEL_TO_ARG``.
OPERATIONS: dict[str, Callable[[float, int], Arguments]] = {
    "AutoContrast": lambda level, sign: (),
    "Equalize": lambda level, sign: (),
    "Invert": lambda level, sign: (),
    "Rotate": lambda level, sign: (sign * (level * 30.0),),  # degrees
    "PosterizeIncreasing": lambda level, sign: (max(1, 4 - int(level * 4)),),  # bits kept; of none no picture is left
    "SolarizeIncreasing": lambda level, sign: (256 - int(level * 256),),  # inverted from this value on
    "SolarizeAdd": lambda level, sign: (int(level * 110),),
    "ColorIncreasing": _enhanced,
    "ContrastIncreasing": _enhanced,
    "BrightnessIncreasing": _enhanced,
    "SharpnessIncreasing": _enhanced,
    "ShearX": lambda level, sign: (sign * (level * 0.3),),
    "ShearY": lambda level, sign: (sign * (level * 0.3),),
    "TranslateXRel": lambda level, sign: (sign * (level * 0.45),),  # part of the side
    "TranslateYRel": lambda level, sign: (sign * (level * 0.45),),
}
_NAMES = tuple(OPERATIONS)


@dataclass(frozen=True)
class RandAugment:
    """Two random operations on colour or place, each with probability 1/2 (Cubuk et al. 2020).

    The operations are timm's, on Pillow pictures; what is drawn is drawn as ``rand-m<magnitude>-mstd0.5-inc1`` does,
    but from ``Draws``, of which every picture takes 10.

    Args:
        magnitude: mean strength, from 0 to 10, of a normal distribution of deviation 0.5.
        fill: the colour of what comes in from outside the picture, 0 to 255.

    Raises:
        ValueError: for a magnitude outside of 0 to 10.
    """

    magnitude: float
    fill: tuple[int, int, int] = (128, 128, 128)

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"rand_augment is {self.magnitude}; give a magnitude up to 10, or 0 for none")

    def chosen(self, draws: Draws) -> list[tuple[str, Arguments]]:
        """The operations for one picture, in order: name and arguments."""
        said = []
        for which, applied, radius, angle, sign in draws.uniform(5 * _LAYERS).reshape(_LAYERS, 5).tolist():
            if applied >= _PROBABILITY:
                continue
            name = _NAMES[int(which * len(_NAMES))]
            normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)  # Box and Muller
            level = min(max(self.magnitude + _SPREAD * normal, 0.0), 10.0) / 10
            said.append((name, OPERATIONS[name](level, 1 if sign < 0.5 else -1)))
        return said

    def __call__(self, pixels: UInt8[Tensor, "3 S S"], draws: Draws) -> UInt8[Tensor, "3 S S"]:
        """The changed picture, or the same one."""
        chosen = self.chosen(draws)
        if not chosen:
            return pixels
        picture = PIL.Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        for name, arguments in chosen:
            operation = cast(Callable[..., PIL.Image.Image], NAME_TO_OP[name])
            picture = operation(picture, *arguments, fillcolor=self.fill, resample=PIL.Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@dataclass(frozen=True)
class RandomErasing:
    """A rectangle of noise in part of the pictures (Zhong et al. 2020).

    The rectangle is drawn as timm's ``RandomErasing`` draws it: 2 % to a third of the area, height / width from 0.3 to
    1 / 0.3, ten tries.  Its pixels are normal around ``mean`` with deviation ``std`` (timm's mode ``pixel``), but whole
    numbers from 0 to 255, as this is done before pictures are normalised.

    Args:
        probability: of a picture to be changed.
        mean, std: of the noise in the three channels, for pixels from 0 to 1.

    Raises:
        ValueError: for a probability that is none.
    """

    probability: float
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"random_erasing is {self.probability}; give a probability, or 0 for none")

    def box(self, side: int, draws: Draws) -> tuple[int, int, int, int] | None:
        """(top, left, height, width) of what is erased, if anything is."""
        numbers = draws.uniform(23).tolist()
        if numbers[0] >= self.probability:
            return None
        for part, aspect in zip(numbers[1:21:2], numbers[2:21:2], strict=True):
            area = (0.02 + (1 / 3 - 0.02) * part) * side * side
            ratio = math.exp(math.log(0.3) * (1 - 2 * aspect))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < side and w < side:
                return int(numbers[21] * (side - h + 1)), int(numbers[22] * (side - w + 1)), h, w
        return None

    def __call__(self, pixels: UInt8[Tensor, "3 S S"], draws: Draws) -> UInt8[Tensor, "3 S S"]:
        """The changed picture, or the same one."""
        box = self.box(pixels.shape[1], draws)
        if box is None:
            return pixels
        top, left, h, w = box
        noise = _normal(h * w * 3, draws).reshape(h, w, 3) * np.multiply(self.std, 255) + np.multiply(self.mean, 255)
        pixels = pixels.clone()
        pixels[:, top : top + h, left : left + w] = torch.from_numpy(
            noise.round().clip(0, 255).astype(np.uint8)
        ).permute(2, 0, 1)
        return pixels


def _normal(n: int, draws: Draws) -> NDArray[np.float64]:
    """n numbers of the standard normal distribution (Box and Muller)."""
    half = (n + 1) // 2
    radius, angle = np.sqrt(-2 * np.log1p(-draws.uniform(half))), 2 * np.pi * draws.uniform(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


Augment = RandAugment | RandomErasing
