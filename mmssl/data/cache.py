"""The node-local cache: pieces of remote shards as files, shared by all processes of a node.

A piece is there whole or not at all: it is written under a temporary name and renamed.  A temporary file is locked
(flock) by its writer, so one without a lock was left by a process that died, and is removed.  Of several processes
or threads that want the same piece, one fetches it and the others wait; the lock for that (a POSIX record lock on one
byte of the file ``lock``) falls with the process that holds it.

When the pieces together would exceed the limit, those are deleted that were not used for the longest time.  A file that
some process still has open is deleted as well, and goes on to be readable there; its room on the disk is free when it
is closed.  So for a while more than the limit may be taken: at most a sixteenth of it, or four pieces, by each process.
Only files that end in ``.mmssl`` are counted and deleted; nothing else in the folder is touched.

Where the folder cannot be written, or its disk is full even after making room, there is one warning and reading goes
on without a cache: every sample is then fetched alone, when it is needed, and a few are held in memory.

Environment:
    MMSSL_CACHE: the folder, where none is given.  By default ``mmssl-cache-<uid>`` in $TMPDIR or /tmp.
"""

import errno
import fcntl
import hashlib
import os
import stat
import struct
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from mmssl.data.descriptors import opened

_SUFFIX = ".mmssl"
_TEMPORARY = ".tmp-"
_TOTAL = struct.Struct("<q")  # at the beginning of the lock file: bytes of all pieces
_FIRST_LOCK = 1 << 20  # the bytes of the lock file behind this one stand for pieces
_PATIENCE = 120.0  # seconds to wait for another process, which may be stopped, before fetching a piece twice
_WITHOUT = 60.0  # seconds without a cache, after the disk was full
_MEMORY = 64 << 20  # bytes of pieces in memory, where there is no other cache
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Piece:
    """Bytes at hand: an open file, or memory."""

    def __init__(self, content: int | bytes, size: int) -> None:
        self._content, self.size = content, size

    @property
    def stored(self) -> bool:
        return isinstance(self._content, int)

    def __del__(self) -> None:
        if isinstance(self._content, int):
            os.close(self._content)

    @property
    def deleted(self) -> bool:
        """Whether it lies in the cache no more, and takes room on the disk only because it is open."""
        return isinstance(self._content, int) and os.fstat(self._content).st_nlink == 0

    def pread(self, length: int, offset: int) -> bytes:
        if isinstance(self._content, int):
            return os.pread(self._content, length, offset)
        return self._content[offset : offset + length]


