"""The index of one shard: which members make up which sample, and where they lie.

The index of ``x.tar`` lies beside it in ``x.tar.idx``, or in a cache folder, or in memory, whichever can be written.
It is believed only as long as the tar keeps its size and time of change, and is made again otherwise.

A member's key is its name up to the first dot of its last part (folders stay in it), its extension is the rest, in
lower case.  A member whose key was seen before joins that sample, wherever in the shard it stands; if the sample has
this extension already, a new sample with the same key begins.  Hidden members, those in or named ``__...``, links,
and names without a dot are skipped and counted.
"""

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmssl.data.tar import Member, ShardError, open_shard, scan

_MAGIC = b"mmsslix1"
_START = struct.Struct("<8sII")  # magic, length and CRC-32 of the JSON that follows


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name, as webdataset splits it; None where there is no dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and extension else None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("__", ".")) and part != "." for part in name.split("/"))


class Members(NamedTuple):
    """The body of an index: sample i owns the members starts[i]:starts[i + 1]."""

    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]  # in bytes
    sizes: NDArray[np.int64]  # in bytes
    codes: NDArray[np.int64]  # place of the extension in ShardIndex.extensions
    key_starts: NDArray[np.int64]
    keys: bytes | memoryview


@dataclass(frozen=True)
class ShardIndex:
    """What is known of a shard before it is read.

    ``extensions`` and ``skipped`` count members; ``digest`` covers keys, extensions, sizes and places of all members,
    not their content.  ``file`` is where the index is stored; without one, ``body`` holds it.
    """

    path: str
    tar_size: int
    tar_mtime: int
    samples: int
    extensions: dict[str, int]
    skipped: dict[str, int]
    digest: str
    body_start: int
    body_size: int
    body_crc: int
    file: str | None = None
    body: bytes | None = None

    def members(self) -> Members:
        """Read the body.  Raises ShardError if it is not what was written."""
        body = self.body
        if body is None:
            assert self.file is not None
            with open(self.file, "rb") as file:
                file.seek(self.body_start)
                body = file.read(self.body_size)
        if zlib.crc32(body) != self.body_crc:
            raise ShardError(f"index {self.file}: damaged; delete it, it will be made again")
        n, m = self.samples, sum(self.extensions.values())
        arrays, at = [], 0
        for length in (n + 1, m, m, m, n + 1):
            arrays.append(np.frombuffer(body, "<i8", length, at))
            at += 8 * length
        return Members(*arrays, keys=memoryview(body)[at:])  # type: ignore[arg-type]


def index_shard(path: str) -> ShardIndex:
    """The index of a shard: read if it is there and fits the tar's size and time, else made and stored.

    Raises:
        ShardError: for a shard that is missing, cut, damaged, not a tar, or holds no sample.
    """
    fd = open_shard(path)
    try:
        stat = os.fstat(fd)
        places = _index_places(path)
        for place in places:
            found = _load(path, place)
            if found is not None and (found.tar_size, found.tar_mtime) == (stat.st_size, stat.st_mtime_ns):
                return found
        members, skipped = scan(fd, path)
    finally:
        os.close(fd)
    index = _build(path, members, skipped, stat.st_size, stat.st_mtime_ns)
    for place in places:
        if _store(index, place):
            return _load(path, place) or index
    return index


def index_shards(
    paths: Sequence[str], jobs: int | None = None, progress: Callable[[ShardIndex], None] | None = None
) -> list[ShardIndex]:
    """The indexes of many shards, in the order of ``paths``, made side by side where they are missing or old.

    Args:
        paths: local paths or URLs.
        jobs: how many are worked on at once; by default as many as there are cores for local shards (processes),
            and 16 for remote ones (threads).
        progress: called in this thread with every index as soon as it is known, in any order.

    Raises:
        ShardError: names the first shard that cannot be used; the indexes of others that were made stay stored.
    """
    found = []
    for path in paths:
        found.append(index_shard(path))
        if progress is not None:
            progress(found[-1])
    return found


def _index_places(path: str) -> list[str]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.blake2b(os.path.realpath(path).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return [path + ".idx", os.path.join(cache, "mmssl", "index", name + ".idx")]


def _build(path: str, members: list[Member], skipped: Counter[str], size: int, mtime: int) -> ShardIndex:
    samples: list[tuple[str, dict[str, Member]]] = []
    open_samples: dict[str, dict[str, Member]] = {}
    for member in members:
        if _is_hidden(member.name):
            skipped["hidden"] += 1
            continue
        split = split_name(member.name)
        if split is None:
            skipped["no extension"] += 1
            continue
        key, extension = split
        sample = open_samples.get(key)
        if sample is None or extension in sample:
            sample = open_samples[key] = {}
            samples.append((key, sample))
        sample[extension] = member
    if not samples:
        found = ", ".join(f"{n} x {kind}" for kind, n in skipped.items()) or "nothing"
        raise ShardError(f"shard {path}: holds no sample (found: {found}); names like 000000012.jpg are needed")
    codes: dict[str, int] = {}
    for _, sample in samples:
        for extension in sample:
            codes.setdefault(extension, len(codes))
    flat = [(codes[extension], m) for _, sample in samples for extension, m in sample.items()]
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in samples]
    arrays = (
        np.cumsum([0, *(len(sample) for _, sample in samples)]),
        [m.offset for _, m in flat],
        [m.size for _, m in flat],
        [code for code, _ in flat],
        np.cumsum([0, *map(len, keys)]),
    )
    body = b"".join([*(np.asarray(array, "<i8").tobytes() for array in arrays), *keys])
    counts = Counter(code for code, _ in flat)
    extensions = {extension: counts[code] for extension, code in codes.items()}
    digest = hashlib.blake2b(json.dumps(list(codes)).encode() + body, digest_size=16).hexdigest()
    crc = zlib.crc32(body)
    return ShardIndex(path, size, mtime, len(samples), extensions, dict(skipped), digest, 0, len(body), crc, body=body)


_STORED = ("tar_size", "tar_mtime", "samples", "extensions", "skipped", "digest", "body_size", "body_crc")


def _store(index: ShardIndex, place: str) -> bool:
    """Write an index whole or not at all; False where that is not possible."""
    assert index.body is not None
    head = json.dumps({name: getattr(index, name) for name in _STORED}).encode()
    data = _START.pack(_MAGIC, len(head), zlib.crc32(head)) + head + index.body
    temporary = None
    try:
        os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=".idx-", dir=os.path.dirname(place) or ".")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except OSError:  # no right to write, a full disk: the next place is tried, and memory is always there
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return False
    return True


def _load(path: str, place: str) -> ShardIndex | None:
    """A stored index, or None if there is none that is whole."""
    try:
        with open(place, "rb") as file:
            magic, length, crc = _START.unpack(file.read(_START.size))
            head = file.read(length) if magic == _MAGIC and length < 1 << 24 else b""
            start, end = file.tell(), os.fstat(file.fileno()).st_size
    except (OSError, struct.error):
        return None
    if zlib.crc32(head) != crc or not head:
        return None
    values = json.loads(head)
    if start + values["body_size"] != end:
        return None
    return ShardIndex(path=path, file=place, body_start=start, **values)
