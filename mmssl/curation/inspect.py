"""Reading everything that a shard holds, to find what training would stumble over: ``mmssl shards check``.

compare.py looks at all shards together.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmssl.data.cache import Cache
from mmssl.data.images import decode_image
from mmssl.data.index import ShardIndex
from mmssl.data.members import IMAGE_EXTENSIONS, sample_text
from mmssl.data.remote import is_remote
from mmssl.data.shards import ShardSet
from mmssl.data.tar import BLOCK, ShardError, open_shard, scan
from mmssl.types import BadSample, Sample

SMALL_SIDE = 64  # pixels of the short side, below which a picture is worth a note
LARGE_PIXELS = 20_000_000  # pixels, above which decoding takes most of the time
LONG_TEXT = 100_000  # characters, above which nearly all of a text is cut off: cut documents into pieces
_GROUP = 128  # samples fetched at once from a remote store
KNOWN = {*IMAGE_EXTENSIONS, "txt", "json", "cls"}

# What can go wrong, in the words of the summary; any other reason for which a sample is bad counts as well.  Notes are
# told, but nothing is lost to them.
BAD = {
    "unusable_shard": "shards that cannot be used",
    "empty_image": "images of 0 bytes",
    "not_an_image": "images that are none",
    "truncated": "images cut short",
    "unreadable_image": "images that cannot be decoded",
    "too_large": "images too large to decode (64 megapixels)",
    "no_image": "samples without an image, where most have one",
    "no_text": "samples without text, where most have one, or with empty text",
    "no_json": "samples without .json, where most have one",
    "no_cls": "samples without .cls, where most have one",
    "not_utf8": "texts that are not UTF-8",
    "nul_in_text": "texts with zero bytes, as a damaged disk leaves them",
    "not_json": "JSON that is none",
    "nothing_to_train_on": "samples with neither image nor text",
    "duplicate_key": "samples whose key an earlier sample has",
}
NOTES = {
    "duplicate_content": "samples whose content an earlier sample has",
    "small_image": f"images with a short side below {SMALL_SIDE} pixels",
    "large_image": f"images above {LARGE_PIXELS // 1_000_000} megapixels",
    "long_text": f"texts above {LONG_TEXT:,} characters",
    "unknown_extension": "shards with extensions that training does not read",
    "not_in_samples": "shards with members that belong to no sample",
    "not_adjacent": "shards with samples whose members lie apart, which is slow to read",
}


class Finding(NamedTuple):
    """One thing that was found; ``key`` is "" where it concerns the shard."""

    shard: str
    key: str
    problem: str
    detail: str

    def line(self) -> str:
        return json.dumps(self._asdict() | {"bad": self.problem not in NOTES})


@dataclass
class ShardReport:
    """What one process found in one shard.  ``kinds[i]`` is the place in ``patterns`` of what sample i has."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    usable: bool = True
    samples: int = 0
    members: int = 0
    bytes: int = 0
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    contents: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    kinds: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    patterns: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Depth:
    """How much is looked at: ``images`` decodes every picture, ``duplicates`` compares contents."""

    images: bool = True
    duplicates: bool = False


def check_shard(depth: Depth, path: str) -> ShardReport:
    """Everything that can be said of a shard by itself."""
    report = ShardReport(path)
    try:
        _read_all(report, depth)
    except (ShardError, OSError) as error:
        # What was found in its samples until then stands: both are worth knowing.
        report.usable = False
        report.findings.append(Finding(path, "", "unusable_shard", str(error)))
    return report


def _read_all(report: ShardReport, depth: Depth) -> None:
    path = report.path
    offsets = _scan(path)  # anew: a stored index says nothing of what happened to the tar since
    with tempfile.TemporaryDirectory(prefix="mmssl-check-") as folder:  # what training has cached stays where it is
        cache = Cache(folder, limit_gb=1)
        try:
            shards = ShardSet([path], cache=cache, exact=True)
            shards.group = _GROUP
            _read_samples(report, shards, offsets, depth)
        finally:
            cache.close()


