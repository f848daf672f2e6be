"""Every odd picture has the outcome that docs/bad-input.md lists, seen through the real path (see odd.py)."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from odd import DECODER, PHOTO, check_bad, encode, one_epoch, pairs_with
from pairs import TINY

import mmssl
from mmssl.types import Prepare


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A header that claims any size, with next to nothing behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + size + b"\0\x02\x02\x4c\x01\0;"


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def webp(width: int, height: int) -> bytes:
    """A canvas of any size around a small picture."""
    inner = encode(PIL.Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    canvas = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(encode(PIL.Image.new("RGB", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


SCREEN = encode(PIL.Image.effect_noise((96, 64), 60).convert("RGB"), "PNG")
BOMBS = {
    "png": png(20_000, 20_000),
    "gif": gif(20_000, 20_000),
    "bmp": bmp(20_000, 20_000),
    "ppm": b"P6\n20000 20000\n255\n" + bytes(100),
    "webp": webp(16_384, 16_384),  # the format's limit
    "jpg": jpeg_of(20_000, 20_000),
    "tiff": encode(PIL.Image.new("1", (20_000, 20_000)), "TIFF", compression="group4"),
}
SVG = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg><text>&x;</text></svg>'
BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty_image"),
    "an error page named jpg": (b"<html>404 Not Found</html>", "not_an_image"),
    "zeros": (bytes(4096), "not_an_image"),
    "svg with an external entity": (SVG, "not_an_image"),
    "pdf": (b"%PDF-1.7\n1 0 obj << /OpenAction << /S /Launch /F (touch canary) >> >> endobj", "not_an_image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch canary) (w) file\n", "not_an_image"),
    "eps with a windows header": (b"\xc5\xd0\xd3\xc6" + bytes(26) + b"%!PS-Adobe", "not_an_image"),
    "ico": (encode(PIL.Image.new("RGB", (16, 16)), "ICO"), "not_an_image"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "not_an_image"),
    "jpeg, first half": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "jpeg, all but the last 10 bytes": (PHOTO[:-10], "truncated"),
    "jpeg, start only": (PHOTO[:2], "not_an_image"),
    "png, first half": (SCREEN[: len(SCREEN) // 2], "truncated"),
    "png, header only": (SCREEN[:33], None),  # type: ignore[dict-item]
    "png without width": (png(0, 5), "not_an_image"),
    "png without height": (png(5, 0), "not_an_image"),
    "ppm without pixels": (b"P6\n0 0\n255\n", "not_an_image"),
    "gif without pixels": (gif(0, 0), "not_an_image"),
    "bmp without pixels": (bmp(0, 0), "not_an_image"),
    "jpeg without pixels": (jpeg_of(0, 0), "not_an_image"),
    "floating-point tiff": (encode(PIL.Image.new("F", (8, 8)), "TIFF"), "unreadable_image"),
    **{f"400 megapixels of {name}": (data, "too_large") for name, data in BOMBS.items()},
}


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.parametrize("objective", ["pairs", "images"])
def test_a_bad_picture_is_replaced_and_named(
    name: str, objective: str, tmp_path: Path, prepares: dict[str, Prepare], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, reason = BAD_PICTURES[name]
    outcome = one_epoch(tmp_path, pairs_with({"jpg": data, "txt": b"a red square"}), prepares[objective])
    if reason is None:  # Pillow words this differently from version to version
        reason = outcome.lines[0]["reason"]
        assert reason in ("truncated", "unreadable_image", "not_an_image")
    check_bad(outcome, tmp_path / "odd.tar", reason)
    assert not (tmp_path / "canary").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"odd.tar", "odd.tar.idx", "bad_samples.jsonl"}


def test_giant_pictures_are_refused_before_they_are_decoded() -> None:
    """In a process of its own: the memory it used at most does not grow by a part of what the pixels would take."""
    script = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_bad_pictures import BOMBS, PHOTO
from mmssl.data.images import decode_image
from mmssl.types import BadSample
decode_image(PHOTO)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in BOMBS.items():
    try:
        decode_image(data)
    except BadSample as error:
        assert error.reason == "too_large", (name, error)
    else:
        raise SystemExit(name)
    print(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "KiB")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    grown = {line.split()[0]: int(line.split()[1]) for line in ran.stdout.splitlines()}
    assert set(grown) == set(BOMBS)
    assert max(grown.values()) < 64 << 10, grown  # 20,000 x 20,000 x 3 bytes are 1.2 million KiB


def _accepted() -> dict[str, bytes]:
    rough = np.random.default_rng(0).integers(40, 216, (4, 4, 3), np.uint8)
    image = PIL.Image.fromarray(rough).resize((48, 32), PIL.Image.Resampling.BICUBIC)
    blank = PIL.Image.new("RGB", image.size, "green")
    sideways = PIL.Image.Exif()
    sideways[0x0112] = 6
    turned = image.transpose(PIL.Image.Transpose.ROTATE_90)  # which orientation 6 turns back
    return {
        "rgb": encode(image, "PNG"),
        "jpeg": encode(image, "JPEG", quality=95),
        "progressive jpeg": encode(image, "JPEG", quality=95, progressive=True),
        "jpeg with rubbish behind its end": encode(image, "JPEG", quality=95) + b"\0" * 100,
        "cmyk": encode(image.convert("CMYK"), "JPEG", quality=100),
        "palette": encode(image.quantize(256), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "exif-rotated jpeg": encode(turned, "JPEG", quality=95, exif=sideways),
        "exif-rotated png": encode(turned, "PNG", exif=sideways),
        "animated gif": encode(image.quantize(256), "GIF", save_all=True, append_images=[blank]),
        "animated webp": encode(image, "WEBP", save_all=True, append_images=[blank], lossless=True),
        "animated png": encode(image, "PNG", save_all=True, append_images=[blank]),
        "tiff of two pages": encode(image, "TIFF", save_all=True, append_images=[blank]),
        "bmp": encode(image, "BMP"),
        "ppm": encode(image, "PPM"),
    }


ACCEPTED = _accepted()


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_unusual_picture_is_the_same_picture(name: str, tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    """Whatever its encoding (and whatever its member is called), it comes out as the plain RGB picture does."""
    batches = []
    for data in (ACCEPTED["rgb"], ACCEPTED[name]):
        outcome = one_epoch(tmp_path / str(len(batches)), [("a.JPG", data)], prepares["images"])
        assert outcome.lines == []
        assert outcome.batch.notes == {}
        batches.append(outcome.batch)
    plain, other = (batch.image.pixels.int() for batch in batches if batch.image is not None)
    assert (plain - other).abs().float().mean() < 6
    assert plain.float().std() > 20


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "LA", "I"])
def test_grey_pictures_have_three_equal_channels(mode: str, tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    values = np.arange(32 * 32).reshape(32, 32) // 4
    if mode in ("I;16", "I"):
        image = PIL.Image.fromarray((values * 256).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = PIL.Image.fromarray(values.astype(np.uint8)).convert(mode)
    outcome = one_epoch(tmp_path, [("a.png", encode(image, "TIFF" if mode == "I" else "PNG"))], prepares["images"])
    assert outcome.batch.image is not None
    pixels = outcome.batch.image.pixels[0]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])
    assert pixels.float().mean() == pytest.approx(127.5, abs=20)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("train", [True, False])
def test_slivers_become_squares_without_giant_copies(
    size: tuple[int, int], train: bool, tmp_path: Path, tokenizer_path: str
) -> None:
    """Resizing the short side of 20,000 x 1 pixels to 32 would make a picture of 20 million pixels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    module = mmssl.MAE("vit_tiny_patch16_224", TINY, **DECODER)  # type: ignore[arg-type]
    data = encode(PIL.Image.new("RGB", size, "red"), "PNG")
    with Largest() as largest:
        outcome = one_epoch(tmp_path, [("a.png", data)], module.prepare(train))
    assert outcome.batch.image is not None
    assert outcome.batch.image.pixels.shape == (1, 3, 32, 32)
    assert outcome.batch.image.pixels[0, :, 5, 5].tolist() == [255, 0, 0]
    assert largest.elements < 3_000_000
