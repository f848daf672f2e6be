"""Writing shards in the img2dataset layout from records: what ``mmssl shards write`` does.

The same records and options give the same bytes, however many processes work on them: processes only prepare
samples, and one writes them, in order.  A shard gets its final name when it is whole and on disk, never before.

In memory lie about 10 bytes a sample (hashes of keys), and with ``shuffle`` all records: of a folder their paths, of a
table its rows with everything that stands in them.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO

import numpy as np

from mmssl.curation.parallel import ordered_map
from mmssl.curation.records import Preparation, Record, prepare_chunk
from mmssl.data.index import index_shard

_CHUNK = 16  # records at a time for a process
_PARTIAL = ".partial"


@dataclass
class Written:
    """What was written: paths of shards by part ("train", "val"), samples and bytes by part, and what was not."""

    shards: dict[str, list[str]] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


def write_shards(
    records: Iterable[Record],
    out: str,
    preparation: Preparation,
    samples_per_shard: int = 10_000,
    shard_bytes: int | None = None,
    val_part: float = 0.0,
    shuffle: int | None = None,
    jobs: int = 1,
    progress: Callable[[Written, int], None] | None = None,
) -> Written:
    """Write ``out/train-000000.tar`` and so on (and ``val-``), their indexes, and ``skipped.jsonl`` if there is need.

    Args:
        records: what to write; keys are made unique by leaving out (and naming) the second of a kind.
        out: a folder without shards; it is made.
        preparation: see there.
        samples_per_shard: the most samples in a shard.
        shard_bytes: a shard ends, too, with the sample that would pass this size.
        val_part: part of the keys, chosen by their hash, that goes to validation: a document's pieces stay together,
            and a key is on the same side however much data is added.
        shuffle: a seed: the records are shuffled first.
        jobs: processes.
        progress: called with the number of records done since the last call.

    Raises:
        ValueError: for options that make no sense and a folder that holds shards.
        OSError: where the folder cannot be written.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; give at least 1")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError("shard_mb must be above 0")
    if not 0 <= val_part < 1:
        raise ValueError(f"val_part is {val_part}; give a part of the samples from 0 to below 1, such as 0.01")
    _claim(out)
    records = _numbered(records)  # before they are shuffled: a number says where a sample comes from
    if shuffle is not None:
        records = list(records)
        # By hash: the same order with every version of Python.
        records = [records[i] for i in sorted(range(len(records)), key=lambda i: _hash(f"shuffle {shuffle} {i}"))]
    written, seen = Written(), _Seen()
    parts = {part: _Part(out, part, samples_per_shard, shard_bytes, written) for part in ("train", "val")}
    skipped = _Skipped(os.path.join(out, "skipped.jsonl"), written.skipped)
    try:
        chunks = ordered_map(prepare_chunk, preparation, _chunks(records), jobs)
        for made in (made for chunk in chunks for made in chunk):
            if made.problem is not None:
                skipped.add(made.where, *made.problem)
            written.notes.update(made.notes)
            part = parts["val" if _share(made.root) < val_part else "train"]
            for key, members in made.samples:
                if seen.add(key):
                    part.write(key, members)
                else:
                    skipped.add(made.where, "duplicate_key", f"the key {key!r} is that of an earlier sample")
            if progress is not None:
                progress(written, 1)
        for part in parts.values():
            part.finish()
        if progress is not None:
            progress(written, 0)
    finally:
        skipped.close()
        for part in parts.values():
            part.abandon()
    return written


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _numbered(records: Iterable[Record]) -> Iterator[Record]:
    for number, record in enumerate(records):
        record.key = record.key if record.key is not None else f"{number:09d}"
        yield record


class _Part:
    """The shards of one part: whole or absent, and followed by their index."""

    def __init__(self, out: str, part: str, most_samples: int, most_bytes: int | None, written: Written) -> None:
        self._out, self._part = out, part
        self._most_samples, self._most_bytes = most_samples, most_bytes
        self._written = written
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def write(self, key: str, members: dict[str, bytes]) -> None:
        size = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
        full = self._samples >= self._most_samples
        if self._tar is not None and self._most_bytes is not None:
            full = full or self._tar.offset + size > self._most_bytes
        if full:
            self.finish()
        if self._tar is None:
            paths = self._written.shards.setdefault(self._part, [])
            self._path = os.path.join(self._out, f"{self._part}-{len(paths):06d}.tar")
            self._file = open(self._path + _PARTIAL, "wb")  # noqa: SIM115  # closed by finish()
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        for extension, data in members.items():
            # Owner, time and rights are TarInfo's own: nobody, 1970, rw-r--r--, on every machine.
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._samples += 1
        self._written.samples[self._part] += 1
        self._written.extensions.update(members.keys())

    def finish(self) -> None:
        """Give the shard under way its name, if there is one."""
        if self._tar is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path + _PARTIAL, self._path)
        index_shard(self._path)
        self._written.shards[self._part].append(self._path)
        self._written.bytes[self._part] += os.path.getsize(self._path)
        self._tar, self._samples = None, 0

    def abandon(self) -> None:
        """Remove the half shard under way, if there is one."""
        if self._tar is not None:
            self._file.close()
            os.unlink(self._path + _PARTIAL)
            self._tar = None


class _Skipped:
    """A JSON line for everything that was not written; the file exists only if there is a line."""

    def __init__(self, path: str, counts: Counter[str]) -> None:
        self._path, self._counts = path, counts
        self._file: IO[str] | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, where: str, reason: str, detail: str) -> None:
        if self._file is None:
            self._file = open(self._path, "w", encoding="ascii")  # noqa: SIM115  # closed by close()
        self._counts[reason] += 1
        self._file.write(json.dumps({"source": where, "reason": reason, "detail": detail}) + "\n")


class _Seen:
    """Which keys there were, by 8-byte hashes: the newest in a set, all others in one sorted array."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._old = np.empty(0, np.uint64)

    def add(self, key: str) -> bool:
        """False if the key was there before."""
        value = _hash(key)
        at = int(np.searchsorted(self._old, np.uint64(value)))
        if value in self._new or (at < len(self._old) and int(self._old[at]) == value):
            return False
        self._new.add(value)
        if len(self._new) >= max(100_000, len(self._old) // 8):
            self._old = np.sort(np.concatenate([self._old, np.fromiter(self._new, np.uint64, len(self._new))]))
            self._new.clear()
        return True


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _share(key: str) -> float:
    return _hash("val " + key) / 2**64


def _claim(out: str) -> None:
    """Make the folder, or see that it holds no shards.  Raises ValueError."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file; give a folder that is to hold the shards")
    try:
        os.makedirs(out, exist_ok=True)
        names = sorted(os.listdir(out))
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}); give another --out") from None
    stopped = [name for name in names if name.endswith(_PARTIAL)]
    if stopped:
        raise ValueError(
            f"{out} holds {stopped[0]}: shards are being written there, or were until that was stopped; "
            "delete the folder, or give another --out"
        )
    shards = [name for name in names if name.endswith(".tar")]
    if shards:
        raise ValueError(f"{out} holds {len(shards)} shards already (such as {shards[0]}); give another --out")
    if "skipped.jsonl" in names:
        os.unlink(os.path.join(out, "skipped.jsonl"))
