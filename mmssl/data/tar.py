"""Tar headers: where every regular file of an archive lies, without reading the files.

Reads ustar, GNU (long names, base-256 numbers) and pax archives.  Every header's checksum is verified and the
end mark is looked for, so that a cut or damaged archive is refused and never shortened in silence.
"""

import errno
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import compress
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mmssl.data.descriptors import opened

BLOCK = 512
_FAR = 16 << 10  # headers that lie closer than this are read together
_SHORTEST, _LONGEST = 8 << 10, 1 << 20  # of one read, in bytes
_RUN = 1024  # headers that are checked together
_STRETCH = 64 << 10
_LONGEST_NAME = 1 << 20
_RECORD = 20 * BLOCK  # archives are filled up with zeros to a multiple of this
_ZERO = bytes(BLOCK)
_TIME = re.compile(rb"(\d{1,3}) [amc]time=\d{1,20}(?:\.\d{1,20})?\n")
_OCTAL = 8 ** np.arange(5, -1, -1)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard"}
_SKIPPED = {b"1": "hard link", b"2": "link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}


class ShardError(ValueError):
    """A shard that cannot be used, in one line: what, where (shard and byte), what to do."""


class Member(NamedTuple):
    name: str
    offset: int  # of the content, in bytes
    size: int  # in bytes


@runtime_checkable
class Reader(Protocol):
    """A file of known size, local or remote, of which any part can be read."""

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    def pread(self, length: int, offset: int) -> bytes:
        """At most ``length`` bytes from ``offset`` on; fewer only where the file ends."""
        ...


class LocalReader:
    """A :class:`Reader` of an open file."""

    def __init__(self, fd: int) -> None:
        self._fd, self.size = fd, os.fstat(fd).st_size

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._fd, length, offset)