class Cache:
    """Pieces of remote files in a folder of this node.  Safe to fork and to pickle; safe to use from several threads.

    Args:
        folder: where; see above for the default.  Give a node's own disk, not one that nodes share.
        limit_gb: how much may lie there, in 10⁹ bytes.  All processes that use the folder should give the same.

    Attributes:
        fetches, fetched_bytes: how many pieces this object fetched in this process, and their size.

    Raises:
        ValueError: for a limit that is not above 0.
    """

    def __init__(self, folder: str | None = None, limit_gb: float = 50) -> None:
        if not limit_gb > 0:
            raise ValueError(f"cache_limit_gb is {limit_gb}; give a size above 0, in 10⁹ bytes")
        default = os.path.join(tempfile.gettempdir(), f"mmssl-cache-{os.getuid()}")
        self.folder = os.path.abspath(os.path.expanduser(folder or os.environ.get("MMSSL_CACHE") or default))
        self.limit = int(limit_gb * 1e9)
        self._own = self.folder == default  # in a folder that everybody can write to: make sure whose it is
        self.fetches = self.fetched_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "fetches": 0, "fetched_bytes": 0}

    @property
    def usable(self) -> bool:
        """Whether pieces can be stored.  If not, this was said in a warning."""
        return self._shared().usable(self)

    def has(self, name: str) -> bool:
        """Whether a piece is stored."""
        return os.path.exists(self._path(name))

    def close(self) -> None:
        """Close the lock file of the folder in this process.  For a folder that nothing reads of any more.

        To be called when no thread uses a cache on the folder; one that is used later begins anew.
        """
        with _registry_lock:
            shared = _registry.pop(self.folder, None)
        if shared is not None and shared.fd >= 0:
            os.close(shared.fd)

    def get(self, name: str, size: int, fetch: Callable[[], bytes]) -> Piece:
        """A piece: the stored one, or what ``fetch`` returns, which is then stored.

        Args:
            name: says what it is; equal names hold equal bytes.
            size: in bytes.
            fetch: makes the piece; called at most once at a time on this node.

        Raises:
            ShardError: what ``fetch`` raises.
        """
        shared = self._shared()
        piece = self._open(name, size) or shared.remembered(name)
        if piece is not None:
            return piece
        with shared.mutex:
            task = shared.pending.get(name)
            mine = task is None
            if task is None:
                task = shared.pending[name] = Future()
        if not mine:
            return task.result()
        try:
            task.set_result(self._fetch(shared, name, size, fetch))
        except BaseException as error:
            task.set_exception(error)
            raise
        finally:
            with shared.mutex:
                del shared.pending[name]
        return task.result()

    def _fetch(self, shared: "_Shared", name: str, size: int, fetch: Callable[[], bytes]) -> Piece:
        usable = shared.usable(self)
        with shared.lock_piece(name) if usable else _nothing():
            piece = self._open(name, size) if usable else None
            if piece is not None:  # another process was quicker
                return piece
            data = fetch()
            assert len(data) == size, "a fetch returns all or raises"
            with shared.mutex:
                self.fetches, self.fetched_bytes = self.fetches + 1, self.fetched_bytes + size
            if usable and self._store(shared, name, data):
                return self._open(name, size) or Piece(data, size)
        shared.remember(name, data)
        return Piece(data, size)

    def _open(self, name: str, size: int) -> Piece | None:
        path = self._path(name)
        try:
            fd = opened(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return None
        piece = Piece(fd, size)
        if os.fstat(fd).st_size != size:
            _remove(path)
            return None
        with suppress(OSError):  # deleted by another process in this moment, or a folder that became read-only
            os.utime(path)  # the last use, for eviction
        return piece

    def _store(self, shared: "_Shared", name: str, data: bytes) -> bool:
        """Write a piece whole or not at all.  False where it does not fit."""
        if len(data) > self.limit:
            shared.warn(
                "limit",
                f"cache {self.folder}: its limit of {self.limit / 1e9:g} GB is less than one piece of a shard "
                f"({len(data) / 1e9:g} GB), so nothing is kept; raise cache_limit_gb",
            )
            return False
        try:
            shared.reserve(len(data), self)
            try:
                self._write(name, data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                shared.make_room(self, 4 * len(data))
                self._write(name, data)
        except OSError as error:
            shared.give_up(self, error.strerror or str(error))
            return False
        return True

    def _write(self, name: str, data: bytes) -> None:
        fd, temporary = self._temporary()
        try:
            os.ftruncate(fd, len(data))  # counted in full from the beginning
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
            os.replace(temporary, self._path(name))
        except OSError:
            _remove(temporary)
            raise
        finally:
            os.close(fd)

    def _temporary(self) -> tuple[int, str]:
        while True:
            fd, path = tempfile.mkstemp(_SUFFIX, _TEMPORARY, self.folder)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:  # else another process took it for an orphan before it was locked
                return fd, path
            os.close(fd)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, hashlib.blake2b(name.encode(), digest_size=16).hexdigest() + _SUFFIX)

    def _shared(self) -> "_Shared":
        key = self.folder
        with _registry_lock:
            if key not in _registry:
                _registry[key] = _Shared(key)
            return _registry[key]


# ---- what all caches on one folder share in a process

_registry: dict[str, "_Shared"] = {}
_registry_lock = threading.Lock()


class _Shared:
    """One for each folder and process: closing any descriptor of the lock file would drop all locks of the process."""

    def __init__(self, folder: str) -> None:
        self.folder, self.fd, self.locks = folder, -1, True
        self.broken_until = 0.0
        self.warned: set[str] = set()
        self.after_fork()

    def after_fork(self) -> None:
        """Locks and tasks are of the parent's threads.  The descriptor may stay: record locks are a process's own."""
        self.mutex, self.ledger = threading.Lock(), threading.Lock()
        self.pending: dict[str, Future[Piece]] = {}
        self.memory: OrderedDict[str, bytes] = OrderedDict()

    def usable(self, cache: Cache) -> bool:
        if time.monotonic() < self.broken_until:
            return False
        if self.fd < 0:
            with self.mutex:
                if self.fd < 0:
                    try:
                        self.fd = self._begin(cache)
                    except OSError as error:
                        self.give_up(cache, error.strerror or str(error))
        return self.fd >= 0

    def _begin(self, cache: Cache) -> int:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        about = os.lstat(self.folder)  # of a link itself, which somebody else may turn elsewhere
        if cache._own and (about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode)):
            raise PermissionError(errno.EPERM, "belongs to another user, or is no folder")
        if cache._own and about.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "others may write to it (chmod go-w)")
        with tempfile.TemporaryFile(dir=self.folder):  # a right to write is seen now, not at the first piece
            pass
        fd = os.open(os.path.join(self.folder, "lock"), _LOCK_FLAGS, 0o600)
        _pieces(self.folder)  # removes what killed processes left
        return fd

    def give_up(self, cache: Cache, reason: str) -> None:
        self.broken_until = time.monotonic() + _WITHOUT
        self.warn(
            "broken",
            f"cache {self.folder}: {reason}; going on without a cache, which is slow and fetches every sample alone. "
            "Free its disk, or name another folder (data.cache_dir, or the environment's MMSSL_CACHE)",
        )

    def warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(text, stacklevel=2)

    @contextmanager
    def lock_piece(self, name: str) -> Iterator[None]:
        digest = hashlib.blake2b(name.encode(), digest_size=5).digest()
        place = _FIRST_LOCK + int.from_bytes(digest, "little")
        # Asked for again and again, not waited for: the kernel takes the threads of two processes that wait for each
        # other's processes for a deadlock.
        end, pause = time.monotonic() + _PATIENCE, 0.002
        while not (taken := self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)) and time.monotonic() < end:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
        try:
            yield
        finally:
            if taken:
                self._lock(fcntl.LOCK_UN, 1, place)

    def _lock(self, how: int, length: int, place: int) -> bool:
        if self.locks:
            try:
                fcntl.lockf(self.fd, how, length, place)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                if error.errno not in _NO_LOCKS:
                    raise
                self.locks = False  # a file system without locks: a piece may be fetched twice, nothing worse
        return True

    def reserve(self, size: int, cache: Cache) -> None:
        """Count a piece before it is written, and delete others where the limit would be passed."""
        with self.ledger:
            self._lock(fcntl.LOCK_EX, _TOTAL.size, 0)
            try:
                stored = os.pread(self.fd, _TOTAL.size, 0)
                # A lock file without a total is new, or the folder's files are older than it: count them.
                total = _TOTAL.unpack(stored)[0] + size if len(stored) == _TOTAL.size else cache.limit + 1
                if total > cache.limit:
                    total = _evict(self.folder, cache.limit, size)
                os.pwrite(self.fd, _TOTAL.pack(total), 0)
            finally:
                self._lock(fcntl.LOCK_UN, _TOTAL.size, 0)

    def make_room(self, cache: Cache, size: int) -> None:
        """On a full disk: the pieces that lie there give way to a new one."""
        with self.ledger:
            _evict(self.folder, max(size, sum(n for _, n, _ in _pieces(self.folder)) // 2), size)

    def remember(self, name: str, data: bytes) -> None:
        with self.mutex:
            self.memory[name] = data
            while len(self.memory) > 1 and sum(map(len, self.memory.values())) > _MEMORY:
                self.memory.popitem(last=False)

    def remembered(self, name: str) -> Piece | None:
        with self.mutex:
            data = self.memory.get(name)
            if data is not None:
                self.memory.move_to_end(name)
        return None if data is None else Piece(data, len(data))


def _evict(folder: str, limit: int, size: int) -> int:
    """Delete what was unused the longest, until a piece of ``size`` bytes fits.  Returns the bytes with that piece.

    A tenth more than needed is deleted, so that the folder is not read through for every piece.
    """
    pieces = sorted(_pieces(folder))
    total = size + sum(length for _, length, _ in pieces)
    if total <= limit:
        return total
    for _, length, path in pieces:
        if total <= limit - limit // 10:
            break
        if os.path.basename(path).startswith(_TEMPORARY):
            continue  # being written
        _remove(path)
        total -= length
    return total


def _pieces(folder: str) -> list[tuple[int, int, str]]:
    """(last use, bytes, path) of all pieces; temporary files that nobody writes any more are deleted."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(_SUFFIX):
                continue
            if entry.name.startswith(_TEMPORARY) and _is_orphan(entry.path):
                _remove(entry.path)
                continue
            try:
                about = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append((about.st_mtime_ns, about.st_size, entry.path))
    return found


def _is_orphan(path: str) -> bool:
    """Whether the writer of a temporary file is gone.  The file is deleted while it is locked."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _forget() -> None:
    global _registry_lock
    _registry_lock = threading.Lock()
    for shared in _registry.values():
        shared.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
