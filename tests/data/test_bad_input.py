"""Every odd sample has the outcome that docs/bad-input.md lists, seen through the real path: a tar, a ShardSet, a
TrainStream, and the prepare of a real objective."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch
from lightning import Trainer
from pairs import TINY, caption, picture

import mmssl
from mmssl.data.budget import Budget, TooManyBadSamples
from mmssl.data.datamodule import DataModule
from mmssl.data.loader import Loader
from mmssl.data.shards import ShardSet
from mmssl.data.stream import EvalSet, Source, TrainStream
from mmssl.data.tar import ShardError
from mmssl.training.callbacks.predictions import Predictions
from mmssl.types import Batch, Prepare

SAMPLES = 10
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4, "crop_scale": (1.0, 1.0)}


@pytest.fixture(scope="module")
def prepares(tokenizer_path: str) -> dict[str, Prepare]:
    """The loader's halves of three real, tiny objectives."""
    pairs = mmssl.MMM(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=32, **DECODER)  # type: ignore[arg-type]
    images = mmssl.MAE("vit_tiny_patch16_224", TINY, flip=False, **DECODER)  # type: ignore[arg-type]
    texts = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=32)
    return {"pairs": pairs.prepare(True), "images": images.prepare(True), "texts": texts.prepare(True)}


def tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


class Outcome(NamedTuple):
    batch: Batch
    lines: list[dict[str, Any]]  # of bad_samples.jsonl
    keys: list[str]


def one_epoch(folder: Path, members: list[tuple[str, bytes]], prepare: Prepare, **options: Any) -> Outcome:
    """One batch that holds every sample of a shard once."""
    shards = ShardSet(tar(folder / "odd.tar", members))
    listed = folder / "bad_samples.jsonl"
    data = TrainStream(
        [Source("train", shards)],
        prepare,
        seed=3,
        batch_size=len(shards),
        lanes=1,
        bad_samples=str(listed),
        **options,
    )
    batch = data.batch(0)
    lines = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    return Outcome(batch, lines, [key.rpartition("/")[2] for key in batch.keys])


def pairs_with(odd: dict[str, bytes], at: int = 3) -> list[tuple[str, bytes]]:
    """Ten pairs, of which one has these members instead of its own."""
    members = []
    for i in range(SAMPLES):
        own = {"png": picture(i), "txt": caption(i).encode()} if i != at else odd
        members += [(f"{i:06d}.{extension}", content) for extension, content in own.items()]
    return members


def check_bad(outcome: Outcome, shard: Path, reason: str, key: str = "000003") -> str:
    """Replaced by another sample, counted in the batch's notes, named once in the file; returns the line's detail."""
    (line,) = outcome.lines
    assert (line["shard"], line["key"], line["reason"], line["epoch"]) == (str(shard), key, reason, 0)
    assert outcome.batch.notes == {f"bad/{reason}": 1}
    assert key not in outcome.keys
    assert len(outcome.keys) == SAMPLES  # the batch stays whole
    assert len(set(outcome.keys)) == SAMPLES - 1  # one sample stands for the bad one
    return str(line["detail"])


# ---- pictures


