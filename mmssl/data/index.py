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
import signal
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import current_process, get_all_start_methods, get_context

import numpy as np

from mmssl.data.bodies import Mark, Members, divide, is_sound, map_body
from mmssl.data.processors import processors
from mmssl.data.remote import RemoteReader, Stat, beside, fetch, is_remote, put, shown, stat
from mmssl.data.tar import Member, ShardError, open_shard, scan

_MAGIC = b"mmsslix1"
_LONGEST_HEAD = 16 << 20
_START = struct.Struct("<8sII")  # magic, length and CRC-32 of the JSON that follows


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name, as webdataset splits it; None where there is no dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and extension else None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("__", ".")) and part != "." for part in name.split("/"))


@dataclass(frozen=True)
class ShardIndex:
    """What is known of a shard before it is read.

    ``extensions`` and ``skipped`` count members; ``digest`` covers keys, extensions, sizes and places of all members,
    not their content.  ``file`` is where the index is stored; without one, ``body`` holds it.
    """

    path: str
    tar_size: int
    tar_mtime: int  # in nanoseconds; 0 where a remote store does not tell
    samples: int
    extensions: dict[str, int]
    skipped: dict[str, int]
    digest: str
    body_start: int
    body_size: int
    body_crc: int
    version: str = ""  # of a remote tar: see mmssl.data.remote.Stat
    file: str | None = None
    body: bytes | None = None

    def members(self) -> Members:
        """The body.  Raises ShardError if it is not what was written, OSError if it cannot be read."""
        return self.open_members(None)[0]

    def open_members(self, known: Mark | None) -> tuple[Members, Mark]:
        """The body and a mark of its file; it is looked through unless the file is the one that is ``known``.

        Raises:
            OSError: if it cannot be read.
            ShardError: if it is not what was written.
        """
        if self.body is not None:
            body, mark = memoryview(self.body), (0, 0, 0)
        else:
            assert self.file is not None
            body, mark = map_body(self.file, self.body_start, self.body_size)
        if mark != known and zlib.crc32(body) != self.body_crc:
            raise ShardError(f"index {self.file}: damaged; delete it, it will be made again")
        members = divide(body, self.samples, sum(self.extensions.values()))
        if members is None:
            raise ShardError(f"index {self.file}: damaged; delete it, it will be made again")
        if mark != known and not is_sound(members, len(self.extensions), self.tar_size):
            raise ShardError(f"index {self.file}: its numbers do not fit the tar; delete it, it will be made again")
        return members, mark


def index_shard(path: str) -> ShardIndex:
    """The index of a shard: read if it is there and fits the tar, else made and stored.

    Args:
        path: a local path, or the URL of a remote tar.

    Raises:
        ShardError: for a shard that is missing, cut, damaged, not a tar, or holds no sample.
    """
    return _index_remote(path) if is_remote(path) else _known(path) or _index_local(path)


def index_shards(
    paths: Sequence[str], jobs: int | None = None, progress: Callable[[ShardIndex], None] | None = None
) -> list[ShardIndex]:
    """The indexes of many shards, in the order of ``paths``, made side by side where they are missing or old.

    Args:
        paths: local paths or URLs.
        jobs: how many are worked on at once; by default as many as there are cores for local shards (processes),
            and 32 for remote ones (threads).
        progress: called in this thread with every index as soon as it is known, in any order.

    Raises:
        ShardError: names a shard that cannot be used; the indexes of others that were made stay stored.
    """
    found: dict[int, ShardIndex] = {}

    def take(results: Iterable[tuple[int, ShardIndex | None]]) -> None:
        for number, index in results:
            if index is not None:
                found[number] = index
                if progress is not None:
                    progress(index)

    local = [number for number, path in enumerate(paths) if not is_remote(path)]
    take(_side_by_side(_known, paths, local, jobs or 8, "stored"))
    take(_side_by_side(_index_local, paths, [n for n in local if n not in found], jobs or processors(), "scan"))
    take(_side_by_side(_index_remote, paths, sorted({*range(len(paths))} - {*local}), jobs or 32, "remote"))
    return [found[number] for number in range(len(paths))]


