"""Thousands of damaged shards, indexes and pictures, in child processes: no crash, no hang, no unreported loss.

The oracle for a shard is a second reader: Python's ``tarfile``, behind a walk over the headers that accepts only a
whole archive.  Where a mutant is no whole archive any more, the reader must refuse it; where it is one, the reader must
return exactly what lies in it now.  Independently of that, a damage that moves nothing may change no byte elsewhere.

One mutant again:  python tests/data/test_fuzz.py shards NUMBER 1 /tmp/somewhere
"""

import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

BLOCK = 512
SECONDS = 10  # for one mutant, which takes about 2 ms
SHARDS, INDEXES, PICTURES = 2400, 600, 3000
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class Original(NamedTuple):
    data: bytes
    samples: list[tuple[str, dict[str, bytes]]]
    ranges: dict[tuple[int, str], tuple[int, int]]  # where the content of (sample, extension) lies


def original(format: str) -> Original:
    """Six samples of three members of 0 to 3 blocks, among members of other kinds; long names where there are any."""
    rng = np.random.default_rng(sum(map(ord, format)))
    file = io.BytesIO()
    samples: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[format]) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i in range(6):
            key = f"folder/{i:06d}" if format == "ustar" or i % 2 else f"{'long' * 30}ü/{i:06d}"
            members = {}
            for extension in ("jpg", "txt", "json"):
                size = int(rng.choice([0, 1, 511, 512, 513, 1024, 1500]))
                members[extension] = rng.bytes(size)
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = size
                archive.addfile(info, io.BytesIO(members[extension]))
            samples.append((key, members))
        archive.addfile(tarfile.TarInfo("README"))
    data = file.getvalue()
    ranges = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for info in archive:
            key, _, extension = info.name.partition(".")
            for i, (name, _) in enumerate(samples):
                if name == key:
                    ranges[i, extension] = (info.offset_data, info.offset_data + info.size)
    return Original(data, samples, ranges)


ORIGINALS = {name: original(name) for name in FORMATS}
KINDS = ["flip", "bytes", "zero", "cut", "insert", "delete", "swap", "copy", "header", "forge", "join", "size", "tail"]


def headers(data: bytes) -> list[int]:
    return [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]