def encode(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


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


PHOTO = encode(PIL.Image.effect_noise((96, 64), 60).convert("RGB"), "JPEG", quality=90)
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
from test_bad_input import BOMBS, PHOTO
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


# ---- texts

LONG = " ".join(caption(i) for i in range(20_000)).encode()[: 1 << 20]
BAD_TEXTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("txt", b"", "no_text"),
    "blank": ("txt", b" \t\r\n \xc2\xa0", "no_text"),
    "only control characters": ("txt", b"\x01\x02\x7f", "no_text"),
    "only a byte order mark": ("txt", b"\xef\xbb\xbf", "no_text"),
    "zeros, as a crashed disk leaves them": ("txt", bytes(512), "nul_in_text"),
    "a nul inside": ("txt", b"a red \0 square", "nul_in_text"),
    "latin-1": ("txt", "ein grünes Quadrat".encode("latin-1"), "not_utf8"),
    "utf-16": ("txt", "a red square".encode("utf-16"), "not_utf8"),
    "a surrogate in utf-8": ("txt", b"a \xed\xa0\x80 square", "not_utf8"),
    "a cut character": ("txt", "a red ü".encode()[:-1], "not_utf8"),
    "a jpeg": ("txt", PHOTO, "not_utf8"),
    "json: nothing": ("json", b"", "not_json"),
    "json: cut": ("json", b'{"caption": "a red', "not_json"),
    "json: latin-1": ("json", '{"caption": "grün"}'.encode("latin-1"), "not_utf8"),
    "json: a lone surrogate": ("json", rb'{"caption": "a \ud800 square"}', "not_utf8"),
    "json: a nul": ("json", rb'{"caption": "a \u0000 square"}', "nul_in_text"),
    "json: nested 100,000 deep": ("json", b'{"a":' * 100_000, "not_json"),
    "json: a number of 5,000 digits": ("json", b'{"caption": "x", "n": ' + b"1" * 5000 + b"}", "not_json"),
    "json: a list": ("json", b'["a red square"]', "no_text"),
    "json: null": ("json", b"null", "no_text"),
    "json: no caption": ("json", b'{"url": "x"}', "no_text"),
    "json: caption is null": ("json", b'{"caption": null}', "no_text"),
    "json: caption is a number": ("json", b'{"caption": 7}', "no_text"),
    "json: caption is a list": ("json", b'{"caption": ["a red square"]}', "no_text"),
    "json: caption is an object": ("json", b'{"caption": {"en": "a red square"}}', "no_text"),
    "json: caption is blank": ("json", b'{"caption": "  "}', "no_text"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
@pytest.mark.parametrize("objective", ["pairs", "texts"])
def test_a_bad_text_is_replaced_and_named(
    name: str, objective: str, tmp_path: Path, prepares: dict[str, Prepare]
) -> None:
    extension, data, reason = BAD_TEXTS[name]
    outcome = one_epoch(tmp_path, pairs_with({"png": picture(3), extension: data}), prepares[objective])
    detail = check_bad(outcome, tmp_path / "odd.tar", reason)
    assert detail
    assert len(detail) < 300


GOOD_TEXTS: dict[str, tuple[str, bytes]] = {
    "a byte order mark": ("txt", b"\xef\xbb\xbfa red square with blue paper under it"),
    "windows line ends": ("txt", b"\r\na red square\r\nwith blue paper under it\r\n"),
    "control characters": ("txt", b"a red\x01 square\x7f with blue paper under\x1b it"),
    "json": ("json", b'{"caption": "a red square with blue paper under it"}'),
    "json with a byte order mark": ("json", b'\xef\xbb\xbf{"caption": "a red square with blue paper under it"}'),
    "json with text instead of a caption": ("json", b'{"text": "a red square with blue paper under it"}'),
    "json with an empty caption and a text": (
        "json",
        b'{"caption": "", "text": "a red square with blue paper under it"}',
    ),
}


@pytest.mark.parametrize("name", GOOD_TEXTS)
def test_an_unusual_text_is_the_same_text(name: str, tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    plain = one_epoch(tmp_path / "a", [("a.txt", b"a red square with blue paper under it")], prepares["texts"])
    extension, data = GOOD_TEXTS[name]
    odd = one_epoch(tmp_path / "b", [(f"a.{extension}", data)], prepares["texts"])
    assert odd.lines == []
    assert plain.batch.text is not None
    assert odd.batch.text is not None
    assert torch.equal(plain.batch.text.input_ids, odd.batch.text.input_ids)
    assert torch.equal(plain.batch.text.labels, odd.batch.text.labels)


def test_a_caption_of_a_megabyte_gives_a_window(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    for objective in ("pairs", "texts"):
        outcome = one_epoch(tmp_path / objective, pairs_with({"png": picture(3), "txt": LONG}), prepares[objective])
        assert outcome.lines == []
        assert "000003" in outcome.keys
        text = outcome.batch.text
        assert text is not None
        at = outcome.keys.index("000003")
        assert text.cu_seqlens.diff()[at] == 32  # max_tokens


# ---- members and keys


def test_keys_and_members_of_every_kind(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    """What becomes of odd names, to the sample; each line says what docs/bad-input.md says."""
    image, text = picture(0), b"a red square"
    members = [
        ("plain.png", image),
        ("upper.PNG", image),  # extensions have no case
        ("far.png", image),  # its text comes at the end
        ("again.png", image),  # twice the same key, neighbours: two samples
        ("again.txt", b"a red square"),
        ("again.png", picture(1)),
        ("again.txt", b"a blue square"),
        ("unknown.xyz", b"?"),  # a sample without a picture
        ("dots.v1.png", image),  # a key ends at the first dot: this member's extension is "v1.png"
        ("dots.v1.txt", text),
        ("README", b"no extension, belongs to no sample"),
        ("plain.txt", text),
        ("upper.Txt", text),
        ("$(touch canary);`touch canary`.png", image),
        ("$(touch canary);`touch canary`.txt", text),
        ("lonely.txt", text),
        ("single.png", image),
        ("plain.png", picture(2)),  # the same key again, far apart, and only half of it
        ("far.txt", text),
    ]
    outcome = one_epoch(tmp_path, members, prepares["pairs"])
    bad = {(line["key"], line["reason"], line["detail"]) for line in outcome.lines}
    assert bad == {
        ("unknown", "no_image", "members xyz"),
        ("dots", "no_image", "members v1.png, v1.txt"),
        ("lonely", "no_image", "members txt"),
        ("single", "no_text", "members png"),
        ("plain", "no_text", "members png"),  # the second one
    }
    assert outcome.batch.notes == {"bad/no_image": 3, "bad/no_text": 2}
    good = {"plain", "upper", "far", "again", "$(touch canary);`touch canary`"}
    assert set(outcome.keys) <= good
    assert len(outcome.keys) == 11
    shards = ShardSet(str(tmp_path / "odd.tar"))
    assert shards.skipped == {"no extension": 1}
    again = [s.members for s in map(shards.read, range(len(shards))) if s.key == "again"]
    assert [m["txt"] for m in again] == [b"a red square", b"a blue square"]
    assert [m["png"] for m in again] == [image, picture(1)]


@pytest.mark.parametrize("key", ["two\nlines", 'quo"te', "not utf-8 \udcff", "x" * 300, "a b/c d/e f", "ü\u202e"])
def test_any_key_can_be_named_in_the_file(key: str, tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    members = [*pairs_with({"png": picture(3), "txt": b"a red square"}), (f"{key}.png", b"no"), (f"{key}.txt", b"x")]
    outcome = one_epoch(tmp_path, members, prepares["pairs"])
    (line,) = outcome.lines
    assert (line["key"], line["reason"]) == (key, "not_an_image")


def test_predictions_name_keys_that_are_not_utf8(tmp_path: Path, tokenizer_path: str) -> None:
    shard = tar(tmp_path / "a.tar", [(f"{i}\udcff😀.txt", caption(i).encode()) for i in range(4)])
    module = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=32)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, callbacks=[Predictions()], default_root_dir=str(tmp_path))
    trainer.predict(module, DataModule("none.tar", val=shard, batch_size=4, num_workers=0))
    lines = (tmp_path / "predictions" / "words-0.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == [f"a.tar/{i}\udcff😀" for i in range(4)]


def test_a_txt_counts_even_beside_a_better_json(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    odd = {"png": picture(3), "json": b'{"caption": "a red square"}', "txt": b" "}
    check_bad(one_epoch(tmp_path, pairs_with(odd), prepares["pairs"]), tmp_path / "odd.tar", "no_text")


def test_all_keys_with_dots_are_refused_with_the_extensions_found(tmp_path: Path, tokenizer_path: str) -> None:
    path = tar(tmp_path / "dots.tar", [(f"img.{i}.{x}", b"?") for i in range(3) for x in ("jpg", "txt")])
    with pytest.raises(ShardError, match=r"dots\.tar: has no image and no text \(found: 0\.jpg, 0\.txt, 1\.jpg"):
        _fit(DataModule(path, batch_size=1, num_workers=0), tmp_path, tokenizer_path)


def test_images_alone_where_pairs_are_needed(tmp_path: Path, tokenizer_path: str) -> None:
    whole = tar(tmp_path / "a.tar", pairs_with({}))
    alone = tar(tmp_path / "b.tar", [(f"{i}.png", picture(i)) for i in range(4)])
    with pytest.raises(ShardError, match=r"b\.tar: has no text \(found: png\); MMM needs image and text") as caught:
        _fit(DataModule([whole, alone], batch_size=4, num_workers=0), tmp_path, tokenizer_path)
    assert "\n" not in str(caught.value)


def test_keys_that_dots_make_one_are_told(tmp_path: Path, tokenizer_path: str) -> None:
    """The members of a.v2 belong to sample a, where nobody reads them."""
    members = [*pairs_with({}), ("000000.v2.png", picture(0)), ("000000.v2.txt", b"x"), ("README", b"x")]
    data = DataModule(tar(tmp_path / "a.tar", members), batch_size=4, num_workers=0)
    told = r"not read: 1 x no extension, 1 x \.v2\.png \(a key ends at the first dot of a name\), 1 x \.v2\.txt"
    with pytest.warns(UserWarning, match=told):
        _fit(data, tmp_path, tokenizer_path)


def test_one_bad_json_at_the_beginning_stops_no_run(tmp_path: Path, tokenizer_path: str) -> None:
    members = [(f"{i}.png", picture(i)) for i in range(10)]
    members += [(f"{i}.json", json.dumps({"caption": caption(i)}).encode() if i else b"{}") for i in range(10)]
    _fit(DataModule(tar(tmp_path / "a.tar", members), batch_size=10, num_workers=0), tmp_path, tokenizer_path)
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert {(line["key"], line["reason"]) for line in map(json.loads, lines)} == {("0", "no_text")}


def _fit(data: Any, folder: Path, tokenizer: str) -> None:
    module = mmssl.MMM(tokenizer, "vit_tiny_patch16_224", TINY, max_tokens=32, **DECODER)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(**quiet, enable_checkpointing=False, default_root_dir=str(folder), max_steps=1).fit(module, data)


# ---- shards without samples


NOTHING: dict[str, tuple[bytes, str]] = {
    "0 bytes": (b"", r"odd\.tar: is empty \(0 bytes\)"),
    "only an end mark": (bytes(10240), r"odd\.tar: holds no sample \(found: nothing\)"),
    "half an end mark": (bytes(512), r"odd\.tar: holds no sample"),
    "less than a block": (bytes(100), r"odd\.tar: cut off at byte 100"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_an_empty_shard_is_refused(name: str, tmp_path: Path) -> None:
    data, message = NOTHING[name]
    whole = tar(tmp_path / "whole.tar", pairs_with({}))
    (tmp_path / "odd.tar").write_bytes(data)
    with pytest.raises(ShardError, match=message) as caught:
        ShardSet([whole, str(tmp_path / "odd.tar")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("patterns", [[], [""], "", ["nothing-*.tar"], ["{}.tar"]])
def test_zero_shards_are_refused(patterns: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no shard|not found"):
        ShardSet(patterns)


def test_a_named_pipe_is_refused_and_nothing_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ShardError, match=r"a\.tar: .*not a regular file"):
        ShardSet(str(tmp_path / "a.tar"))


# ---- substitutes and budget


def test_substitutes_are_the_same_in_every_run_and_counted_by_reason(
    tmp_path: Path, prepares: dict[str, Prepare]
) -> None:
    members = pairs_with({"png": b"no", "txt": b"x"})
    members = [(n, b"" if n == "000007.txt" else b"\xff" if n == "000008.txt" else c) for n, c in members]
    first, second = (one_epoch(tmp_path / n, members, prepares["pairs"]) for n in "ab")
    assert first.keys == second.keys
    assert first.batch.notes == second.batch.notes == {"bad/not_an_image": 1, "bad/no_text": 1, "bad/not_utf8": 1}
    assert {(line["key"], line["reason"]) for line in first.lines} == {
        ("000003", "not_an_image"),
        ("000007", "no_text"),
        ("000008", "not_utf8"),
    }
    assert first.batch.text is not None
    assert second.batch.text is not None
    assert torch.equal(first.batch.text.input_ids, second.batch.text.input_ids)


def test_where_nothing_is_good_the_shard_and_its_reason_are_named(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    members = [(f"{i}.{x}", b"<html>" if x == "jpg" else b"text") for i in range(30) for x in ("jpg", "txt")]
    with pytest.raises(TooManyBadSamples, match=r"16 samples in a row .*; worst shards: .*odd\.tar: 16 x not_an_image"):
        one_epoch(tmp_path, members, prepares["pairs"])


def test_over_the_budget_the_run_stops_and_names_the_worst_shard(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    members = [
        (f"{i}.{x}", b"" if x == "txt" and i % 2 else picture(i) if x == "png" else b"a red square")
        for i in range(40)
        for x in ("png", "txt")
    ]
    shards = ShardSet(
        [
            tar(tmp_path / "whole.tar", pairs_with({"png": picture(3), "txt": b"a red square"})),
            tar(tmp_path / "odd.tar", members),
        ]
    )
    listed = str(tmp_path / "bad_samples.jsonl")
    data = TrainStream([Source("a", shards)], prepares["pairs"], seed=0, batch_size=10, lanes=1, bad_samples=listed)
    batches = Loader(data, workers=0, budget=Budget(0.01, listed))
    with pytest.raises(TooManyBadSamples) as caught:
        deque(batches, 0)  # endless, but for the error
    message = str(caught.value)
    assert re.match(r"1\d of \d+ samples cannot be used, over the budget of 1\.00%; worst shards: ", message)
    assert f"{tmp_path}/odd.tar: 1" in message
    assert "whole.tar" not in message
    assert listed in message
    assert "\n" not in message


def test_in_evaluation_a_substitute_has_no_weight(tmp_path: Path, prepares: dict[str, Prepare]) -> None:
    shards = ShardSet(tar(tmp_path / "odd.tar", pairs_with({"png": b"no", "txt": b"x"})))
    listed = tmp_path / "bad_samples.jsonl"
    batch = EvalSet(shards, prepares["pairs"], seed=0, batch_size=10, bad_samples=str(listed)).batch(0)
    assert batch.valid is not None
    assert batch.valid.tolist() == [i != 3 for i in range(10)]
    assert json.loads(listed.read_text())["reason"] == "not_an_image"
