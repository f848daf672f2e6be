"""Samples of remote shards, fetched by extents.

An extent is ``group`` neighbouring samples of a :class:`mmssl.data.shards.ShardSet`: extent e holds the samples from
e * group up to (e + 1) * group, cut where a shard ends.  With the order's block as group, extents are what one lane
reads, so no two ranks fetch the same one, and a rank fetches its own share of the bytes.  An extent is one range
request: from the header of its first member to the end of its last one.  Members that lie apart, with more than a
few percent of other bytes between them, are fetched by several requests.  Where samples are large, extents hold fewer
of them, so that one is at most about 64 MiB and a quarter of the cache's limit.

Every member's tar header comes with the extent and is compared with the index (checksum, size, name), and the store
is asked for the tar's size and version before it is read from, so a shard that changed is named and never used.
"""

import atexit
import os
import queue
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmssl.data.bodies import Mark, Members
from mmssl.data.cache import Cache, Piece
from mmssl.data.descriptors import make_room, register
from mmssl.data.index import ShardIndex, split_name
from mmssl.data.remote import Stat, check_same, fetch, is_http, is_remote, shown, stat
from mmssl.data.tar import BLOCK, ShardError, read_header
from mmssl.types import Sample

_LARGEST = 64 << 20  # bytes of an extent
_SMALL_GAP = 4096  # bytes that are fetched without need rather than asked around: an extended header fits
_PLANS = 4096
_FEW = 4  # pieces that are held open whatever their size
_LOOK_AGAIN = 1.0  # seconds after which it is looked whether open pieces were deleted
_THREADS = 8


class _Plan(NamedTuple):
    name: str  # in the cache
    parts: list[tuple[int, int]]  # [start, stop) in the tar; in the piece they lie one behind the other

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.parts)

    def place(self, offset: int) -> int:
        """Where a byte of the tar lies in the piece."""
        at = 0
        for start, stop in self.parts:
            if start <= offset < stop or offset == stop == self.parts[-1][1]:
                return at + offset - start
            at += stop - start
        raise AssertionError("an extent holds all bytes of its members")


