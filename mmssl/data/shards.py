"""Shards: naming them, and reading any sample of them at once.

A shard is a plain tar in the WebDataset layout: ``000000012.jpg``, ``000000012.txt``, ... belong together, see
:mod:`mmssl.data.index`.  A sample is read by its number with one system call.  Nothing in a shard is ever unpickled
or run.
"""

import glob
import hashlib
import json
import os
import re
import time
import warnings
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, product
from operator import add
from typing import Any, NamedTuple

import numpy as np

from mmssl.data.cache import Cache
from mmssl.data.extents import Extents, check_header
from mmssl.data.index import Members, ShardIndex, index_shards
from mmssl.data.remote import base_name, find, has_magic, is_remote
from mmssl.data.tar import BLOCK, ShardError, open_shard, read_exactly
from mmssl.types import Sample

_OPEN_SHARDS = 256
_LOOK_AGAIN = 1.0  # seconds after which a shard that is open is asked for its size and time of change once more


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths and URLs of shards from paths, URLs, braces, globs and folders, in order.

    ``{000..127}`` counts (leading zeros are kept), ``{a,b}`` lists, ``* ? [ ]`` match files in sorted order, and a
    folder (of a remote store: a URL that ends in "/") stands for its ``*.tar``.  A missing file is not noticed here,
    an empty match is.

    Raises:
        ValueError: for a pattern that matches nothing, a shard named twice, a scheme that is not allowed (see
            :mod:`mmssl.data.remote`), or a glob of HTTP URLs, whose servers cannot list files.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        remote = is_remote(pattern)
        for part in _expand_braces(pattern if remote else _local(pattern)):
            if remote and (part.endswith("/") or has_magic(part)):
                found = [
                    url for url in find(part + "*.tar" if part.endswith("/") else part) if not url.endswith(".idx")
                ]
            elif remote:
                found = [part]
            elif os.path.isdir(part):
                found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
            elif glob.has_magic(part):
                found = sorted(path for path in glob.glob(part) if not path.endswith(".idx"))
            else:
                found = [part]
            if not found:
                where = "" if remote else f" (working folder {os.getcwd()})"
                raise ValueError(f"no shard matches {part!r}{where}; check the path")
            paths += found
    if not paths:
        raise ValueError("no shards are named; give a path, a brace pattern, a glob or a list of them")
    twice = [
        path for path, times in Counter(p if is_remote(p) else os.path.realpath(p) for p in paths).items() if times > 1
    ]
    if twice:
        raise ValueError(f"shard {twice[0]} is named twice ({len(twice)} such shards); name every shard once")
    return paths


