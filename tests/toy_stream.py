"""Small shards and a small objective for the tests of the stream."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from webdataset import TarWriter

from mmssl.data.crops import RandomResizedCrop
from mmssl.data.images import load_image
from mmssl.data.members import sample_image, sample_text
from mmssl.draws import Draws
from mmssl.types import BadSample, Batch, Image, Sample, Text


def jpeg(seed: int, size: tuple[int, int] = (24, 20), **options: int) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(rough).resize(size).save(file, "JPEG", **options)
    return file.getvalue()


def write_shards(folder: Path, samples: int, shards: int = 3, pictures: bool = False, prefix: str = "") -> str:
    """Text (and picture) shards written by webdataset itself; returns a brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for i in range(shard * samples // shards, (shard + 1) * samples // shards):
                sample = {"__key__": f"{prefix}{i:06d}", "txt": f"text {i}".encode()}
                writer.write({**sample, "jpg": jpeg(i)} if pictures else sample)
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def number(key: str) -> int:
    """The sample's number, from a key of a batch."""
    return int(key.rpartition("/")[2][-6:])


@dataclass(frozen=True)
class ToyText:
    """Tokens are the text's bytes; one of them is hidden."""

    needs: tuple[str, ...] = ("text",)

    def sample(self, sample: Sample, draws: Draws, index: int) -> tuple[bytes, int]:
        text = sample_text(sample).encode()
        if text == b"bad":
            raise BadSample("toy")
        return text, draws.integer(len(text))

    def collate(self, examples: list[tuple[bytes, int]], valid: list[bool] | None = None) -> Batch:
        starts = np.cumsum([0, *(len(text) for text, _ in examples)])
        ids = torch.tensor(list(b"".join(text for text, _ in examples)))
        use = valid or [True] * len(examples)
        pairs = zip(starts, examples, use, strict=False)
        hidden = torch.tensor([int(at) + place for at, (_, place), u in pairs if u], dtype=torch.long)
        text = Text(ids, torch.from_numpy(starts.astype(np.int32)), 64, hidden, ids[hidden])
        return Batch(index=0, keys=[], text=text, counts={"text": len(hidden)})


@dataclass(frozen=True)
class ToyImage:
    crop: RandomResizedCrop = field(default_factory=lambda: RandomResizedCrop(16))
    needs: tuple[str, ...] = ("image",)

    def sample(self, sample: Sample, draws: Draws, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = load_image(sample_image(sample), self.crop, draws)
        return pixels, torch.from_numpy(draws.permutation(4))

    def collate(self, examples: list[tuple[torch.Tensor, torch.Tensor]], valid: list[bool] | None = None) -> Batch:
        order = torch.stack([order for _, order in examples])
        pixels = torch.stack([pixels for pixels, _ in examples])
        count = len(examples) if valid is None else sum(valid)
        return Batch(index=0, keys=[], image=Image(pixels, order[:, :1], order[:, 1:]), counts={"image": count})


def same(a: Batch, b: Batch) -> bool:
    """Equal to the bit."""
    pairs = []
    if a.text is not None and b.text is not None:
        pairs += [(a.text.input_ids, b.text.input_ids), (a.text.hidden, b.text.hidden)]
    if a.image is not None and b.image is not None:
        pairs += [(a.image.pixels, b.image.pixels), (a.image.hidden, b.image.hidden)]
    return a.index == b.index and a.keys == b.keys and bool(pairs) and all(torch.equal(x, y) for x, y in pairs)
