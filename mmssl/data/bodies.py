"""The body of an index: which sample owns which members, and where in the tar these lie.

A stored body is mapped into memory, not read: its pages are the system's, shared by all processes of a node, and to
open it again after other shards costs a few system calls.
"""

import errno
import mmap
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmssl.data.descriptors import opened
from mmssl.data.tar import BLOCK, ShardError

Mark = tuple[int, int, int]  # inode, size and time of change (nanoseconds) of a file, to know it again


class Members(NamedTuple):
    """The body of an index: sample i owns the members starts[i]:starts[i + 1]."""

    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]  # in bytes
    sizes: NDArray[np.int64]  # in bytes
    codes: NDArray[np.int64]  # place of the extension in ShardIndex.extensions
    key_starts: NDArray[np.int64]
    keys: bytes | memoryview

    def key(self, sample: int) -> str:
        begin, end = self.key_starts[sample : sample + 2].tolist()
        return bytes(self.keys[begin:end]).decode("utf-8", "surrogateescape")


def mark(stat: os.stat_result) -> Mark:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def map_body(path: str, start: int, size: int) -> tuple[memoryview, Mark]:
    """``size`` bytes of a file from ``start`` on, which is its end.  Holds one descriptor as long as it is used.

    Raises:
        OSError: where the file cannot be opened or read.
        ShardError: if it has not so many bytes.
    """
    fd = opened(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        about = os.fstat(fd)
        if about.st_size != start + size:
            raise ShardError(f"index {path}: damaged; delete it, it will be made again")
        try:
            mapped: bytes | mmap.mmap = opened(lambda: mmap.mmap(fd, start + size, access=mmap.ACCESS_READ))
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            mapped = os.pread(fd, start + size, 0)  # file systems that map nothing
        return memoryview(mapped)[start:], mark(about)
    finally:
        os.close(fd)


def divide(body: bytes | memoryview, samples: int, members: int) -> Members | None:
    """The arrays of a body; None if it is too short for them."""
    if samples < 1 or members < samples or len(body) < 8 * (2 * samples + 2 + 3 * members):
        return None
    arrays, at = [], 0
    for length in (samples + 1, members, members, members, samples + 1):
        arrays.append(np.frombuffer(body, "<i8", length, at))
        at += 8 * length
    return Members(*arrays, keys=memoryview(body)[at:])  # type: ignore[arg-type]


def is_sound(members: Members, extensions: int, tar_size: int) -> bool:
    """Whether all numbers of an index point into its tar and into itself."""
    starts, offsets, sizes, codes, key_starts, keys = members
    return bool(
        starts[0] == key_starts[0] == 0
        and starts[-1] == len(offsets)
        and key_starts[-1] == len(keys)
        and (starts[1:] > starts[:-1]).all()
        and (key_starts[1:] >= key_starts[:-1]).all()
        and ((codes >= 0) & (codes < extensions)).all()
        and (offsets % BLOCK == 0).all()
        and ((offsets >= BLOCK) & (sizes >= 0) & (sizes <= tar_size - offsets)).all()
    )
