"""Damaged and changed shards, one damage at a time: the shard is refused by name, or all samples are still there.

tests/data/test_shards.py has every cut and every header of single archives, tests/data/test_fuzz.py thousands of random
damages; here each kind has its own line and its exact message.
"""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mmssl.data import shards as shards_module
from mmssl.data.shards import ShardSet
from mmssl.data.tar import ShardError

BLOCK = 512
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FIELDS = {
    "name": 0,
    "mode": 100,
    "owner": 108,
    "group": 116,
    "size": 124,
    "time": 136,
    "checksum": 148,
    "type": 156,
    "link": 157,
    "magic": 257,
    "version": 263,
    "owner's name": 265,
    "group's name": 297,
    "prefix": 345,
    "rest": 505,
}
Samples = list[tuple[str, dict[str, bytes]]]


def content(i: int, extension: str) -> bytes:
    return f"{i} {extension} ".encode() * (40 + 13 * i)


def archive(format: str = "ustar", samples: int = 4) -> bytes:
    """Pairs; with names that need an extended header where the format has any."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[format]) as tar:
        for i in range(samples):
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{'' if format == 'ustar' else 'n' * 120}{i:06d}.{extension}")
                info.size = len(content(i, extension))
                tar.addfile(info, io.BytesIO(content(i, extension)))
    return file.getvalue()


def places(data: bytes) -> list[tuple[int, int]]:
    """[start, stop) of every member with its headers, as tarfile sees them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    return [(m.offset, m.offset_data + -(-m.size // BLOCK) * BLOCK) for m in members]


def header(type: bytes, size: int, name: str = "x.txt") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = type, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def read(path: Path) -> Samples:
    shards = ShardSet(str(path))
    return [(s.key, s.members) for s in map(shards.read, range(len(shards)))]


def refused(path: Path, data: bytes, message: str) -> None:
    """By name and in one line, without an index and with the one of the shard as it was."""
    assert path.exists(), "write the whole shard and its index first"
    for fresh in (path.with_name("fresh.tar"), path):
        fresh.write_bytes(data)
        os.utime(fresh, (1, 1))
        with pytest.raises(ShardError, match=message) as caught:
            read(fresh)
        assert str(fresh) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shard.tar"


@pytest.mark.parametrize("format", FORMATS)
def test_cut_at_every_header_and_inside_every_member(format: str, path: Path) -> None:
    data = archive(format)
    path.write_bytes(data)
    whole = read(path)
    assert len(whole) == 4
    end = places(data)[-1][1]
    cuts = {place for start, stop in places(data) for place in (start, start + 100, start + BLOCK, stop - 5)}
    for cut in sorted(cuts - {0} | {end, end + 100}):
        refused(path, data[:cut], f"cut off at byte {cut}, ")
    path.write_bytes(data[: end + BLOCK])  # one block of the end mark is enough
    assert read(path) == whole


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_every_header(field: str, format: str, path: Path) -> None:
    data = archive(format, samples=2)
    path.write_bytes(data)
    read(path)
    blocks = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    assert len(blocks) == (4 if format == "ustar" else 8)  # extended headers have headers too
    for at in blocks:
        damaged = bytearray(data)
        damaged[at + FIELDS[field]] ^= 0x15
        refused(path, bytes(damaged), f"damaged at byte {at}: the header's checksum is wrong" if at else "is not a tar")


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_that_are_lost_doubled_or_moved(format: str, path: Path) -> None:
    data = archive(format)
    path.write_bytes(data)
    whole = read(path)
    starts = places(data)
    for start, stop in starts[1:]:
        refused(path, data[:start] + bytes(BLOCK) + data[start + BLOCK :], f"behind the end mark at byte {start}")
        refused(path, data[:start] + data[start + BLOCK :], "damaged at byte|cut off")
        refused(path, data[:stop] + data[stop - BLOCK : stop] + data[stop:], f"damaged at byte {stop}")  # content twice
        refused(path, data[:stop] + b"\1" + data[stop:], "damaged at byte|data at byte|cut off")
    refused(path, data + data, "data at byte .*several tars joined with cat; write it again")
    (a, b), (c, d) = starts[2], starts[5]
    path.write_bytes(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])  # two members swapped: only their order
    assert sorted(read(path)) == sorted(whole)
    path.write_bytes(data[:d] + data[c:d] + data[d:])  # a member twice: a second sample of this key
    assert read(path) == [*whole[:3], (whole[2][0], {"txt": whole[2][1]["txt"]}), whole[3]]


def test_an_interrupted_copy_into_a_file_of_full_size(path: Path) -> None:
    """What is missing is zeros; behind the last whole member they look like an end mark, but a far too long one."""
    data = archive(samples=40)
    path.write_bytes(data)
    read(path)
    for start, stop in places(data):
        missing = data[:start] + bytes(len(data) - start)
        if start and len(data) - start > 3 * 10240:
            refused(path, missing, f"bytes of zeros from byte {start} on, .* interrupted copy")
        inside = data[: stop - BLOCK] + bytes(len(data) - stop + BLOCK)
        if len(data) - stop > 3 * 10240:
            refused(path, inside, f"bytes of zeros from byte {stop} on, .* interrupted copy")


END = bytes(1024)
LONG = ("n" * 150 + ".txt\0").encode()
MADE: dict[str, tuple[bytes, str]] = {
    "a folder with content": (header(b"5", 512, "x") + bytes(512), "damaged at byte 1024: a folder with a content"),
    "a link with content": (header(b"2", 512) + bytes(512), "damaged at byte 1024: a link with a content"),
    "a long name without its member": (header(b"L", 155) + LONG.ljust(512, b"\0"), "followed by no member"),
    "a long name of zeros": (header(b"L", 155) + bytes(512) + header(b"0", 0), "extended header without a name"),
    "pax records of zeros": (header(b"x", 30) + bytes(512) + header(b"0", 0), "extended header without records"),
    "broken pax records": (header(b"x", 30) + b"30 path=a".ljust(512, b"\0") + header(b"0", 0), "not made of records"),
    "a pax size that is no number": (
        header(b"x", 11) + b"11 size=-5\n".ljust(512, b"\0") + header(b"0", 0),
        "the size '-5' in an extended header is not a number",
    ),
    "two long names for one member": (
        2 * (header(b"L", 155) + LONG.ljust(512, b"\0")) + header(b"0", 0),
        "without its member",
    ),
    "a long name longer than it says": (header(b"L", 100) + LONG.ljust(512, b"\0") + header(b"0", 0), "longer than"),
    "a long name of a gigabyte": (header(b"L", 1 << 30) + bytes(512), "cut off"),
    "a sparse file": (header(b"S", 0), "a sparse file"),
    "a size that is no number": (b"", "damaged at byte 1024: the size field"),
    "a size of eight exabytes": (b"", "cut off at byte"),
}


def signed(block: bytes) -> bytes:
    return block[:148] + b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32) + block[156:]


@pytest.mark.parametrize("name", MADE)
def test_headers_with_a_right_checksum_that_make_no_sense(name: str, path: Path) -> None:
    block, message = MADE[name]
    plain = header(b"0", 0)
    if name == "a size that is no number":
        block = signed(plain[:124] + b"00000000129\0" + plain[136:])
    elif name == "a size of eight exabytes":
        block = signed(plain[:124] + b"\x80" + ((1 << 63) - 1).to_bytes(11, "big") + plain[136:])
    first = header(b"0", 5, "a.txt") + b"first".ljust(512, b"\0")
    path.write_bytes(first + END)
    read(path)
    refused(path, first + block + END, message)


# ---- shards that change


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(10240))


