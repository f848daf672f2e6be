"""One odd sample among good ones, through the real path: a tar, a ShardSet, a TrainStream, an objective."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
from pairs import caption, picture

from mmssl.data.shards import ShardSet
from mmssl.data.stream import Source, TrainStream
from mmssl.types import Batch, Prepare

SAMPLES = 10
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4, "crop_scale": (1.0, 1.0)}


def tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


class Outcome(NamedTuple):
    batch: Batch
    lines: list[dict[str, Any]]  # of bad_samples.jsonl
    keys: list[str]


def one_epoch(folder: Path, members: list[tuple[str, bytes]], prepare: Prepare, **options: Any) -> Outcome:
    """One batch that holds every sample of a shard once."""
    shards = ShardSet(tar(folder / "odd.tar", members))
    listed = folder / "bad_samples.jsonl"
    data = TrainStream(
        [Source("train", shards)],
        prepare,
        seed=3,
        batch_size=len(shards),
        lanes=1,
        bad_samples=str(listed),
        **options,
    )
    batch = data.batch(0)
    lines = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    return Outcome(batch, lines, [key.rpartition("/")[2] for key in batch.keys])


def pairs_with(odd: dict[str, bytes], at: int = 3) -> list[tuple[str, bytes]]:
    """Ten pairs, of which one has these members instead of its own."""
    members = []
    for i in range(SAMPLES):
        own = {"png": picture(i), "txt": caption(i).encode()} if i != at else odd
        members += [(f"{i:06d}.{extension}", content) for extension, content in own.items()]
    return members


def check_bad(outcome: Outcome, shard: Path, reason: str, key: str = "000003") -> str:
    """Replaced by another sample, counted in the batch's notes, named once in the file; returns the line's detail."""
    (line,) = outcome.lines
    assert (line["shard"], line["key"], line["reason"], line["epoch"]) == (str(shard), key, reason, 0)
    assert outcome.batch.notes == {f"bad/{reason}": 1}
    assert key not in outcome.keys
    assert len(outcome.keys) == SAMPLES  # the batch stays whole
    assert len(set(outcome.keys)) == SAMPLES - 1  # one sample stands for the bad one
    return str(line["detail"])


def encode(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PHOTO = encode(PIL.Image.effect_noise((96, 64), 60).convert("RGB"), "JPEG", quality=90)
