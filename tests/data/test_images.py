import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
import simplejpeg
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2
from toy_stream import jpeg

from mmssl.data.crops import Crop, RandomResizedCrop, ResizeCenterCrop
from mmssl.data.images import decode_image, load_image, stack
from mmssl.draws import Draws
from mmssl.types import BadSample


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    rough = np.random.default_rng(0).integers(0, 256, (5, 5, 4), np.uint8)
    return PIL.Image.fromarray(rough, "RGBA").resize(size, PIL.Image.Resampling.BICUBIC).convert(mode)


def encode(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def hwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def cropped(image: torch.Tensor, crop: Crop, draws: Draws) -> torch.Tensor:
    """What load_image has to equal: the crop of the whole decoded picture."""
    return crop.view(image.shape[1], image.shape[2], draws).take(hwc(image))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB."""
    return 10 * math.log10(255**2 / max(1e-9, float((a.double() - b.double()).square().mean())))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 40}, {"subsampling": 0}, {"mode": "L"}])
def test_jpegs_equal_pillows(options: dict[str, Any]) -> None:
    options = dict(options)
    data = encode(picture(options.pop("mode", "RGB")), "JPEG", **options)
    image = decode_image(data)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 30, 40)
    assert image.stride() == (1, 3 * 40, 3)
    assert np.abs(hwc(image).astype(int) - pillow(data)).max() <= 1


def test_cmyk() -> None:
    data = encode(picture("CMYK"), "JPEG", quality=100)
    np.testing.assert_array_equal(hwc(decode_image(data)), pillow(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_other_formats_equal_pillows(mode: str, format: str) -> None:
    data = encode(picture().convert(mode), format)
    np.testing.assert_array_equal(hwc(decode_image(data)), pillow(data))


def test_webp() -> None:
    data = encode(picture(), "WEBP", lossless=True)
    np.testing.assert_array_equal(hwc(decode_image(data)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = picture(mode)
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    expected = pixels[..., :3] * pixels[..., 3:] / 255 + 255 - pixels[..., 3:]
    assert np.abs(hwc(decode_image(encode(image, "PNG"))) - expected).max() <= 1


def test_transparent_palette() -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert hwc(decode_image(encode(image, "PNG", transparency=1))).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_sixteen_bits_lose_the_low_byte() -> None:
    values = np.array([[0, 255, 256, 65535, 0x80FF]], np.uint16)
    image = decode_image(encode(PIL.Image.fromarray(values), "PNG"))
    assert image[0].tolist() == image[2].tolist() == [[0, 0, 1, 255, 128]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(orientation: int, format: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), format, exif=exif)
    image = decode_image(data)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    assert np.abs(hwc(image).astype(int) - np.asarray(upright)).max() <= 1
    assert image.stride(0) == 1


def test_animation_gives_its_first_frame() -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert hwc(decode_image(data))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)


def test_bad_pictures_have_a_reason() -> None:
    bomb = encode(PIL.Image.new("1", (20_000, 20_000)), "PNG")
    big_jpeg = encode(PIL.Image.new("L", (9000, 9000)), "JPEG")
    photo, png = jpeg(0, (200, 200)), encode(picture(), "PNG")
    for data, reason in [
        (b"", "empty_image"),
        (b"<html>not found</html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) run", "not_an_image"),
        (bomb, "too_large"),
        (big_jpeg, "too_large"),
        (photo[: len(photo) // 2], "truncated"),
        (png[: len(png) - 30], "truncated"),
        (photo[:20], None),
        (b"\xff\xd8" + b"\0" * 500, None),
        (png[:40] + b"\xff" * 60 + png[100:], None),
    ]:
        with pytest.raises(BadSample) as caught:
            decode_image(data)
        assert reason in (None, caught.value.reason), caught.value
        for crop in (RandomResizedCrop(16), ResizeCenterCrop(8)):  # the second decodes at an eighth
            with pytest.raises(BadSample) as also:
                load_image(data, crop, Draws(0))
            assert also.value.reason == caught.value.reason


def test_mutated_pictures_decode_or_are_bad() -> None:
    rng = np.random.default_rng(0)
    sources = [jpeg(1), encode(picture(), "PNG"), encode(picture("P"), "GIF"), encode(picture(), "WEBP")]
    sources.append(encode(picture(), "TIFF"))
    for i in range(1000):
        data = bytearray(sources[i % len(sources)])
        for at in rng.integers(0, len(data), 1 + i % 4):
            data[at] = int(rng.integers(256))
        try:
            image = decode_image(bytes(data[: int(rng.integers(1, len(data)))] if i % 7 == 0 else data))
        except BadSample:
            continue
        assert image.shape[0] == 3


# ---- crops


def test_crops_are_distributed_as_torchvisions() -> None:
    """Place, size, area and ratio, for three shapes of picture; the middle one often needs the fallback."""
    for height, width in [(60, 80), (40, 200), (50, 50)]:
        ours = RandomResizedCrop(16)
        theirs = v2.RandomResizedCrop(16, scale=(0.2, 1.0))
        torch.manual_seed(0)
        image = torch.empty(3, height, width, dtype=torch.uint8)
        samples = 4000
        a = np.array([ours.box(height, width, Draws(i).uniform(23)) for i in range(samples)], float)
        drawn = [theirs.make_params([image]) for _ in range(samples)]
        b = np.array([(p["top"], p["left"], p["height"], p["width"]) for p in drawn], float)
        for x, y in [
            *((a[:, k], b[:, k]) for k in range(4)),
            (a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]),
            (np.log(a[:, 3] / a[:, 2]), np.log(b[:, 3] / b[:, 2])),
        ]:
            # Kolmogorov and Smirnov's distance of two samples; the bound is passed once in 10,000 times.
            grid = np.union1d(x, y)
            cdfs = [np.searchsorted(np.sort(v), grid, side="right") / samples for v in (x, y)]
            assert np.abs(cdfs[0] - cdfs[1]).max() < 2.23 * math.sqrt(2 / samples)


def test_crop_fallback_equals_torchvisions() -> None:
    for height, width in [(10, 400), (400, 10), (7, 8)]:
        never = np.full(23, 1 - 1e-9)  # the largest area at the widest ratio never fits
        theirs = v2.RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
        p = theirs.make_params([torch.empty(3, height, width, dtype=torch.uint8)])
        box = RandomResizedCrop(16, scale=(1.0, 1.0)).box(height, width, never)
        if (height, width) != (7, 8):
            assert box == (p["top"], p["left"], p["height"], p["width"])


def test_crop_resizes_as_torchvision_and_flips_half() -> None:
    image = decode_image(encode(picture(size=(80, 60)), "PNG"))
    crop = RandomResizedCrop(32)
    flips = 0
    for i in range(200):
        numbers = Draws(1, i).uniform(23)
        top, left, height, width = crop.box(60, 80, numbers)
        expected = v2.functional.resized_crop(
            image.contiguous(), top, left, height, width, [32, 32], v2.InterpolationMode.BICUBIC, antialias=True
        )
        flipped = numbers[22] < 0.5
        flips += flipped
        got = cropped(image, crop, Draws(1, i))
        assert got.shape == (3, 32, 32)
        assert got.dtype == torch.uint8
        assert (got.int() - (expected.flip(-1) if flipped else expected).int()).abs().max() <= 1
    assert 70 < flips < 130
    assert torch.equal(cropped(image, crop, Draws(5)), cropped(image, crop, Draws(5)))
    assert got.stride() == (1, 3 * 32, 3)  # as stack wants it


def test_a_crop_that_covers_the_picture_changes_nothing() -> None:
    image = decode_image(encode(picture(size=(24, 24)), "PNG"))
    crop = RandomResizedCrop(24, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert torch.equal(cropped(image, crop, Draws(0)), image)
    assert torch.equal(cropped(image, ResizeCenterCrop(24), Draws(0)), image)


@pytest.mark.parametrize(("height", "width", "side"), [(38, 403, 96), (395, 32, 32), (60, 595, 96), (22, 287, 96)])
def test_what_is_cut_from_a_long_picture_moves_nothing(height: int, width: int, side: int):
    """The outer parts are left out before resizing, and the rest lies where torchvision has it, to the pixel."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    picture = np.array(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC))
    view = ResizeCenterCrop(side).view(height, width, Draws(0))
    assert view.box[2:] != (height, width)
    whole = v2.Compose([v2.Resize(side, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(side)])
    apart = (view.take(picture).int() - whole(torch.from_numpy(picture).permute(2, 0, 1)).int()).abs()
    assert apart.max() <= 4
    assert apart.float().mean() < 0.5


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (79, 47), (47, 79), (101, 33), (32, 32), (7, 9), (500, 31)])
def test_center_crop_equals_torchvisions(size: tuple[int, int]) -> None:
    image = decode_image(encode(picture(size=size), "PNG"))
    got = cropped(image, ResizeCenterCrop(32), Draws(0))
    resized = v2.functional.resize(image.contiguous(), [32], v2.InterpolationMode.BICUBIC, antialias=True)
    assert got.shape == (3, 32, 32)
    expected = v2.functional.center_crop(resized, [32, 32])
    allowed = 4 if size == (500, 31) else 1  # of that one only the middle is resized
    assert (got.int() - expected.int()).abs().max() <= allowed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(0), "img_size is 0"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 0.2)), "scale is"),
        (lambda: RandomResizedCrop(8, scale=(0.0, 2.0)), "scale is"),
        (lambda: RandomResizedCrop(8, ratio=(2.0, 1.0)), "ratio is"),
        (lambda: ResizeCenterCrop(0), "img_size is 0"),
    ],
)
def test_constructors_refuse(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- decoding what a crop needs


CROPS = (RandomResizedCrop(48), RandomResizedCrop(24, (0.8, 1.0)), ResizeCenterCrop(20), ResizeCenterCrop(300))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("crop", CROPS)
def test_small_pictures_load_as_they_decode_and_crop(format: str, crop: Crop) -> None:
    """Where nothing is decoded smaller the result is the same to the bit, and so are the draws that follow."""
    data = encode(picture(size=(44, 35)), format)
    for i in range(30):
        one, two = Draws(i), Draws(i)
        assert torch.equal(load_image(data, crop, one), cropped(decode_image(data), crop, two))
        assert one.one() == two.one()


def scene(size: tuple[int, int]) -> PIL.Image.Image:
    """Smooth, not symmetric, with an edge: any other box, flip or turn is far from it."""
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    pixels = np.stack([200 * x, 220 * y, 120 + 100 * np.sin(9 * x + 4 * y)], -1)
    pixels[(x > 0.3) & (x < 0.5) & (y > 0.1)] += 40
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [290, 130, 70, 33])
def test_large_jpegs_are_decoded_smaller_and_look_the_same(
    side: int, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene((599, 431)), "JPEG", quality=95, exif=exif)
    sizes = set()
    real = simplejpeg.decode_jpeg

    def decode(*args: Any, **options: Any) -> np.ndarray:
        pixels = real(*args, **options)
        sizes.add(pixels.shape[:2])
        return pixels

    whole = decode_image(data)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    for crop in (RandomResizedCrop(side, (0.5, 1.0)), ResizeCenterCrop(side)):
        for i in range(8):
            got, expected = load_image(data, crop, Draws(i)), cropped(whole, crop, Draws(i))
            assert got.shape == (3, side, side)
            # An edge that moves by half a pixel is most of the difference.
            assert psnr(got, expected) > 27, (crop, i)
            assert (got.double() - expected.double()).mean((1, 2)).abs().max() < 2
    shrunk = {1: (431, 599), 2: (216, 300), 4: (108, 150), 8: (54, 75)}
    allowed = {290: [1], 130: [1, 2], 70: [2, 4], 33: [4, 8]}[side]
    assert sizes <= {shrunk[n] for n in allowed}
    assert shrunk[allowed[-1]] in sizes


