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
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

from mmssl.data.index import Members, ShardIndex, index_shards
from mmssl.data.tar import BLOCK, ShardError, open_shard, read_exactly
from mmssl.types import Sample

_REMOTE = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs", "ftp", "sftp", "hdfs", "webhdfs", "oci")
_OPEN_SHARDS = 256


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths of shards from paths, braces, globs and folders, in order.

    ``{000..127}`` counts (leading zeros are kept), ``{a,b}`` lists, ``* ? [ ]`` match files in sorted order, and a
    folder stands for its ``*.tar``.  A missing file is not noticed here, an empty match is.

    Raises:
        ValueError: for a pattern that matches nothing, a shard named twice, or a URL that is not a local path.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for part in _expand_braces(_local(pattern)):
            if os.path.isdir(part):
                found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
            elif glob.has_magic(part):
                found = sorted(path for path in glob.glob(part) if not path.endswith(".idx"))
            else:
                found = [part]
            if not found:
                raise ValueError(f"no shard matches {part!r} (working folder {os.getcwd()}); check the path")
            paths += found
    if not paths:
        raise ValueError("no shards are named; give a path, a brace pattern, a glob or a list of them")
    twice = [path for path, times in Counter(map(os.path.realpath, paths)).items() if times > 1]
    if twice:
        raise ValueError(f"shard {twice[0]} is named twice ({len(twice)} such shards); name every shard once")
    return paths


def _local(pattern: str) -> str:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", pattern)
    if not scheme:
        return os.path.expanduser(pattern)
    name = scheme[1].lower()
    if name == "file":
        return re.sub("^file:(//)?", "", pattern, flags=re.IGNORECASE)
    if name == "pipe":
        raise ValueError(f"shards {pattern!r}: pipe: would run a command, which data must not; give paths of tar files")
    if name in _REMOTE:
        raise ValueError(f"shards {pattern!r}: {name}: is not read directly yet; copy the shards to a local disk")
    raise ValueError(f"shards {pattern!r}: unknown scheme {name}:; give local paths (./{pattern} if this is a name)")


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
    fd: int
    members: Members
    extensions: list[str]


class ShardSet:
    """The samples of several shards under one running number, read in any order.

    Shards are opened when first needed, at most 256 at a time.  Safe to fork and to pickle.

    Args:
        patterns: see :func:`expand`.
        progress: called with every shard's index when it is known.

    Attributes:
        group: how many neighbouring samples of a remote shard are fetched together; set it to the order's block.

    Raises:
        ShardError: for shards that are missing, damaged or empty.
        ValueError: see :func:`expand`.
    """

    def __init__(self, patterns: str | Sequence[str], progress: Callable[[ShardIndex], None] | None = None) -> None:
        paths = expand(patterns)
        missing = [path for path in paths if not os.path.exists(path)]
        if missing:
            raise ShardError(
                f"shard {missing[0]}: not found ({len(missing)} of {len(paths)} are missing; "
                f"working folder {os.getcwd()}); check the path"
            )
        self.shards: list[ShardIndex] = index_shards(paths, progress=progress)
        self.group = 1
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + shard.samples)
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
        return False

    def prefetch(self, indices: Iterable[int]) -> None:
        """Begin to fetch what these samples need, in the background.  Does nothing for local shards."""

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
        """Changes when shards are added, removed, reordered, renamed or repacked; not when their folder moves."""
        digest = hashlib.blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(json.dumps([os.path.basename(shard.path), shard.digest]).encode())
        return f"{digest.hexdigest()} ({len(self)} samples in {len(self.shards)} shards)"

    def read(self, index: int) -> Sample:
        """Sample number ``index``, with the bytes of all its members.

        Raises:
            ShardError: if the shard changed since it was indexed, or its disk fails.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        path = self.shards[number].path
        fd, members, extensions = self._shard(number)
        local = index - self._starts[number]
        first, stop = members.starts[local : local + 2].tolist()
        offsets = members.offsets[first:stop].tolist()
        sizes = members.sizes[first:stop].tolist()
        names = [extensions[code] for code in members.codes[first:stop].tolist()]
        begin, end = members.key_starts[local : local + 2].tolist()
        key = bytes(members.keys[begin:end]).decode("utf-8", "surrogateescape")
        low = min(offsets)
        span = max(map(sum, zip(offsets, sizes, strict=True))) - low
        if span <= sum(sizes) + 4 * BLOCK * len(sizes):  # neighbours: one read for all
            data = read_exactly(fd, span, low, path)
            contents = [data[at - low : at - low + size] for at, size in zip(offsets, sizes, strict=True)]
        else:
            contents = [read_exactly(fd, size, at, path) for at, size in zip(offsets, sizes, strict=True)]
        return Sample(key, path, dict(zip(names, contents, strict=True)))

    def _shard(self, number: int) -> _Open:
        shard = self._open.get(number)
        if shard is not None:
            self._open.move_to_end(number)
            return shard
        index = self.shards[number]
        fd = open_shard(index.path)
        stat = os.fstat(fd)
        if (stat.st_size, stat.st_mtime_ns) != (index.tar_size, index.tar_mtime):
            os.close(fd)
            raise ShardError(f"shard {index.path}: changed since it was indexed; start again to index it anew")
        try:
            members = index.members()
        except (OSError, ShardError) as error:
            os.close(fd)
            raise ShardError(f"shard {index.path}: its index {index.file} cannot be read ({error})") from None
        if len(self._open) >= _OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].fd)
        shard = self._open[number] = _Open(fd, members, list(index.extensions))
        return shard