def _real(path: str, folders: dict[str, str]) -> str:
    """As os.path.realpath, but quick for very many files of few folders."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def _local(pattern: str) -> str:
    return os.path.expanduser(re.sub("^file:(//)?", "", pattern, flags=re.IGNORECASE))


def _expand_braces(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise ValueError(f"shards {pattern!r}: braces do not match or are nested; list the patterns instead")
    choices = [[part] if i % 2 == 0 else _choices(part, pattern) for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if counted is None:
        return inside.split(",")
    first, last = int(counted[1]), int(counted[2])
    if not 0 <= last - first < 10_000_000:
        raise ValueError(f"shards {pattern!r}: {{{inside}}} does not count upwards; write {{first..last}}")
    return [str(n).zfill(len(counted[1])) for n in range(first, last + 1)]


class _Open(NamedTuple):
    """An open shard.  Memory views of the index: single numbers come out of them faster than out of NumPy arrays."""

    fd: int
    starts: memoryview
    offsets: memoryview
    sizes: memoryview
    codes: memoryview
    key_starts: memoryview
    keys: bytes | memoryview
    extensions: list[str]
    looked: list[float]  # the one moment of the last look at its size and time of change


def fingerprint(shards: Sequence[ShardIndex]) -> str:
    """Changes when shards are added, removed, reordered, renamed or repacked; not when their folder moves."""
    digest = hashlib.blake2b(digest_size=8)
    for shard in shards:
        digest.update(json.dumps([base_name(shard.path), shard.digest]).encode())
    return f"{digest.hexdigest()} ({sum(shard.samples for shard in shards)} samples in {len(shards)} shards)"


class ShardSet:
    """The samples of several shards under one running number, read in any order.

    Local shards are opened when first needed, at most 256 at a time.  Of remote ones neighbouring samples are fetched
    together, see :mod:`mmssl.data.extents`.  Safe to fork and to pickle.

    Args:
        patterns: see :func:`expand`.
        cache: for remote shards; the default one if there is none.
        progress: called with every shard's index when it is known.

    Raises:
        ShardError: for shards that are missing, damaged or empty.
        ValueError: see :func:`expand`.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        progress: Callable[[ShardIndex], None] | None = None,
        cache: Cache | None = None,
    ) -> None:
        paths = expand(patterns)
        missing = [path for path in paths if not is_remote(path) and not os.path.exists(path)]
        if missing:
            raise ShardError(
                f"shard {missing[0]}: not found ({len(missing)} of {len(paths)} are missing; "
                f"working folder {os.getcwd()}); check the path"
            )
        self.shards: list[ShardIndex] = index_shards(paths, progress=progress)
        self._starts = list(accumulate((shard.samples for shard in self.shards), initial=0))
        self._remote = [is_remote(shard.path) for shard in self.shards]
        self._extents = Extents(self.shards, self._starts, cache or Cache()) if any(self._remote) else None
        self._group = 1
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for shard in getattr(self, "_open", {}).values():
            os.close(shard.fd)

    @property
    def remote(self) -> bool:
        """Whether any shard lies in a remote store."""
        return self._extents is not None

    @property
    def cache(self) -> Cache | None:
        """Through which remote shards are read; None without any."""
        return None if self._extents is None else self._extents.cache

    @property
    def group(self) -> int:
        """How many neighbouring samples of a remote shard are fetched together; set it to the order's block."""
        return self._group

    @group.setter
    def group(self, samples: int) -> None:
        if samples < 1:
            raise ValueError(f"group is {samples}; give the number of samples that are fetched together")
        self._group = samples
        if self._extents is not None:
            self._extents.group = samples

    def prefetch(self, indices: Iterable[int]) -> None:
        """Begin to fetch what these samples need, in the background.  Does nothing for local shards."""
        if self._extents is not None:
            numbers = [(bisect_right(self._starts, index) - 1, index) for index in indices]
            self._extents.prefetch((n, index - self._starts[n]) for n, index in numbers if self._remote[n])

    def check_cache(self, groups: int) -> None:
        """Warn if the cache is too small to hold this many groups of samples at once, as the order needs them.

        Args:
            groups: on the whole node: lanes of its ranks times (blocks of a window + 1).
        """
        if self._extents is not None:
            remote = [shard for shard, is_one in zip(self.shards, self._remote, strict=True) if is_one]
            each = self._group * sum(shard.tar_size for shard in remote) / sum(shard.samples for shard in remote)
            cache, needed = self._extents.cache, min(groups * each, sum(shard.tar_size for shard in remote))
            if needed > cache.limit:
                warnings.warn(
                    f"cache {cache.folder}: its limit of {cache.limit / 1e9:.3g} GB is less than the "
                    f"{needed / 1e9:.3g} GB in use at once on this node: the same bytes will be fetched over and over; "
                    f"set data.cache_limit_gb to at least {1.1 * needed / 1e9:.3g}, or use fewer lanes",
                    stacklevel=2,
                )

    @property
    def extensions(self) -> Counter[str]:
        """Number of members by extension."""
        return sum((Counter(shard.extensions) for shard in self.shards), Counter())

    @property
    def skipped(self) -> Counter[str]:
        """Number of members that belong to no sample, by kind."""
        return sum((Counter(shard.skipped) for shard in self.shards), Counter())

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint`."""
        return fingerprint(self.shards)

    def read(self, index: int) -> Sample:
        """Sample number ``index``, with the bytes of all its members.

        Raises:
            ShardError: if the shard changed since it was indexed, or its disk fails.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        if self._remote[number]:
            assert self._extents is not None
            return self._extents.read(number, index - self._starts[number])
        path = self.shards[number].path
        shard = self._shard(number)
        local = index - self._starts[number]
        first, stop = shard.starts[local], shard.starts[local + 1]
        key = str(shard.keys[shard.key_starts[local] : shard.key_starts[local + 1]], "utf-8", "surrogateescape")
        sizes = shard.sizes[first:stop].tolist()
        offsets = shard.offsets[first:stop].tolist()
        low = min(offsets)
        span = max(map(add, offsets, sizes)) - low
        data = b""
        if span <= sum(sizes) + 4 * BLOCK * len(sizes):  # neighbours: one read for all
            data = read_exactly(shard.fd, span, low, path)
        members = {}
        for code, at, size in zip(shard.codes[first:stop].tolist(), offsets, sizes, strict=True):
            content = data[at - low : at - low + size] if data else read_exactly(shard.fd, size, at, path)
            members[shard.extensions[code]] = content
        return Sample(key, path, members)

    def _shard(self, number: int) -> _Open:
        shard = self._open.get(number)
        index = self.shards[number]
        if shard is not None:
            self._open.move_to_end(number)
            now = time.monotonic()
            if now - shard.looked[0] > _LOOK_AGAIN:
                shard.looked[0] = now
                _check_same(shard.fd, index)
            return shard
        fd = open_shard(index.path)
        try:
            _check_same(fd, index)
        except ShardError:
            os.close(fd)
            raise
        try:
            members = index.members()
        except (OSError, ShardError) as error:
            os.close(fd)
            raise ShardError(f"shard {index.path}: its index {index.file} cannot be read ({error})") from None
        try:
            _check_some(fd, index, members)
        except ShardError:
            os.close(fd)
            raise
        if len(self._open) >= _OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].fd)
        shard = self._open[number] = _Open(
            fd,
            members.starts.data,
            members.offsets.data,
            members.sizes.data,
            members.codes.data,
            members.key_starts.data,
            members.keys,
            list(index.extensions),
            [time.monotonic()],
        )
        return shard


def _check_same(fd: int, index: ShardIndex) -> None:
    stat = os.fstat(fd)
    if (stat.st_size, stat.st_mtime_ns) != (index.tar_size, index.tar_mtime):
        raise ShardError(f"shard {index.path}: changed since it was indexed; start again to index it anew")


def _check_some(fd: int, index: ShardIndex, members: Members) -> None:
    """Compare some headers, from the first to the last, with the index: it may be another tar's of this size and time.

    Raises ShardError.
    """
    extensions = list(index.extensions)
    count = len(members.offsets)
    for member in {i * (count - 1) // 7 for i in range(8)}:
        offset, size = int(members.offsets[member]), int(members.sizes[member])
        key = members.key(int(np.searchsorted(members.starts, member, "right")) - 1)
        header = read_exactly(fd, BLOCK, offset - BLOCK, index.path)
        check_header(header, index.path, (key, extensions[members.codes[member]]), offset, size)