def _read_samples(report: ShardReport, shards: ShardSet, offsets: set[int] | None, depth: Depth) -> None:
    index = shards.shards[0]
    report.samples, report.members, report.bytes = len(shards), sum(index.extensions.values()), index.tar_size
    _look_at_index(report, index, offsets)
    patterns: dict[tuple[str, ...], int] = {}
    keys, contents, kinds = [], [], []
    for i in range(len(shards)):
        if i % _GROUP == 0:  # two requests ahead, of a remote shard
            shards.prefetch(range(i, min(i + 3 * _GROUP, len(shards)), _GROUP))
        sample = shards.read(i)
        has = _look_at(report, sample, depth)
        kinds.append(patterns.setdefault(has, len(patterns)))
        keys.append(_hash(sample.key.encode("utf-8", "surrogateescape")))
        if depth.duplicates:
            contents.append(_hash(_content(sample)))
    if len(patterns) > 256:  # unknown extensions do not count as kinds, so there are 16 at most
        raise AssertionError(f"{len(patterns)} patterns")
    report.keys = np.array(keys, np.uint64)
    report.contents = np.array(contents, np.uint64)
    report.kinds = np.array(kinds, np.uint8)
    report.patterns = list(patterns)


def _scan(path: str) -> set[int] | None:
    """Where members lie, from the tar's headers; None for a remote shard, whose headers are checked as they come."""
    if is_remote(path):
        return None
    descriptor = open_shard(path)
    try:
        return {member.offset for member in scan(descriptor, path)[0]}
    finally:
        os.close(descriptor)


def _look_at_index(report: ShardReport, index: ShardIndex, offsets: set[int] | None) -> None:
    path, members = report.path, index.members()
    outside = sum(index.skipped.get(kind, 0) for kind in ("hidden", "no extension"))
    if offsets is not None and (
        not offsets.issuperset(members.offsets.tolist()) or len(offsets) != report.members + outside
    ):
        raise ShardError(f"shard {path}: its index {index.file} lists other members than it has; delete the index")
    for extension, count in index.extensions.items():
        if extension not in KNOWN:
            hint = ": a key ends at its first dot" if "." in extension else ""
            detail = f"{count} members .{extension} are not read{hint}"
            report.findings.append(Finding(path, "", "unknown_extension", detail))
    for kind, count in index.skipped.items():
        report.findings.append(Finding(path, "", "not_in_samples", f"{count} x {kind}"))
    starts = members.starts[:-1]
    span = np.maximum.reduceat(members.offsets + members.sizes, starts) - np.minimum.reduceat(members.offsets, starts)
    apart = span > np.add.reduceat(members.sizes, starts) + 4 * BLOCK * np.diff(members.starts)
    if apart.any():
        key = members.key(int(apart.argmax()))
        report.findings.append(Finding(path, key, "not_adjacent", f"{int(apart.sum())} samples, this one first"))


def _look_at(report: ShardReport, sample: Sample, depth: Depth) -> tuple[str, ...]:
    """Check one sample; returns the kinds of members it has."""

    def tell(problem: str, detail: str) -> None:
        report.findings.append(Finding(report.path, sample.key, problem, detail))

    has: list[str] = [extension for extension in ("cls", "json") if extension in sample.members]
    image = next((extension for extension in IMAGE_EXTENSIONS if extension in sample.members), None)
    if image is not None:
        has.append("image")
        if depth.images:
            _look_at_image(sample.members[image], tell)
    if _has_text(sample, tell):
        has.append("text")
    if image is None and "text" not in has:
        tell("nothing_to_train_on", f"members {', '.join(sorted(sample.members))}")
    return tuple(has)


def _look_at_image(data: bytes, tell: Callable[[str, str], None]) -> None:
    try:
        _, height, width = decode_image(data).shape
    except BadSample as bad:
        tell(bad.reason, bad.detail)
        return
    if min(height, width) < SMALL_SIDE:
        tell("small_image", f"{width}x{height}")
    if height * width > LARGE_PIXELS:
        tell("large_image", f"{width}x{height}")


def _has_text(sample: Sample, tell: Callable[[str, str], None]) -> bool:
    """Whether there is a text, good or bad; what is bad is told."""
    fields: object = None
    if "json" in sample.members:
        try:
            fields = json.loads(sample.members["json"].decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            tell("not_utf8", f".json: {error}")
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
            tell("not_json", str(error))
    captioned = isinstance(fields, dict) and ("caption" in fields or "text" in fields)
    if "txt" not in sample.members and not captioned:  # fields without a caption are no broken text
        return False
    try:
        length = len(sample_text(sample))
    except BadSample as bad:
        tell(bad.reason, bad.detail)
    else:
        if length > LONG_TEXT:
            tell("long_text", f"{length} characters")
    return True


def _content(sample: Sample) -> bytes:
    image = next((sample.members[name] for name in IMAGE_EXTENSIONS if name in sample.members), None)
    return image if image is not None else b"\0".join(data for _, data in sorted(sample.members.items()))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
