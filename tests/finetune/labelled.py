"""Shards of pairs with classes: the colour of the square."""

import json
from pathlib import Path

import webdataset
from pairs import TINY, caption, picture

TINY_TEXT = {"options": TINY["options"]}
CLASSES = 4


def write_labelled(path: Path, samples: int, labels: dict[int, object] | None = None, first: int = 0) -> str:
    """A shard with .png, .txt, .cls and .json; ``labels`` puts something else into a .cls, or drops it.

    The .json: ``colour`` of the square, ``colours`` of square and paper, ``red``, two numbers made of these.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(first, first + samples):
            colours = [i % CLASSES, (i * 7 + i // 4) % CLASSES]
            fields = {"colour": colours[0], "colours": colours, "red": [float(colours[0] == 0), 0.1 * colours[1]]}
            label = (labels or {}).get(i, i % CLASSES)
            parts = {"png": picture(i), "txt": caption(i), "json": json.dumps(fields).encode()}
            writer.write({"__key__": f"{i:06d}", **parts, **({} if label is None else {"cls": str(label)})})
    return str(path)
