"""Figures about shards: ``mmssl shards stats``.

Counts and bytes come from the indexes and are exact.  Sizes of pictures and lengths of texts come from samples spread
evenly over all shards, about 300 bytes of memory for each.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from mmssl.curation.parallel import ordered_map
from mmssl.data.members import IMAGE_EXTENSIONS, sample_text
from mmssl.data.shards import ShardSet
from mmssl.data.tokenizer import TextTokenizer
from mmssl.draws import mix
from mmssl.types import BadSample

_CHUNK = 256  # samples at a time for a process
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
SMALL_SIDE = 224  # pixels: the side that most recipes train on
LONG_TEXT = 512  # tokens: the longest text that most recipes train on


class _Tools(NamedTuple):
    shards: ShardSet
    tokenizer: TextTokenizer | None


@dataclass
class _Seen:
    """What was seen in some samples."""

    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    unknown: int = 0
    texts: list[int] = field(default_factory=list)  # hashes
    bad: Counter[str] = field(default_factory=Counter)


def places(total: int, wanted: int) -> NDArray[np.int64]:
    """``wanted`` of ``total`` numbers: one from each of as many equal stretches, drawn by hash; 0 means all."""
    if wanted == 0 or wanted >= total:
        return np.arange(total, dtype=np.int64)
    draws = np.array([mix(0, stretch) % (1 << 32) for stretch in range(wanted)], np.float64) / 2**32
    bounds = np.arange(wanted + 1, dtype=np.int64) * total // wanted
    return bounds[:-1] + (draws * np.diff(bounds)).astype(np.int64)


def statistics(
    shards: ShardSet,
    tokenizer: TextTokenizer | None,
    samples: int,
    jobs: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Everything that ``mmssl shards stats`` shows, ready for JSON.

    Args:
        shards: what to look at.
        tokenizer: to count tokens with, if there is one.
        samples: how many are read; 0 means all.
        jobs: processes.
        progress: called with the number of samples read since the last call.
    """
    chosen = places(len(shards), samples)
    chunks = [chosen[at : at + _CHUNK] for at in range(0, len(chosen), _CHUNK)]
    total = _Seen()
    for chunk, part in zip(chunks, ordered_map(_look_at, _Tools(shards, tokenizer), chunks, jobs), strict=True):
        for name, value in vars(part).items():
            setattr(total, name, getattr(total, name) + value)
        progress(len(chunk))
    return {**_exact(shards), "samples_read": len(chosen), **_drawn(total, tokenizer)}


def _look_at(tools: _Tools, chosen: NDArray[np.int64]) -> _Seen:
    seen = _Seen()
    tools.shards.prefetch(chosen.tolist())
    for index in chosen.tolist():
        sample = tools.shards.read(index)
        image = next((sample.members[name] for name in IMAGE_EXTENSIONS if name in sample.members), None)
        if image is not None:
            _look_at_image(seen, image)
        if "txt" in sample.members or "json" in sample.members:
            try:
                text = sample_text(sample)
            except BadSample as bad:
                if "txt" in sample.members or bad.reason != "no_text":  # fields without a caption are no bad text
                    seen.bad[bad.reason] += 1
            else:
                _look_at_text(seen, text, tools.tokenizer)
    return seen


def _look_at_image(seen: _Seen, data: bytes) -> None:
    try:
        with PIL.Image.open(BytesIO(data), formats=_FORMATS) as image:  # reads the header alone
            width, height = image.size
            kind = "JPEG" if image.format == "MPO" else str(image.format)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        seen.bad["unreadable_image"] += 1
        return
    seen.widths.append(width)
    seen.heights.append(height)
    seen.formats[kind] += 1


def _look_at_text(seen: _Seen, text: str, tokenizer: TextTokenizer | None) -> None:
    seen.characters.append(len(text))
    seen.words.append(len(text.split()))
    raw = text.encode("utf-8", "surrogatepass")  # JSON may hold half characters
    seen.texts.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
    if tokenizer is not None:
        ids = tokenizer.encode(text).ids
        seen.tokens.append(len(ids))
        seen.unknown += int((ids == tokenizer.unk_id).sum())


def _exact(shards: ShardSet) -> dict[str, Any]:
    members: dict[str, dict[str, int]] = {}
    for shard in shards.shards:
        body = shard.members()
        sums = np.bincount(body.codes, weights=body.sizes, minlength=len(shard.extensions))
        for (extension, count), size in zip(shard.extensions.items(), sums.tolist(), strict=True):
            entry = members.setdefault(extension, {"count": 0, "bytes": 0})
            entry["count"] += count
            entry["bytes"] += int(size)
    size = sum(shard.tar_size for shard in shards.shards)
    return {
        "shards": len(shards.shards),
        "samples": len(shards),
        "bytes": size,
        "bytes_per_sample": size / len(shards),
        "samples_per_shard": quantiles([shard.samples for shard in shards.shards]),
        "members": dict(sorted(members.items(), key=lambda item: -item[1]["count"])),
        "members_in_no_sample": dict(shards.skipped),
        "fingerprint": shards.fingerprint,
    }


def _drawn(seen: _Seen, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    figures: dict[str, Any] = {"bad": dict(seen.bad)}
    if seen.widths:
        shorter = np.minimum(seen.widths, seen.heights)
        figures["images"] = {
            "count": len(seen.widths),
            "width": quantiles(seen.widths),
            "height": quantiles(seen.heights),
            "short_side": quantiles(shorter),
            f"share_below_{SMALL_SIDE}": float((shorter < SMALL_SIDE).mean()),
            "formats": dict(seen.formats.most_common()),
        }
    if seen.texts:
        figures["texts"] = {
            "count": len(seen.texts),
            "characters": quantiles(seen.characters),
            "words": quantiles(seen.words),
            "share_duplicated": 1 - len(set(seen.texts)) / len(seen.texts),
        }
        if tokenizer is not None:
            figures["tokens"] = {
                "tokenizer": tokenizer.path,
                "vocabulary": tokenizer.vocab_size,
                "count": sum(seen.tokens),
                "per_text": quantiles(seen.tokens),
                f"share_of_texts_above_{LONG_TEXT}": float((np.array(seen.tokens) > LONG_TEXT).mean()),
                "share_unknown": seen.unknown / max(1, sum(seen.tokens)),
            }
    return figures


def quantiles(values: Any) -> dict[str, int]:
    """Smallest, largest, and five between: values that occur, so whole numbers."""
    found = np.quantile(np.asarray(values), list(QUANTILES.values()), method="inverted_cdf")
    return dict(zip(QUANTILES, map(int, found.tolist()), strict=True))