class Extents:
    """Reads samples of remote shards through a cache.  Safe to fork and to pickle; threads are each process's own.

    Args:
        shards: all shards of the set.
        starts: number of each shard's first sample, and of all samples at the end.
        cache: where extents are held.
    """

    def __init__(self, shards: list[ShardIndex], starts: list[int], cache: Cache) -> None:
        self.shards, self.starts, self.cache = shards, starts, cache
        self.group = 1
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._members: OrderedDict[int, Members] = OrderedDict()
        self._plans: OrderedDict[tuple[int, int, int], _Plan] = OrderedDict()
        self._pieces: OrderedDict[str, Piece] = OrderedDict()
        self._checked: set[int] = set()
        self._asked: set[tuple[int, int, int]] = set()
        self._looked = time.monotonic()
        self._known: dict[int, Mark] = {}  # indexes that were looked through, by shard
        register(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def held(self) -> int:
        """Number of open files: pieces, and the indexes of shards."""
        return len(self._pieces) + len(self._members)

    def give_back(self) -> None:
        """Close the piece or the index that was unused the longest, whichever are more."""
        more: OrderedDict[Any, Any] = self._pieces if len(self._pieces) > len(self._members) else self._members
        with suppress(KeyError):  # nothing is open
            more.popitem(last=False)

    def read(self, number: int, local: int, alone: bool = False) -> Sample:
        """Sample ``local`` of shard ``number``; ``alone``: fetched without its neighbours, unless they are there."""
        if self._process != os.getpid():  # forked: a lock may be held by a thread that is not here
            self._begin()
        shard, members = self.shards[number], self._members_of(number)
        extent = self._extent(number, local)
        plan = self._plan(extent)
        if alone and extent not in self._asked and plan.name not in self._pieces and not self.cache.has(plan.name):
            extent = number, local, local + 1
            plan = self._plan(extent)
        piece = self._pieces.get(plan.name)
        if piece is None:
            make_room()
            piece = self._get(extent, plan)
            if piece.stored:
                self._hold(plan.name, piece)
        else:
            with suppress(KeyError):  # given back in this moment, by another thread
                self._pieces.move_to_end(plan.name)
        first, stop = members.starts[local : local + 2].tolist()
        extensions = list(shard.extensions)
        contents = {}
        for code, offset, size in zip(
            members.codes[first:stop].tolist(),
            members.offsets[first:stop].tolist(),
            members.sizes[first:stop].tolist(),
            strict=True,
        ):
            # An empty member has no place: it may end a part, and then another one begins there.
            contents[extensions[code]] = data = piece.pread(size, plan.place(offset)) if size else b""
            if len(data) < size:
                raise ShardError(
                    f"shard {shown(shard.path)}: its piece in the cache {self.cache.folder} is damaged; delete it"
                )
        return Sample(members.key(local), shown(shard.path), contents)

    def _hold(self, name: str, piece: Piece) -> None:
        """Keep a piece open: it is read again soon.  Those that were deleted meanwhile give back their room."""
        now = time.monotonic()
        if now - self._looked > _LOOK_AGAIN:
            self._looked = now
            for other in [key for key, one in list(self._pieces.items()) if one.deleted]:
                self._pieces.pop(other, None)
        self._pieces[name] = piece
        over = sum(one.size for one in list(self._pieces.values())) - self.cache.limit // 16
        while over > 0 and len(self._pieces) > _FEW:
            with suppress(KeyError):  # given back in this moment, by another thread
                over -= self._pieces.popitem(last=False)[1].size

    def prefetch(self, samples: Iterable[tuple[int, int]]) -> None:
        """Fetch the groups of these samples, (shard, local number) each, in the background."""
        if self._process != os.getpid():
            self._begin()
        groups: set[int] = set()
        for number, local in samples:
            group = (self.starts[number] + local) // self.group
            if not self.cache.usable:  # then every sample is fetched alone
                extents = [self._extent(number, local)]
            else:
                extents = [] if group in groups else list(self._extents_of(group))
            groups.add(group)
            for extent in extents:
                if extent not in self._asked:
                    self._asked.add(extent)
                    _in_background(self, extent)

    def fetch_now(self, extent: tuple[int, int, int]) -> None:
        """What a background thread does.  Errors are left to the read that needs the extent."""
        try:
            plan = self._plan(extent)
            if plan.name not in self._pieces:
                self._get(extent, plan)
        except ShardError:
            pass
        finally:
            self._asked.discard(extent)

    # ---- which samples are fetched together

    def _extent(self, number: int, local: int) -> tuple[int, int, int]:
        """(shard, first sample, one behind the last), counted in the shard."""
        shard, start = self.shards[number], self.starts[number]
        most = 1
        if self.cache.usable:
            limit = min(_LARGEST, self.cache.limit // 4)
            most = max(1, min(self.group, limit * shard.samples // shard.tar_size))
        index = start + local
        low = index // self.group * self.group
        first = low + (index - low) // most * most
        return number, max(first - start, 0), min(first + most, low + self.group, start + shard.samples) - start

    def _extents_of(self, group: int) -> Iterator[tuple[int, int, int]]:
        """All extents of a group: several where it goes over a shard's end, or its samples are large."""
        index, end = group * self.group, min((group + 1) * self.group, self.starts[-1])
        while index < end:
            number = bisect_right(self.starts, index) - 1
            if is_remote(self.shards[number].path):
                extent = self._extent(number, index - self.starts[number])
                yield extent
                index = self.starts[number] + extent[2]
            else:
                index = self.starts[number + 1]

    def _plan(self, extent: tuple[int, int, int]) -> _Plan:
        with self._lock:
            plan = self._plans.get(extent)
        if plan is None:
            number, first, stop = extent
            shard, members = self.shards[number], self._members_of(number)
            own = slice(*members.starts[[first, stop]].tolist())
            parts = cut(members.offsets[own], members.sizes[own], shard)
            path = shown(shard.path) if shard.version else shard.path  # a renewed signature names the same file
            plan = _Plan(f"{path} {shard.version} {shard.tar_size} {shard.digest} {parts}", parts)
            with self._lock:
                self._plans[extent] = plan
                if len(self._plans) > _PLANS:
                    self._plans.popitem(last=False)
        return plan

    def _members_of(self, number: int) -> Members:
        with self._lock:
            members = self._members.get(number)
            if members is None:
                shard = self.shards[number]
                make_room()
                try:
                    members, self._known[number] = shard.open_members(self._known.get(number))
                except (OSError, ShardError) as error:
                    raise ShardError(
                        f"shard {shown(shard.path)}: its index {shard.file} cannot be read ({error})"
                    ) from None
                self._members[number] = members
            else:
                with suppress(KeyError):  # given back in this moment, by another thread
                    self._members.move_to_end(number)
        return members

    # ---- fetching

    def _get(self, extent: tuple[int, int, int], plan: _Plan) -> Piece:
        return self.cache.get(plan.name, plan.size, lambda: self._fetch(extent, plan))

    def _fetch(self, extent: tuple[int, int, int], plan: _Plan) -> bytes:
        number, first, stop = extent
        shard = self.shards[number]
        known = Stat(shard.tar_size, shard.version, shard.tar_mtime)
        if number not in self._checked and not is_http(shard.path):  # HTTP tells it with every part
            check_same(shard.path, known, stat(shard.path))
            self._checked.add(number)
        data = b"".join(fetch(shard.path, start, end, known) for start, end in plan.parts)
        self._verify(number, first, stop, plan, data)
        return data

    def _verify(self, number: int, first: int, stop: int, plan: _Plan, data: bytes) -> None:
        """Compare every member's header with the index."""
        shard, members = self.shards[number], self._members_of(number)
        extensions = list(shard.extensions)
        for sample in range(first, stop):
            key = members.key(sample)
            for member in range(*members.starts[sample : sample + 2].tolist()):
                offset, size = int(members.offsets[member]), int(members.sizes[member])
                at = plan.place(offset - BLOCK)
                check_header(
                    data[at : at + BLOCK], shown(shard.path), (key, extensions[members.codes[member]]), offset, size
                )


def check_header(block: bytes, path: str, own: tuple[str, str], offset: int, size: int) -> None:
    """Raises ShardError if a member's header is not what the index says: key and extension, place, size."""
    header = read_header(block)
    if header is None or not _fits(header, own, size):
        raise ShardError(
            f"shard {path}: changed since it was indexed, or damaged: no header of {'.'.join(own)} "
            f"({size} bytes) at byte {offset - BLOCK}; start again to index it anew, or fetch it again"
        )


def _fits(header: tuple[str, int], own: tuple[str, str], size: int) -> bool:
    name = ".".join(own)
    long = len(name) > 97 or not name.isascii()  # may stand in an extended header, with anything here
    return (header[1] == size or size >= 8 << 30) and (split_name(header[0]) == own or long)


def cut(offsets: NDArray[np.int64], sizes: NDArray[np.int64], shard: ShardIndex) -> list[tuple[int, int]]:
    """The parts [start, stop) of a tar that hold these members with their headers, without much else."""
    starts = offsets - BLOCK
    stops = offsets + -(-sizes // BLOCK) * BLOCK
    if len(starts) == 0 or starts.min() < 0 or sizes.min() < 0 or (offsets + sizes).max() > shard.tar_size:
        raise ShardError(
            f"shard {shown(shard.path)}: its index {shard.file} is damaged; delete it, it will be made again"
        )
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    gaps = starts[1:] - stops[:-1]
    # The smallest gaps are read over, as long as they are small or together below 4 % of what is needed.
    by_size = np.argsort(gaps, kind="stable")
    apart = np.zeros(len(gaps), bool)
    apart[by_size] = (np.cumsum(gaps[by_size]) * 25 > (stops - starts).sum()) & (gaps[by_size] > _SMALL_GAP)
    first = np.flatnonzero(np.concatenate([[True], apart]))
    last = np.append(first[1:], len(starts)) - 1
    return [(int(a), min(int(b), shard.tar_size)) for a, b in zip(starts[first], stops[last], strict=True)]


# ---- background threads: daemons, or the end of a process would wait for what is not needed any more

_queue: "queue.SimpleQueue[tuple[Extents, tuple[int, int, int]]]" = queue.SimpleQueue()
_threads: list[threading.Thread] = []
_ending = threading.Event()


def _in_background(extents: Extents, extent: tuple[int, int, int]) -> None:
    _queue.put((extents, extent))
    if not _threads:
        atexit.register(_ending.set)
    if len(_threads) < _THREADS and _queue.qsize() > 0:
        _threads.append(threading.Thread(target=_work, args=(_queue,), name="mmssl-prefetch", daemon=True))
        _threads[-1].start()


def _work(tasks: "queue.SimpleQueue[tuple[Extents, tuple[int, int, int]]]") -> None:
    while True:
        extents, extent = tasks.get()
        try:
            extents.fetch_now(extent)
        except Exception:  # noqa: BLE001 (whatever it is, the read that needs the extent meets it as well)
            # At the end of the process loops and connections are closed while they are used here.
            if _ending.is_set():
                return
        del extents


def _forget() -> None:
    global _queue
    _queue = queue.SimpleQueue()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