def _side_by_side(
    work: Callable[[str], ShardIndex | None], paths: Sequence[str], numbers: list[int], jobs: int, kind: str
) -> Iterator[tuple[int, ShardIndex | None]]:
    """(number, result) of some of the paths, as they are ready.  Of several errors the first shard's is raised."""
    # Handed over in chunks where results come at once, or shards are very many.
    size = 64 if kind == "stored" else min(16, max(1, len(numbers) // (100 * jobs)))
    chunks = [numbers[at : at + size] for at in range(0, len(numbers), size)]
    if min(jobs, len(chunks)) < 2:
        for number in numbers:
            yield number, work(paths[number])
        return
    pool: Executor
    # Scanning is work for the processor. A daemon, such as a loader's worker, may have no children.
    if kind == "scan" and "fork" in get_all_start_methods() and not current_process().daemon:
        pool = ProcessPoolExecutor(jobs, get_context("fork"), _end_with_parent, (os.getpid(),))
    else:
        pool = ThreadPoolExecutor(jobs, thread_name_prefix="index")
    tasks = {pool.submit(_each, work, [paths[n] for n in chunk]): chunk for chunk in chunks}
    try:
        for task in as_completed(tasks):
            if task.exception() is not None:
                break
            yield from zip(tasks[task], task.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
    try:
        for task in tasks:
            if not task.cancelled():
                task.result()
    except BrokenProcessPool:
        raise ShardError(
            f"indexing {shown(paths[numbers[0]])} and {len(numbers) - 1} more: one of {jobs} processes was killed, "
            "most often for want of memory; index them beforehand with mmssl shards index --jobs 1"
        ) from None


def _each(work: Callable[[str], ShardIndex | None], paths: list[str]) -> list[ShardIndex | None]:
    return [work(path) for path in paths]


def _end_with_parent(parent: int) -> None:
    """A worker of the pool would wait for ever for a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends the pool

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _known(path: str) -> ShardIndex | None:
    """The stored index of a local shard, if it fits the tar's size and time of change."""
    try:
        tar = os.stat(path)
    except OSError:  # told in full when the shard is opened
        return None
    for place in _places(path):
        found = _load(path, place)
        if found is not None and (found.tar_size, found.tar_mtime) == (tar.st_size, tar.st_mtime_ns):
            return found
    return None


def _index_local(path: str) -> ShardIndex:
    fd = open_shard(path)
    try:
        tar = os.fstat(fd)
        members, skipped = scan(fd, path)
    finally:
        os.close(fd)
    index = _build(path, members, skipped, tar.st_size, tar.st_mtime_ns)
    return next(filter(None, (_store(index, place) for place in _places(path))), index)


def _places(path: str) -> Iterator[str]:
    """Where the index of a local shard may lie."""
    yield path + ".idx"
    yield _cache_place(os.path.realpath(path))


def _index_remote(url: str) -> ShardIndex:
    now = stat(url)
    # A renewed signature names the same file. Without a version the query is all that tells files apart.
    place = _cache_place(f"{shown(url)} {now.version}" if now.version else url)
    found = _load(url, place)
    if found is not None and (found.tar_size, found.version) == (now.size, now.version):
        return found
    index = _sidecar(url, now)
    if index is None:
        members, skipped = scan(RemoteReader(url, now), shown(url))
        index = _build(url, members, skipped, now.size, now.mtime, now.version)
        put(beside(url, ".idx"), _bytes(index))
    return _store(index, place) or index


def _sidecar(url: str, now: Stat) -> ShardIndex | None:
    """The index beside a remote tar, if it was made from this version of it or is not older."""
    place = beside(url, ".idx")
    try:
        there = stat(place)
        data = fetch(place, 0, there.size, there)
    except ShardError:  # not there, or a store that hides what is not there
        return None
    index = _parse(url, data, len(data), None)
    if index is None or index.tar_size != now.size:
        return None
    if index.version != now.version or not now.version:
        if not 0 < now.mtime <= there.mtime:
            return None
        index = replace(index, version=now.version, tar_mtime=now.mtime)
    return replace(index, body=data[index.body_start :])


def _cache_place(name: str) -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return os.path.join(cache, "mmssl", "index", digest + ".idx")


def _build(
    path: str, members: list[Member], skipped: Counter[str], size: int, mtime: int, version: str = ""
) -> ShardIndex:
    samples: list[tuple[str, dict[str, Member]]] = []
    open_samples: dict[str, dict[str, Member]] = {}
    for member in members:
        name = member[0]
        if "/" in name or name[:1] in "._":
            if _is_hidden(name):
                skipped["hidden"] += 1
                continue
            key, extension = split_name(name) or ("", "")
        else:  # the same, quicker, for most names
            key, _, extension = name.partition(".")
            extension = extension.lower()
        if not extension:
            skipped["no extension"] += 1
            continue
        sample = open_samples.get(key)
        if sample is None or extension in sample:
            sample = open_samples[key] = {}
            samples.append((key, sample))
        sample[extension] = member
    if not samples:
        found = ", ".join(f"{n} x {kind}" for kind, n in skipped.items()) or "nothing"
        raise ShardError(f"shard {shown(path)}: holds no sample (found: {found}); names like 000000012.jpg are needed")
    names = list(chain.from_iterable(sample for _, sample in samples))
    flat = list(chain.from_iterable(sample.values() for _, sample in samples))
    codes = {extension: code for code, extension in enumerate(dict.fromkeys(names))}
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in samples]
    arrays = (
        np.cumsum([0, *(len(sample) for _, sample in samples)]),
        [member[1] for member in flat],
        [member[2] for member in flat],
        list(map(codes.__getitem__, names)),
        np.cumsum([0, *map(len, keys)]),
    )
    body = b"".join([*(np.asarray(array, "<i8").tobytes() for array in arrays), *keys])
    extensions = dict(Counter(names))  # in the order of codes
    digest = hashlib.blake2b(json.dumps(list(codes)).encode() + body, digest_size=16).hexdigest()
    crc = zlib.crc32(body)
    return ShardIndex(
        path, size, mtime, len(samples), extensions, dict(skipped), digest, 0, len(body), crc, version, body=body
    )


_STORED = {
    "tar_size": int,
    "tar_mtime": int,
    "samples": int,
    "extensions": dict,
    "skipped": dict,
    "digest": str,
    "body_size": int,
    "body_crc": int,
    "version": str,
}


def _bytes(index: ShardIndex) -> bytes:
    assert index.body is not None
    head = json.dumps({name: getattr(index, name) for name in _STORED}).encode()
    head += b" " * (-(_START.size + len(head)) % 8)  # so that the numbers behind it are aligned
    return _START.pack(_MAGIC, len(head), zlib.crc32(head)) + head + index.body


def _store(index: ShardIndex, place: str) -> ShardIndex | None:
    """Write an index whole or not at all; None where that is not possible."""
    temporary = None
    data = _bytes(index)
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
        return None
    return replace(index, file=place, body=None, body_start=len(data) - index.body_size)


def _load(path: str, place: str) -> ShardIndex | None:
    """A stored index, or None if there is none that is whole."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, 4096)  # nearly always the whole head
        if len(data) >= _START.size and (end := _START.size + _START.unpack_from(data)[1]) > len(data):
            data = os.pread(fd, min(end, _LONGEST_HEAD), 0)
        return _parse(path, data, os.fstat(fd).st_size, place)
    except OSError:
        return None
    finally:
        os.close(fd)


def _parse(path: str, data: bytes, size: int, place: str | None) -> ShardIndex | None:
    """An index of ``size`` bytes from its beginning, which holds the head."""
    if len(data) < _START.size:
        return None
    magic, length, crc = _START.unpack_from(data)
    body_start = _START.size + length
    head = data[_START.size : body_start]
    if magic != _MAGIC or not length == len(head) > 0 or zlib.crc32(head) != crc:
        return None
    try:
        values = {"version": "", **json.loads(head)}  # older files do not know versions
    except (ValueError, TypeError, RecursionError):
        return None
    if any(not isinstance(values.get(name), kind) for name, kind in _STORED.items()):
        return None
    counts = [values["samples"], len(values["extensions"]), *values["extensions"].values(), *values["skipped"].values()]
    if not all(isinstance(n, int) and n > 0 for n in counts) or body_start + values["body_size"] != size:
        return None
    return ShardIndex(path=path, file=place, body_start=body_start, **{name: values[name] for name in _STORED})
