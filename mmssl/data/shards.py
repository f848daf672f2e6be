"""Shards: reading any sample of them at once.

A shard is a plain tar in the WebDataset layout: ``000000012.jpg``, ``000000012.txt``, ... belong together, see
:mod:`mmssl.data.index`.  A sample is read by its number with one system call.  Nothing in a shard is ever unpickled
or run.
"""

import hashlib
import json
import os
import time
import warnings
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from operator import add
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmssl.data.bodies import Mark, Members, mark
from mmssl.data.cache import Cache
from mmssl.data.descriptors import make_room, register
from mmssl.data.extents import Extents, check_header
from mmssl.data.index import ShardIndex, index_shards
from mmssl.data.patterns import expand
from mmssl.data.remote import base_name, is_remote
from mmssl.data.tar import BLOCK, ShardError, open_shard, read_exactly
from mmssl.types import Sample

_LOOK_AGAIN = 1.0  # seconds after which a shard that is open is asked for its size and time of change once more


class _File:
    """Closes a descriptor when nobody uses it any more: a thread may still read of a shard that is given back."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the program's end there is no os any more
        close(self.fd)


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
    file: _File  # keeps fd open
    looked: list[float]  # the one moment of the last look at its size and time of change


def fingerprint(shards: Sequence[ShardIndex]) -> str:
    """Changes when shards are added, removed, reordered, renamed or repacked; not when their folder moves."""
    digest = hashlib.blake2b(digest_size=8)
    for shard in shards:
        digest.update(json.dumps([base_name(shard.path), shard.digest]).encode())
    return f"{digest.hexdigest()} ({sum(shard.samples for shard in shards)} samples in {len(shards)} shards)"


class ShardSet:
    """The samples of several shards under one running number, read in any order.

    Local shards are opened when first needed and stay open as long as there are few enough of them, see
    :mod:`mmssl.data.descriptors`.  Of remote ones neighbouring samples are fetched together, see
    :mod:`mmssl.data.extents`.  Safe to fork and to pickle.

    Args:
        patterns: see :func:`mmssl.data.patterns.expand`.
        cache: for remote shards; the default one if there is none.
        progress: called with every shard's index when it is known.
        exact: take ``patterns`` for paths and URLs as they are, whatever signs they hold.

    Raises:
        ShardError: for shards that are missing, damaged or empty.
        ValueError: see :func:`mmssl.data.patterns.expand`.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        progress: Callable[[ShardIndex], None] | None = None,
        cache: Cache | None = None,
        exact: bool = False,
    ) -> None:
        paths = expand(patterns, exact)
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
        self._begin()

    def _begin(self) -> None:
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._known: dict[int, tuple[Mark, Mark]] = {}  # tar and index that were compared, by shard
        register(self)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_known")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def held(self) -> int:
        """Number of open files: two for each open shard, the tar and its index."""
        return 2 * len(self._open)

    def give_back(self) -> None:
        """Close the shard that was unused the longest."""
        with suppress(KeyError):  # none is open
            self._open.popitem(last=False)

    @property
    def remote(self) -> bool:
        """Whether any shard lies in a remote store."""
        return self._extents is not None

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

    def read(self, index: int, alone: bool = False) -> Sample:
        """Sample number ``index``, with the bytes of all its members.

        Args:
            index: its number.
            alone: of a remote shard, fetch this sample without its neighbours, which nobody is going to read.

        Raises:
            ShardError: if the shard changed since it was indexed, or its disk fails.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        if self._remote[number]:
            assert self._extents is not None
            return self._extents.read(number, index - self._starts[number], alone)
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
        if shard is None:
            return self._open_shard(number)
        try:  # noqa: SIM105 (this way it costs nothing)
            self._open.move_to_end(number)
        except KeyError:  # given back in this moment, by another thread
            pass
        now = time.monotonic()
        if now - shard.looked[0] > _LOOK_AGAIN:
            shard.looked[0] = now
            _check_same(os.fstat(shard.fd), self.shards[number])
        return shard

    def _open_shard(self, number: int) -> _Open:
        index, known = self.shards[number], self._known.get(number)
        make_room()
        file = _File(open_shard(index.path))
        tar = os.fstat(file.fd)
        _check_same(tar, index)
        try:
            members, own = index.open_members(known and known[1])
        except (OSError, ShardError) as error:
            raise ShardError(f"shard {index.path}: its index {index.file} cannot be read ({error})") from None
        # Looking at the whole index and at headers takes a hundred times as long as opening: once is enough.
        if known != (mark(tar), own):
            _check_some(file.fd, index, members)
            self._known[number] = mark(tar), own
        starts, offsets, sizes, codes, key_starts = map(_numbers, members[:5])
        shard = self._open[number] = _Open(
            file.fd,
            starts,
            offsets,
            sizes,
            codes,
            key_starts,
            members.keys,
            list(index.extensions),
            file,
            [time.monotonic()],
        )
        return shard


def _numbers(array: NDArray[np.int64]) -> memoryview:
    return array.view(np.uint8).data.cast("q")  # also where the numbers are not aligned, in older files


def _check_same(stat: os.stat_result, index: ShardIndex) -> None:
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
