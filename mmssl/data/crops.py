"""Crops: which part of a picture is taken, said in numbers before the picture is decoded, and taken afterwards.

Axes: H, W height and width of a picture; S side of the square that comes out.
Tensors are [3, H, W] with channels-last strides: that is how decoders write and the fastest way to resize uint8.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from mmssl.draws import Draws


class View(NamedTuple):
    """A rectangle of a picture, resized, of which the central square is cut and perhaps mirrored.

    The picture's own size stands here too, since it may be decoded at a smaller one.
    """

    picture: tuple[int, int]  # height and width
    box: tuple[int, int, int, int]  # top, left, height and width, in the picture's pixels
    size: tuple[int, int]  # to which the box is resized: height and width
    side: int  # of the square
    flip: bool = False

    @property
    def shrink(self) -> int:
        """1, 2, 4 or 8: decoded at one over this, the box still has as many pixels as it needs."""
        ratio = min(self.box[2] / self.size[0], self.box[3] / self.size[1])
        return 8 if ratio >= 8 else 4 if ratio >= 4 else 2 if ratio >= 2 else 1

    def take(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 S S"]:
        """This part of the decoded picture, of whatever size it was decoded to."""
        top, left, height, width = self.box
        bottom, right = top + height, left + width
        if pixels.shape[:2] != self.picture:
            # Edges fall on whole pixels of the smaller picture: off by half of one (in a mirrored picture, whose
            # pixels are counted from its other end, by up to one and a half), and by no more in what comes out.
            n, (h, w) = self.shrink, pixels.shape[:2]
            top, left = min(round(top / n), h - 1), min(round(left / n), w - 1)
            bottom, right = max(top + 1, round(bottom / n)), max(left + 1, round(right / n))
        # In one piece: copied so, a rectangle costs less than torch's own copy of it.
        part = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])[None]).permute(0, 3, 1, 2)
        part = (part if part.shape[2:] == self.size else _resize(part, self.size))[0]
        if self.size != (self.side, self.side):
            top, left = middle(part.shape[1], self.side), middle(part.shape[2], self.side)
            part = part[:, top : top + self.side, left : left + self.side]
        return part.flip(-1) if self.flip else part


def _resize(picture: UInt8[Tensor, "1 3 H W"], size: tuple[int, int]) -> UInt8[Tensor, "1 3 h w"]:
    """``interpolate(mode="bicubic", antialias=True)``, but channels-last.

    Of one picture alone interpolate makes contiguous channels, which takes a quarter longer, and stacking such pictures
    again costs more.  The operator below it writes to the strides that it is given.
    """
    resized = torch.empty((1, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    torch.ops.aten._upsample_bicubic2d_aa.out(picture, size, False, None, None, out=resized)
    return resized


def middle(length: int, side: int) -> int:
    """Where the central ``side`` pixels of ``length`` begin, as torchvision's ``CenterCrop`` has it."""
    return round((length - side) / 2)


@runtime_checkable
class Crop(Protocol):
    """How pictures of any size become squares of one."""

    def view(self, height: int, width: int, draws: Draws) -> View:
        """The part to take of a picture of this size."""
        ...


def _check(img_size: int) -> None:
    if img_size < 1:
        raise ValueError(f"img_size is {img_size}; give the side of the square in pixels, at least 1")


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a random rectangle, resize it (bicubic) to a square, mirror half of the time: MAE's only augmentation.

    The rectangle is drawn as torchvision's ``RandomResizedCrop`` draws it (ten tries, then the largest central
    crop of an allowed ratio), from ``Draws``; every call takes 23 draws, so later draws do not depend on the tries.

    Args:
        img_size: side of the square, in pixels.
        scale: smallest and largest part of the picture's area (He et al. 2022: 0.2 to 1).
        ratio: smallest and largest width / height of the rectangle.
        flip: mirror horizontally with probability 1/2; switch off where left and right matter, as for letters.

    Raises:
        ValueError: in the constructor, for a size or range that makes no sense.
    """

    img_size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        _check(self.img_size)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; give (smallest, largest) parts of the area within (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}; give (smallest, largest) width / height above 0")

    def box(self, height: int, width: int, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the rectangle, from 22 numbers in [0, 1)."""
        numbers: list[float] = draws.tolist()
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(10):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * numbers[2 * attempt])
            aspect = math.exp(low + (high - low) * numbers[2 * attempt + 1])
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(numbers[20] * (height - h + 1)), int(numbers[21] * (width - w + 1)), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def view(self, height: int, width: int, draws: Draws) -> View:
        numbers = draws.uniform(23)
        box, side = self.box(height, width, numbers), self.img_size
        return View((height, width), box, (side, side), side, self.flip and bool(numbers[22] < 0.5))


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resize the short side (bicubic) to ``img_size`` pixels, cut the central square: for evaluation, draws nothing.

    Sizes are rounded as torchvision's ``Resize`` and ``CenterCrop`` round them: timm's evaluation transforms and the
    image processors of transformers give the same picture.  Of a picture more than eight times as long as wide only the
    central part is resized, which moves nothing: the rest would be cut anyway, and resizing a line of a million pixels
    takes all memory.

    Raises:
        ValueError: in the constructor, for a size below 1.
    """

    img_size: int

    def __post_init__(self) -> None:
        _check(self.img_size)

    def view(self, height: int, width: int, draws: Draws) -> View:
        side, short = self.img_size, min(height, width)
        h, w = (self._kept(n, short) for n in (height, width))
        size = (int(side * h / short), int(side * w / short))
        return View((height, width), ((height - h) // 2, (width - w) // 2, h, w), size, side)

    def _kept(self, length: int, short: int) -> int:
        """How many pixels of a side are resized: about eight times the short one, centred to the pixel as the whole is.

        For that the lengths before resizing are alike modulo 2, and those after it modulo 4, for halves are rounded to
        even numbers.
        """
        whole, least = int(self.img_size * length / short), 8 * short
        some = range(least + (length - least) % 2, length, 2)
        return next((n for n in some if (whole - int(self.img_size * n / short)) % 4 == 0), length)