def cut_in_place(path: Path) -> None:
    os.truncate(path, 3 * BLOCK)


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(archive(samples=5))
    os.replace(new, path)


def overwrite(path: Path) -> None:
    """Other members in the same file, of the same size."""
    data, (start, _) = path.read_bytes(), places(path.read_bytes())[2]
    with path.open("r+b") as file:
        file.write(data[start : start + 4 * BLOCK])
    os.utime(path, (7, 7))


def touch(path: Path) -> None:
    os.utime(path, (7, 7))


CHANGES: list[Callable[[Path], None]] = [grow, cut_in_place, replace, overwrite, touch]


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_between_index_and_read_is_refused(change: Callable[[Path], None], path: Path) -> None:
    path.write_bytes(archive())
    shards = ShardSet(str(path))
    change(path)
    for i in range(4):
        with pytest.raises(ShardError, match=r"shard\.tar: changed since it was indexed; start again"):
            shards.read(i)


def test_a_shard_that_vanishes_between_index_and_read_is_named(path: Path) -> None:
    path.write_bytes(archive())
    shards = ShardSet(str(path))
    path.unlink()
    with pytest.raises(ShardError, match=r"shard\.tar: No such file or directory; check the path"):
        shards.read(0)


@pytest.mark.parametrize("change", [grow, cut_in_place, overwrite, touch])
def test_a_shard_that_changes_while_it_is_read_is_noticed_at_the_next_look(
    change: Callable[[Path], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shards_module._LOOK_AGAIN == 1.0  # seconds
    monkeypatch.setattr(shards_module, "_LOOK_AGAIN", -1.0)
    path.write_bytes(archive())
    shards = ShardSet(str(path))
    assert shards.read(0).members["txt"] == content(0, "txt")
    change(path)
    with pytest.raises(ShardError, match=r"shard\.tar: changed since it was indexed"):
        shards.read(1)


def test_a_shard_that_is_cut_between_two_looks_gives_no_half_sample(path: Path) -> None:
    path.write_bytes(archive())
    shards = ShardSet(str(path))
    shards.read(0)
    cut_in_place(path)
    with pytest.raises(ShardError, match=r"shard\.tar: (ends at byte 6656|changed) since it was indexed"):
        shards.read(3)


@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_a_shard_that_is_open_stays_as_it_was_when_its_name_goes(change: Callable[[Path], None], path: Path) -> None:
    path.write_bytes(archive())
    shards = ShardSet(str(path))
    shards.read(0)
    change(path)
    assert [shards.read(i).members["txt"] for i in range(4)] == [content(i, "txt") for i in range(4)]


# ---- indexes that do not belong


def test_the_index_of_another_shard_is_noticed(tmp_path: Path) -> None:
    """Even if the other shard has the same size and time, as shards fetched by one command often have."""
    one, other = tmp_path / "one.tar", tmp_path / "other.tar"
    one.write_bytes(archive())
    data = archive()
    for i in range(4):
        data = data.replace(f"{i:06d}.".encode(), f"{i + 4:06d}.".encode())
    fixed = bytearray(data)
    for start, _ in places(archive()):
        fixed[start : start + BLOCK] = signed(bytes(fixed[start : start + BLOCK]))
    other.write_bytes(fixed)
    for path in (one, other):
        os.utime(path, (7, 7))
        assert len(read(path)) == 4
    shutil.copy(f"{one}.idx", f"{other}.idx")
    with pytest.raises(ShardError, match=r"other\.tar: changed .* or damaged: no header of 000000\.jpg"):
        read(other)
    os.utime(other, (8, 8))  # with any other time the index is made again
    assert [key for key, _ in read(other)] == [f"{i:06d}" for i in range(4, 8)]