def test_a_box_needs_its_pixels() -> None:
    """Decoded smaller, the box has at least the pixels of what comes out, and the largest such factor is taken."""
    for i in range(3000):
        height, width = Draws(i).integers(3000, 2) + 1
        for crop in (RandomResizedCrop(64), ResizeCenterCrop(100)):
            view = crop.view(int(height), int(width), Draws(1, i))
            top, left, h, w = view.box
            assert 0 <= top < top + h <= height
            assert 0 <= left < left + w <= width
            fits = [n for n in (1, 2, 4, 8) if h >= n * view.size[0] and w >= n * view.size[1]]
            assert view.shrink == max(fits, default=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 1), (1, 17), (2000, 9), (9, 2000)])
@pytest.mark.parametrize("side", [1, 2, 5, 32])
def test_odd_sizes(size: tuple[int, int], side: int) -> None:
    for format in ("JPEG", "PNG"):
        data = encode(picture(size=size), format)
        for crop in (RandomResizedCrop(side), RandomResizedCrop(side, (1.0, 1.0), (1.0, 1.0)), ResizeCenterCrop(side)):
            for i in range(4):
                assert load_image(data, crop, Draws(i)).shape == (3, side, side)


def test_a_line_of_a_million_pixels_does_not_take_all_memory() -> None:
    data = encode(PIL.Image.new("L", (1_000_000, 1), 200), "PNG")
    assert load_image(data, ResizeCenterCrop(224), Draws(0)).unique().tolist() == [200]


def test_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(size=(200, 100)), "JPEG")
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    with pytest.raises(BadSample, match="too_large: 200x100"):
        load_image(data, RandomResizedCrop(8), Draws(0), max_pixels=19_999)


class Stacked(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(3):
            yield stack([torch.full((5, 5, 3), 10 * i + k, dtype=torch.uint8).permute(2, 0, 1) for k in range(6)])


@pytest.mark.parametrize("workers", [0, 1])
def test_stacking(workers: int) -> None:
    for i, batch in enumerate(DataLoader(Stacked(), batch_size=None, num_workers=workers)):
        assert batch.shape == (6, 3, 5, 5)
        assert batch.stride() == (75, 1, 15, 3)
        assert (batch == torch.arange(10 * i, 10 * i + 6).view(6, 1, 1, 1)).all()


def test_a_worker_stacks_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [torch.zeros(5, 5, 3, dtype=torch.uint8).permute(2, 0, 1)] * 2
    assert not stack(pictures).is_shared()
    monkeypatch.setattr("mmssl.data.images.get_worker_info", lambda: "a worker")
    assert stack(pictures).is_shared()
