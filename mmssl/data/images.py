"""Pictures: from a shard's bytes to uint8 tensors of one size.

Axes: H, W height and width of a decoded picture; S side of the square that comes out.
Tensors are [3, H, W] with channels-last strides: that is how decoders write and the fastest way to resize uint8.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from mmssl.draws import Draws
from mmssl.types import BadSample

# Only formats that Pillow decodes itself: its EPS reader, for one, starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
_EXIF_ORIENTATION = 0x0112


def decode_image(data: bytes, max_pixels: int = 64_000_000) -> UInt8[Tensor, "3 H W"]:
    """Decode any common picture to RGB, its first frame, upright.

    Grey is repeated, CMYK and palettes are converted, 16-bit values lose their low byte, transparency is laid over
    white, EXIF orientation is applied.  JPEGs go through libjpeg-turbo, everything else through Pillow.

    Args:
        data: the file's bytes.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        BadSample: ``empty_image``, ``not_an_image``, ``too_large``, ``truncated`` or ``unreadable_image``.
    """
    if not data:
        raise BadSample("empty_image", "0 bytes")
    pixels = _decode_jpeg(data, max_pixels) if data[:2] == b"\xff\xd8" else None
    if pixels is None:
        pixels = _decode_with_pillow(data, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W], strides stay


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """The fast path; None where Pillow must decide (CMYK, progressive oddities, damage that can be repaired)."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        _check_size(width, height, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return None
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except (ValueError, KeyError) as error:  # KeyError: a colour space that simplejpeg does not know
        if "remature end" in str(error):
            raise BadSample("truncated", str(error)) from None
        return None
    orientation = _jpeg_orientation(data)
    if orientation > 1:
        pixels = _upright(pixels, orientation)
    return pixels


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 (upright) if there is none.  Walks the segments in front of the pixels."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xDA, 0xD9):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = PIL.Image.Exif()
            try:
                exif.load(data[at + 4 : at + 2 + length])
                orientation = exif.get(_EXIF_ORIENTATION, 1)
            except _PILLOW_ERRORS:  # a broken EXIF block does not make the picture bad
                return 1
            return orientation if orientation in range(1, 9) else 1
        at += 2 + length
    return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    # Orientations 5 to 8 have rows and columns swapped; the rest are mirrored on one axis or both.
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample("too_large", f"{width}x{height} has more than {max_pixels} pixels")


def _decode_with_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    try:
        with PIL.Image.open(BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size, max_pixels)
            return np.array(_to_rgb(PIL.ImageOps.exif_transpose(image)))
    except PIL.UnidentifiedImageError:
        raise BadSample("not_an_image", f"{len(data)} bytes beginning with {data[:8]!r}") from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise BadSample("too_large", str(error)) from None
    except _PILLOW_ERRORS as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable_image"
        raise BadSample(reason, str(error)) from None


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "F":
        raise BadSample("unreadable_image", "floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them to 255
        return PIL.Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _check(img_size: int) -> None:
    if img_size < 1:
        raise ValueError(f"img_size is {img_size}; give the side of the square in pixels, at least 1")


def _resize(image: UInt8[Tensor, "3 H W"], size: list[int]) -> UInt8[Tensor, "3 h w"]:
    return tv.resize(image, size, interpolation=tv.InterpolationMode.BICUBIC, antialias=True)


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
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(10):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * float(draws[2 * attempt]))
            aspect = math.exp(low + (high - low) * float(draws[2 * attempt + 1]))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(float(draws[20]) * (height - h + 1)), int(float(draws[21]) * (width - w + 1)), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image: UInt8[Tensor, "3 H W"], draws: Draws) -> UInt8[Tensor, "3 S S"]:
        numbers = draws.uniform(23)
        top, left, height, width = self.box(image.shape[1], image.shape[2], numbers)
        image = image[:, top : top + height, left : left + width]
        if (height, width) != (self.img_size, self.img_size):
            image = _resize(image, [self.img_size, self.img_size])
        return image.flip(-1) if self.flip and numbers[22] < 0.5 else image


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resize the short side (bicubic) to ``img_size`` pixels, cut the central square: for evaluation, draws nothing.

    Raises:
        ValueError: in the constructor, for a size below 1.
    """

    img_size: int

    def __post_init__(self) -> None:
        _check(self.img_size)

    def __call__(self, image: UInt8[Tensor, "3 H W"], draws: Draws) -> UInt8[Tensor, "3 S S"]:
        side = self.img_size
        _, height, width = image.shape
        if min(height, width) != side:
            scale = side / min(height, width)
            image = _resize(image, [max(side, round(height * scale)), max(side, round(width * scale))])
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        return image[:, top : top + side, left : left + side]
