"""Pictures: from a shard's bytes to uint8 tensors of one size.

Axes: B pictures of a batch; H, W height and width of a picture; S side of the square that comes out.
Tensors are [3, H, W] with channels-last strides: that is how decoders write and the fastest way to resize uint8.
"""

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from mmssl.data.crops import Crop
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
    header = _read_header(data, max_pixels)
    pixels = _decode_with_pillow(data, max_pixels) if header is None else _decode_jpeg(data, header, 1, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W], strides stay


def load_image(data: bytes, crop: Crop, draws: Draws, max_pixels: int = 64_000_000) -> UInt8[Tensor, "3 S S"]:
    """Decode a picture and crop it: what ``crop`` takes of ``decode_image``, but faster.

    The crop is drawn from the picture's size in the header.  If it is two, four or eight times as large as the square
    that it becomes, libjpeg-turbo decodes at half, a quarter or an eighth of the size, which averages pixels (a smaller
    inverse DCT) before the bicubic resizing does the rest.  The box is the same; its edges are rounded to pixels of the
    smaller picture.  docs/speed.md compares the results.

    Raises:
        BadSample: as :func:`decode_image`.
    """
    header = _read_header(data, max_pixels)
    if header is None:
        pixels = _decode_with_pillow(data, max_pixels)
        view = crop.view(pixels.shape[0], pixels.shape[1], draws)
    else:
        view = crop.view(header.height, header.width, draws)
        pixels = _decode_jpeg(data, header, view.shrink, max_pixels)
    return view.take(pixels)


def rgb_pixels(image: PIL.Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an opened picture as :func:`decode_image` would give them: RGB, upright, over white.

    Raises:
        BadSample: ``truncated`` or ``unreadable_image``.
    """
    try:
        return np.array(_to_rgb(PIL.ImageOps.exif_transpose(image)))
    except _PILLOW_ERRORS as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable_image"
        raise BadSample(reason, str(error)) from None


def stack(pictures: Sequence[UInt8[Tensor, "3 S S"]]) -> UInt8[Tensor, "B 3 S S"]:
    """One batch, with channels-last strides as its pictures; in a loader's worker in the memory it is sent through."""
    first = pictures[0].permute(1, 2, 0)
    shape = (len(pictures), *first.shape)
    if get_worker_info() is None:
        batch = torch.empty(shape, dtype=torch.uint8)
    else:  # else the whole batch would be copied once more when it is sent
        shared = torch.UntypedStorage._new_shared(len(pictures) * first.numel())
        batch = torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)
    torch.stack([picture.permute(1, 2, 0) for picture in pictures], out=batch)
    return batch.permute(0, 3, 1, 2)  # [B, S, S, 3] -> [B, 3, S, S], strides stay


class _Header(NamedTuple):
    """Of a JPEG that libjpeg-turbo can decode: the size of the upright picture, and how it lies in the file."""

    height: int
    width: int
    orientation: int


def _read_header(data: bytes, max_pixels: int) -> _Header | None:
    """None where Pillow must decide: other formats, CMYK, damage that may be repaired."""
    if not data:
        raise BadSample("empty_image", "0 bytes")
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: a colour space that simplejpeg does not know
        if "remature end" in str(error):
            raise BadSample("truncated", str(error)) from None
        return None
    _check_size(width, height, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return None
    orientation = _jpeg_orientation(data)
    return _Header(width, height, orientation) if orientation >= 5 else _Header(height, width, orientation)


def _decode_jpeg(data: bytes, header: _Header, shrink: int, max_pixels: int) -> NDArray[np.uint8]:
    """Upright pixels, each side divided by ``shrink`` (1, 2, 4, 8) and rounded up; or Pillow's, at full size."""
    height, width = header[1::-1] if header.orientation >= 5 else header[:2]
    try:
        # Asking for at least this size gives just this size.
        pixels: NDArray[np.uint8] = (
            simplejpeg.decode_jpeg(data, colorspace="RGB")
            if shrink == 1
            else simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // shrink), min_width=-(-width // shrink))
        )
    except ValueError as error:
        if "remature end" in str(error):
            raise BadSample("truncated", str(error)) from None
        return _decode_with_pillow(data, max_pixels)
    return _upright(pixels, header.orientation) if header.orientation > 1 else pixels


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
