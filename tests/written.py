"""Pictures to write into shards, and what was written."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmssl.data.shards import ShardSet


def picture(i: int, size: tuple[int, int] = (90, 70), format: str = "JPEG", mode: str = "RGB") -> bytes:
    rough = np.random.default_rng(i).integers(0, 256, (5, 5, len(mode)), np.uint8)
    data = io.BytesIO()
    Image.fromarray(rough, mode).resize(size).save(data, format)
    return data.getvalue()


def read(out: Path | str, part: str = "train") -> dict[str, dict[str, bytes]]:
    shards = ShardSet(f"{out}/{part}-*.tar")
    samples = [shards.read(i) for i in range(len(shards))]
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample.members for sample in samples}


def skipped(out: Path | str) -> list[dict[str, str]]:
    path = Path(out) / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