class _Headers:
    """Header blocks by offset, from few reads: long ones as long as headers lie close together."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._start, self._buffer, self._length = reader, 0, b"", _SHORTEST
        self.run = 2

    def read(self, offset: int, length: int) -> bytes:
        at = offset - self._start
        if not 0 <= at <= len(self._buffer) - length:
            near = at < len(self._buffer) + _FAR
            self._length = min(2 * self._length, _LONGEST) if near else _SHORTEST
            self._buffer, self._start, at = self._reader.pread(max(length, self._length), offset), offset, 0
        return self._buffer[at : at + length]

    def plain(self, at: int, size: int) -> tuple[list[bytes], list[int], list[int]]:
        """Blocks from ``at`` on that may be headers of plain files, with an extended header that gives times or none.

        They are unchecked: blocks, offsets of content, lengths.  Ends where something else begins, and after as many
        as were good lately.
        """
        blocks: list[bytes] = []
        offsets: list[int] = []
        lengths: list[int] = []
        buffer, start, extended = self._buffer, self._start, False
        while len(blocks) < self.run:
            place = at - start
            if not 0 <= place <= len(buffer) - 2 * BLOCK:
                if len(self.read(at, 2 * BLOCK)) < 2 * BLOCK:
                    break
                buffer, start, place = self._buffer, self._start, at - self._start
            try:
                length = int(buffer[place + 124 : place + 135], 8)
            except ValueError:
                break
            kind = buffer[place + 156]
            at += BLOCK
            if length < 0 or at + length > size:
                break
            if kind == 120 and not extended and _only_times(buffer[place + BLOCK : place + 2 * BLOCK], length):
                extended = True
            elif kind in (48, 0):
                extended = False
            else:
                break
            blocks.append(buffer[place : place + BLOCK])
            offsets.append(at)
            lengths.append(length)
            at += (length + 511) & -BLOCK
        return blocks, offsets, lengths

    def members(self, at: int, size: int) -> list[Member]:
        """Members from ``at`` on whose headers are in the usual form and right; none if the next one is not."""
        blocks, offsets, lengths = self.plain(at, size)
        if not blocks:
            return []
        found, all_good = _plain_members(blocks, offsets, lengths)
        # What follows a bad one was read in vain, so after it one looks less far.
        self.run = min(2 * self.run, _RUN) if all_good else 2
        return found


def _only_times(content: bytes, length: int) -> bool:
    """Whether an extended header holds one record and this a time, as webdataset and img2dataset write it."""
    record = _TIME.match(content)
    return record is not None and record.end() == length == int(record[1]) and content.count(0) == BLOCK - length


def open_shard(path: str) -> int:
    """A file descriptor for reading.  Raises ShardError where the system refuses."""
    try:
        # Not to wait for ever for the other end, where a path is a named pipe; a file does not feel it.
        fd = opened(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        remedy = "check the path" if error.errno == errno.ENOENT else "check its permissions and its disk"
        raise ShardError(f"shard {path}: {error.strerror}; {remedy}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ShardError(f"shard {path}: is not a regular file; give the path of a tar file")
    return fd


def read_exactly(fd: int, length: int, offset: int, path: str) -> bytes:
    """Bytes of a shard.  Raises ShardError if they cannot be read or end early."""
    try:
        data = os.pread(fd, length, offset)
        while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
            data += more
    except OSError as error:
        raise ShardError(f"shard {path}: {error.strerror} at byte {offset}; check its disk") from None
    if len(data) < length:
        raise ShardError(f"shard {path}: ends at byte {offset + len(data)} since it was indexed; restore it")
    return data


def scan(source: Reader | int, path: str) -> tuple[list[Member], Counter[str]]:
    """The regular files of an archive, in order, and the number of other members by kind.

    Args:
        source: a reader, or the descriptor of an open file.
        path: for messages.

    Raises:
        ShardError: for anything that is not a whole, plain tar.
    """
    try:
        reader = LocalReader(source) if isinstance(source, int) else source
        size = reader.size
        if size == 0:
            raise ShardError(f"shard {path}: is empty (0 bytes); write it again")
        skipped: Counter[str] = Counter()
        return list(_members(_Headers(reader), path, size, skipped)), skipped
    except OSError as error:
        raise ShardError(f"shard {path}: {error.strerror}; check that it is a file and its disk is well") from None


def read_header(block: bytes) -> tuple[str, int] | None:
    """Name and size that a member's own header gives; None if it is no whole header.

    A name above 99 bytes, or one that is not ASCII, may stand in an extended header before it.
    """
    if len(block) < BLOCK or not _sum_is_right(block):
        return None
    try:
        return _own_name(block), _number(block[124:136], "", 0)
    except ShardError:
        return None


def _members(headers: _Headers, path: str, size: int, skipped: Counter[str]) -> Iterator[Member]:
    at = 0
    name: str | None = None  # given by an extended header for the next member
    long_size: int | None = None
    pending: set[bytes] = set()  # extended headers that wait for their member
    while True:
        if not pending:
            while found := headers.members(at, size):
                yield from found
                at = found[-1].offset + -(-found[-1].size // BLOCK) * BLOCK
        # Whatever is not plain, or not in order: the end, links, extended headers, damage.
        block = headers.read(at, BLOCK)
        if len(block) < BLOCK:
            raise _cut(path, at, size, "a whole header" if block else "the end mark")
        if block == _ZERO:
            _check_end(headers, path, at, size)
            if pending:
                raise _damaged(path, at, "an extended header is followed by no member")
            return
        if not _sum_is_right(block):
            if at == 0:
                raise _not_a_tar(path, block)
            raise _damaged(path, at, "the header's checksum is wrong")
        kind = block[156:157]
        length = _number(block[124:136], path, at)
        extended = kind in (b"x", b"L", b"g", b"K")
        if long_size is not None and not extended:
            length, long_size = long_size, None
        begin = at + BLOCK
        following = begin + -(-length // BLOCK) * BLOCK
        if length and kind in _SKIPPED:
            # Some readers skip so many bytes, others none: members would come or go.
            raise _damaged(path, at, f"a {_SKIPPED[kind]} with a content of {length} bytes")
        if begin + length > size:
            raise _cut(path, at, size, f"the {length} bytes of the member whose header is at byte {at}")
        if extended:
            if length > _LONGEST_NAME:
                raise _damaged(path, at, f"an extended header of {length} bytes")
            content, padding = headers.read(begin, length), headers.read(begin + length, following - begin - length)
            if kind in pending or padding.strip(b"\0"):
                raise _damaged(path, at, "an extended header that is longer than it says, or without its member")
            pending |= {kind} - {b"g"}  # which holds for all members
            if kind == b"L":
                name = _text(content)
                if not name:
                    raise _damaged(path, at, "an extended header without a name")
            elif kind == b"x":
                records = _pax(content, path, at)
                if any(key.startswith("GNU.sparse") for key in records):
                    raise _damaged(path, at, "a sparse file, which has no plain content")
                name = records.get("path", name)
                if "size" in records:
                    long_size = _decimal(records["size"], path, at)
        else:
            own, name, pending = name if name is not None else _own_name(block), None, set()
            if kind == b"S":
                raise _damaged(path, at, "a sparse file, which has no plain content")
            if kind in (b"0", b"\0", b"7") and not own.endswith("/"):
                yield Member(own, begin, length)
            else:
                skipped[_SKIPPED.get(kind, "folder" if own.endswith("/") else "unknown kind")] += 1
        at = following


def _plain_members(blocks: list[bytes], offsets: list[int], lengths: list[int]) -> tuple[list[Member], bool]:
    """The members of these headers up to the first that is not in the usual form, or is damaged; whether all are good.

    Says nothing about that one: many are looked at together here for speed alone, and one by one in ``_members``.
    """
    rows = np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, BLOCK)
    total = rows.sum(1, dtype=np.uint32).astype(np.int64)
    field = rows[:, 148:156].astype(np.int64)
    total += 8 * 32 - field.sum(1)  # the field itself counts as blanks
    digits = field[:, :6] - 48
    good = (digits @ _OCTAL == total) & ((digits >= 0) & (digits < 8)).all(1) & (field[:, 6] == 0) & (field[:, 7] == 32)
    length = rows[:, 124:136]
    good &= ((length[:, :11] >= 48) & (length[:, :11] < 56)).all(1) & ((length[:, 11] == 0) | (length[:, 11] == 32))
    good &= rows[:, 345] == 0  # no prefix
    names = np.ascontiguousarray(rows[:, :100])
    used = names != 0
    last = used.sum(1) - 1
    good &= used[:, 0] & ~(used[:, 1:] & ~used[:, :-1]).any(1) & (names[np.arange(len(names)), last] != 47)
    count = len(good) if good.all() else int(np.argmin(good))
    raw = b"\0".join(names[:count].view("S100").ravel().tolist())
    decoded = raw.decode("utf-8", "surrogateescape").split("\0")
    found = list(map(Member._make, zip(decoded, offsets, lengths, strict=False))) if count else []
    extended = rows[:count, 156] == 120
    if extended.any():  # an extended header belongs to the member behind it
        found = list(compress(found, (~extended).tolist()))
    return found, count == len(good)


def _sum_is_right(block: bytes) -> bool:
    # Adler-32's low half is 1 + the sum of bytes modulo 65521; half a block sums to at most 65280, so it is exact.
    total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    field = block[148:156]
    total += 8 * 32 - sum(field)  # the field itself counts as blanks
    try:
        stored = int(field.split(b"\0", 1)[0].strip() or b"-1", 8)
    except ValueError:
        return False
    if stored == total:
        return True
    # Some old writers summed signed bytes.
    return stored == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _number(field: bytes, path: str, at: int) -> int:
    if field[0] & 0x80:  # base 256, for sizes of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if not all(48 <= byte < 56 for byte in text):
        raise _damaged(path, at, f"the size field {field!r} is not a number")
    return int(text or b"0", 8)


def _decimal(text: str, path: str, at: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _damaged(path, at, f"the size {text[:40]!r} in an extended header is not a number")
    return int(text)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _own_name(block: bytes) -> str:
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:  # GNU's own format keeps other things there
        return f"{_text(block[345:500])}/{name}"
    return name


def _pax(content: bytes, path: str, at: int) -> dict[str, str]:
    """Records of the form "<length> <key>=<value>\\n"."""
    records = {}
    rest = content
    while rest.strip(b"\0"):
        digits, blank, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record, rest = rest[:length], rest[length:]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not (blank and equals and length <= len(content) and record.endswith(b"\n")):
            raise _damaged(path, at, "an extended header that is not made of records")
        records[_text(key)] = value.decode("utf-8", "surrogateescape")
    if not records:
        raise _damaged(path, at, "an extended header without records")
    return records


def _check_end(headers: _Headers, path: str, at: int, size: int) -> None:
    """Nothing but zeros may follow the first zero block: a header turned to zeros would hide what comes behind."""
    offset = at
    while offset < size:
        block = headers.read(offset, min(_STRETCH, size - offset))
        if block.strip(b"\0"):
            where = offset + len(block) - len(block.lstrip(b"\0"))
            raise ShardError(
                f"shard {path}: data at byte {where}, behind the end mark at byte {at}: damaged, or several tars "
                "joined with cat; write it again (tar -A joins archives)"
            )
        offset += len(block)
    # Writers fill up to a whole record; those that do not, append two blocks or a record.
    longest = -(-(at + 2 * BLOCK) // _RECORD) * _RECORD if size % _RECORD == 0 else at + 2 * BLOCK + _RECORD
    if size > longest:
        raise ShardError(
            f"shard {path}: {size - at} bytes of zeros from byte {at} on, {size - longest} more than a tar's end has: "
            "the rest of an interrupted copy, or larger records than tar makes by itself (-b); fetch or write it again"
        )


def _cut(path: str, at: int, size: int, missing: str) -> ShardError:
    return ShardError(f"shard {path}: cut off at byte {size}, {missing} is missing; fetch or write it again")


def _damaged(path: str, at: int, what: str) -> ShardError:
    return ShardError(f"shard {path}: damaged at byte {at}: {what}; fetch or write it again")


def _not_a_tar(path: str, block: bytes) -> ShardError:
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            return ShardError(f"shard {path}: is compressed ({name}), which has no random access; unpack it to a .tar")
    return ShardError(f"shard {path}: is not a tar (no header at byte 0); give WebDataset tar files")
