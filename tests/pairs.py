"""Small real data: coloured squares with captions, as samples and as shards, and a tokenizer for them."""

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from mmssl.types import Sample

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "grey": (130, 130, 130)}
# Arguments that make any objective small; vit_tiny has 3 heads, which 48 divides by.
TINY = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 2, "num_heads": 3}}


def caption(i: int) -> str:
    """Captions of 7 to 12 words, so that no two samples pack alike."""
    names = list(COLOURS)
    tail = " ".join(["upon", "a", "wide", "table", "there"][: i % 6])
    return f"a {names[i % 4]} square with {names[(i * 7 + i // 4) % 4]} paper under it {tail}".strip()


def picture(i: int, size: int = 32) -> bytes:
    names = list(COLOURS)
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = COLOURS[names[(i * 7 + i // 4) % 4]]
    pixels[size // 4 : size // 2 + i % 10, size // 4 : 3 * size // 4] = COLOURS[names[i % 4]]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def sample(i: int) -> Sample:
    return Sample(f"{i:06d}", "memory.tar", {"png": picture(i), "txt": caption(i).encode()})


def write_shards(folder: Path, samples: int, shards: int = 2) -> str:
    """Shards of pairs by webdataset's own writer; returns their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"pairs-{shard}.tar")) as writer:
            for i in range(shard * samples // shards, (shard + 1) * samples // shards):
                writer.write({"__key__": f"{i:06d}", "png": picture(i), "txt": caption(i)})
    return str(folder / f"pairs-{{0..{shards - 1}}}.tar")