def mutate(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """One to three damages of a kind."""

    def block() -> int:
        return int(rng.integers(0, len(out) // BLOCK)) * BLOCK

    def header() -> int:
        found = headers(out)
        return int(rng.choice(found)) if found else 0

    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if len(out) < BLOCK:
            break
        at, length = int(rng.integers(0, len(out))), int(rng.choice([1, 8, 100, 512, 1024, 3000]))
        aligned = rng.random() < 0.5
        if kind in ("insert", "delete", "zero") and aligned:
            at, length = block(), -(-length // BLOCK) * BLOCK
        if kind == "flip":
            at = at if aligned else header() + int(rng.integers(BLOCK))
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == "bytes":
            out[at : at + length] = rng.bytes(len(out[at : at + length]))
        elif kind == "zero":
            out[at : at + length] = bytes(len(out[at : at + length]))
        elif kind == "cut":
            del out[max(1, block() if aligned else at) :]
        elif kind == "insert":
            out[at:at] = rng.bytes(length) if rng.random() < 0.5 else bytes(length)
        elif kind == "delete":
            del out[at : at + length]
        elif kind == "swap":
            a, b = (header(), header()) if aligned else (block(), block())
            out[a : a + BLOCK], out[b : b + BLOCK] = out[b : b + BLOCK], out[a : a + BLOCK]
        elif kind == "copy":  # a block over another, or in between
            a, b = header() if aligned else block(), block()
            out[b : b + (BLOCK if rng.random() < 0.5 else 0)] = out[a : a + BLOCK]
        elif kind == "header":
            a = header()
            out[a : a + BLOCK] = rng.bytes(BLOCK)
        elif kind == "forge":  # any field, with a right checksum
            a = header()
            start, stop = [(0, 100), (124, 136), (156, 157), (257, 265), (345, 500)][int(rng.integers(5))]
            place = int(rng.integers(start, stop))
            out[a + place] = int(rng.choice(list(b"0123457LxgKS/.a\0\x80\xff")))
            sign(out, a)
        elif kind == "join":
            out += data if aligned else data[: int(rng.integers(len(data)))]
        elif kind == "size":  # a claim of any size, with a right checksum
            a = header()
            value = int(rng.choice([0, 1, 512, 513, 1 << 20, 1 << 33, (1 << 63) - 1]))
            out[a + 124 : a + 136] = b"%011o\0" % value if value < 1 << 33 else b"\x80" + value.to_bytes(11, "big")
            sign(out, a)
        elif kind == "tail":  # what a download into a file of full size leaves when it breaks off
            at = block() if aligned else at
            out[at:] = bytes(len(out) - at)
    return bytes(out)


def sign(out: bytearray, at: int) -> None:
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + BLOCK])


# ---- the second reader


def whole(data: bytes) -> bool:
    """Whether an archive is well-formed to its end: every header right, every content there, only zeros behind."""
    at = 0
    while True:
        block = data[at : at + BLOCK]
        if block == bytes(BLOCK):
            return not data[at:].strip(b"\0")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        if info.size < 0:
            return False
        # Links, devices and folders have no content, whatever their size says.
        empty = info.type in b"123456"
        at += BLOCK + (0 if empty else -(-info.size // BLOCK) * BLOCK)
        if at > len(data):
            return False


def reference(data: bytes) -> list[tuple[str, dict[str, bytes]]] | None:
    """The samples of a whole archive, as the layout defines them; None if it is not whole."""
    if not whole(data):
        return None
    samples: list[tuple[str, dict[str, bytes]]] = []
    latest: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), errorlevel=2) as archive:
            for info in archive:
                name = info.name.removeprefix("./")
                folder, slash, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                hidden = any(part.startswith(("__", ".")) and part != "." for part in name.split("/"))
                if not info.isreg() or info.issparse() or hidden or not (stem and extension):
                    continue
                content = archive.extractfile(info).read()  # type: ignore[union-attr]
                key, extension = folder + slash + stem, extension.lower()
                if key not in latest or extension in latest[key]:
                    latest[key] = {}
                    samples.append((key, latest[key]))
                latest[key][extension] = content
    except (tarfile.TarError, ValueError, EOFError):
        return None
    return samples


# ---- the children


def read_all(path: str) -> list[tuple[str, dict[str, bytes]]] | str:
    """All samples, or the error's line."""
    from mmssl.data.shards import ShardSet
    from mmssl.data.tar import ShardError

    try:
        shards = ShardSet(path)
        read = [shards.read(i) for i in range(len(shards))]
    except ShardError as error:
        line = str(error)
    else:
        return [(sample.key, sample.members) for sample in read]
    assert path in line, f"the error does not name the shard: {line}"
    assert "\n" not in line, f"not one line: {line!r}"
    return line


def one_shard(number: int, folder: Path) -> str:
    """Mutant ``number`` with a fresh scan, with an index that lies there, and under an index that is still believed."""
    rng = np.random.default_rng([1, number])
    format, kind = list(FORMATS)[number % 3], KINDS[number // 3 % len(KINDS)]
    source = ORIGINALS[format]
    mutant = mutate(source.data, kind, rng)
    expected = reference(mutant)
    fresh = folder / f"{number}.tar"
    fresh.write_bytes(mutant)
    found = read_all(str(fresh))
    if expected is None:
        assert isinstance(found, str), f"{format} {kind}: not a whole archive, and still read as {_keys(found)}"
    elif not isinstance(found, str):
        assert found == expected, f"{format} {kind}: read {_keys(found)}, the archive holds {_keys(expected)}"
    # An index of the tar as it was lies beside it.
    known = folder / f"{number}-known.tar"
    known.write_bytes(source.data)
    assert read_all(str(known)) == source.samples
    before = os.stat(known)
    (folder / "new").write_bytes(mutant)
    if number % 2:
        os.replace(folder / "new", known)
    else:
        known.write_bytes(mutant)
    if (os.stat(known).st_size, os.stat(known).st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        again = read_all(str(known))
        assert isinstance(again, str) == isinstance(found, str), f"{format} {kind}: {again!r} with the old index"
        assert isinstance(again, str) or again == found, f"{format} {kind}: other samples with the old index"
    if len(mutant) == len(source.data):  # as if the damage had left the time of change alone
        known.write_bytes(source.data)
        index = Path(f"{known}.idx")
        index.unlink(missing_ok=True)
        read_all(str(known))
        stat = os.stat(known)
        known.write_bytes(mutant)
        os.utime(known, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        believed = read_all(str(known))
        if not isinstance(believed, str):
            check_untouched(source, mutant, believed)
    for path in (fresh, known, Path(f"{fresh}.idx"), Path(f"{known}.idx")):
        path.unlink(missing_ok=True)
    return f"{kind}: {'refused' if isinstance(found, str) else 'same' if found == source.samples else 'other'}" + (
        " although whole" if expected is not None and isinstance(found, str) else ""
    )


def check_untouched(source: Original, mutant: bytes, found: list[tuple[str, dict[str, bytes]]]) -> None:
    """Every member that the damage did not touch is as it was."""
    assert [(key, set(members)) for key, members in found] == [(key, set(m)) for key, m in source.samples]
    for (i, extension), (start, stop) in source.ranges.items():
        if source.data[start:stop] == mutant[start:stop]:
            assert found[i][1][extension] == source.samples[i][1][extension], f"sample {i}, {extension}"


def _keys(samples: Any) -> Any:
    return samples if samples is None else [(key[-8:], {k: len(v) for k, v in m.items()}) for key, m in samples]


def one_index(number: int, folder: Path) -> str:
    """A damaged, cut, foreign or forged index beside a good shard: refused, or made again, but never believed."""
    rng = np.random.default_rng([2, number])
    formats = list(FORMATS)
    source, other = ORIGINALS[formats[number % 3]], ORIGINALS[formats[(number + 1) % 3]]
    path = folder / f"{number}.tar"
    path.write_bytes(source.data)
    place = Path(f"{path}.idx")
    assert read_all(str(path)) == source.samples
    data = bytearray(place.read_bytes())
    kind = ["flip", "cut", "bytes", "more", "foreign", "forged head", "forged body"][number // 3 % 7]
    at = int(rng.integers(0, len(data)))
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del data[at:]
    elif kind == "bytes":
        data[at : at + 64] = rng.bytes(len(data[at : at + 64]))
    elif kind == "more":
        data += rng.bytes(int(rng.integers(1, 100)))
    elif kind == "foreign":  # of another shard, with this one's size and time
        path.write_bytes(other.data)
        read_all(str(path))
        data = bytearray(place.read_bytes())
        path.write_bytes(source.data)
        data = forge(data, {"tar_size": len(source.data), "tar_mtime": os.stat(path).st_mtime_ns}, None)
    elif kind == "forged head":
        name = str(rng.choice(["samples", "extensions", "skipped", "body_size", "body_crc", "digest", "tar_size"]))
        value = [0, -1, 1 << 40, 5, "7", None, [], {}, {"jpg": -3}, {"txt": 10**9}, 1.5][int(rng.integers(11))]
        data = forge(data, {name: value}, None)
    else:
        data = forge(data, {}, rng)
    place.write_bytes(data)
    found = read_all(str(path))
    believed = not isinstance(found, str) and found != source.samples
    # Who forges checksums too, and just so that all numbers fit, could as well have written another tar.
    assert not believed or kind == "forged body", f"{kind}: wrong data: {_keys(found)}"
    path.unlink()
    place.unlink(missing_ok=True)
    return f"{kind}: {'refused' if isinstance(found, str) else 'believed' if believed else 'same'}"


def forge(data: bytearray, changes: dict[str, Any], rng: np.random.Generator | None) -> bytearray:
    """An index with other numbers, whose checksums are right."""
    length = int.from_bytes(data[8:12], "little")
    head, body = json.loads(data[16 : 16 + length]), bytearray(data[16 + length :])
    if rng is not None:
        n, m = head["samples"], sum(head["extensions"].values())
        at = 8 * int(rng.integers(0, 2 * n + 2 + 3 * m))
        value = int(rng.choice([-1, 0, 1, 512, 1 << 20, 1 << 40, -(1 << 63), (1 << 63) - 1]))
        body[at : at + 8] = value.to_bytes(8, "little", signed=True)
        head["body_crc"] = zlib.crc32(body)
    new = json.dumps({**head, **changes}).encode()
    return bytearray(data[:8] + len(new).to_bytes(4, "little") + zlib.crc32(new).to_bytes(4, "little") + new + body)


def pictures() -> list[bytes]:
    import PIL.Image

    rough = np.random.default_rng(0).integers(0, 256, (5, 5, 4), np.uint8)
    image = PIL.Image.fromarray(rough, "RGBA").resize((40, 30), PIL.Image.Resampling.BICUBIC)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    rgb, made = image.convert("RGB"), []
    for mode, format, options in [
        ("RGB", "JPEG", {"exif": exif}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGBA", "PNG", {"exif": exif}),
        ("P", "PNG", {"save_all": True, "append_images": [rgb]}),
        ("P", "GIF", {"save_all": True, "append_images": [rgb]}),
        ("RGB", "WEBP", {"exif": exif}),
        ("RGBA", "WEBP", {"lossless": True, "save_all": True, "append_images": [image]}),
        ("RGB", "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        ("1", "TIFF", {"compression": "group4"}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
        ("P", "BMP", {}),
        ("RGB", "PPM", {}),
    ]:
        file = io.BytesIO()
        image.convert(mode).save(file, format, **options)
        made.append(file.getvalue())
    return made


SOURCES: list[bytes] = []


def one_picture(number: int, folder: Path) -> str:
    """Only BadSample or a picture."""
    from mmssl.data.crops import RandomResizedCrop
    from mmssl.data.images import decode_image, load_image
    from mmssl.draws import Draws
    from mmssl.types import BadSample

    if not SOURCES:
        SOURCES.extend(pictures())
    rng = np.random.default_rng([3, number])
    data = bytearray(SOURCES[number % len(SOURCES)])
    head = rng.random() < 0.5  # headers are short, and the interesting part
    for at in rng.integers(0, min(len(data), 200) if head else len(data), int(rng.integers(1, 5))):
        data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    if number % 5 == 0:
        del data[int(rng.integers(len(data))) :]
    try:
        image = decode_image(bytes(data))
        assert load_image(bytes(data), RandomResizedCrop(4), Draws(number)).shape == (3, 4, 4)  # decodes smaller
    except BadSample as error:
        return error.reason
    assert image.shape[0] == 3
    assert image.numel() > 0
    return "a picture"


WORK: dict[str, Callable[[int, Path], str]] = {"shards": one_shard, "indexes": one_index, "pictures": one_picture}


def child(what: str, first: int, count: int, folder: Path) -> None:
    """Prints a line for every kind of outcome; a failure names its number."""
    faulthandler.enable()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    outcomes: Counter[str] = Counter()
    for number in range(first, first + count):
        signal.alarm(SECONDS)  # without a handler: ends this process
        try:
            outcomes[WORK[what](number, folder)] += 1
        except BaseException as error:
            error.add_note(f"AGAIN: python tests/data/test_fuzz.py {what} {number} 1 {folder}")
            raise
        (folder / "at").write_text(str(number + 1))
    signal.alarm(0)
    print(json.dumps(outcomes))


def fuzz(what: str, count: int, folder: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    batch = -(-count // 2)
    for first in range(0, count, batch):
        arguments = [what, str(first), str(min(batch, count - first)), str(folder)]
        ran = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=250, check=False
        )
        at = (folder / "at").read_text() if (folder / "at").exists() else "the first"
        assert ran.returncode == 0, f"{what}: exit code {ran.returncode} at {at}: {ran.stderr[-3000:]}"
        outcomes.update(json.loads(ran.stdout.splitlines()[-1]))
    assert outcomes.total() == count
    return outcomes


def test_damaged_shards_lose_nothing_in_silence(tmp_path: Path) -> None:
    outcomes = fuzz("shards", SHARDS, tmp_path)
    by_end: Counter[str] = Counter()
    for outcome, times in outcomes.items():
        by_end[outcome.partition(": ")[2]] += times
    assert by_end["refused"] > SHARDS / 3, outcomes  # neither half of the oracle is idle
    assert by_end["same"] + by_end["other"] > SHARDS / 10, outcomes
    assert by_end["refused although whole"] < SHARDS / 10, outcomes


def test_damaged_indexes_give_no_wrong_data(tmp_path: Path) -> None:
    outcomes = fuzz("indexes", INDEXES, tmp_path)
    assert outcomes["flip: same"] > 20, outcomes
    assert outcomes["foreign: refused"] > 80, outcomes
    assert outcomes["forged body: believed"] < 10, outcomes


def test_damaged_pictures_decode_or_are_bad(tmp_path: Path) -> None:
    outcomes = fuzz("pictures", PICTURES, tmp_path)
    assert outcomes["a picture"] > PICTURES / 5, outcomes
    assert outcomes["truncated"] + outcomes["unreadable_image"] + outcomes["not_an_image"] > PICTURES / 5, outcomes


@pytest.mark.parametrize("format", FORMATS)
def test_the_second_reader_agrees_on_whole_archives(format: str) -> None:
    assert reference(ORIGINALS[format].data) == ORIGINALS[format].samples
    assert reference(ORIGINALS[format].data[:-10240]) is None or len(ORIGINALS[format].data) > 20480


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
