"""What bench_stream.py compares: webdataset's pipelines as open_clip builds them, mmssl's streams, and a bare loop.

Every function returns an endless iterator of batch sizes: one item, one batch made (and received, if workers make it).
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import webdataset as wds
from torch import Tensor
from torchvision import transforms

from mmssl.data.crops import RandomResizedCrop, View
from mmssl.data.images import load_image
from mmssl.data.loader import Loader
from mmssl.data.members import sample_image, sample_text
from mmssl.data.order import choose_lanes
from mmssl.data.shards import ShardSet
from mmssl.data.stream import Source, TrainStream
from mmssl.draws import Draws
from mmssl.objectives.base import PrepareImage
from mmssl.objectives.mae import PrepareMAE
from mmssl.types import Batch, Prepare, Sample

# OpenAI's, as open_clip has them.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# open_clip keeps 5,000 samples from 1,000 on: while that grows two samples are read for each one given out.  1,000 from
# the start costs webdataset less.
SHUFFLE = 1000


def _convert_to_rgb(image: Any) -> Any:
    return image.convert("RGB")


def open_clip_transform(side: int, scale: tuple[float, float]) -> Any:
    """open_clip's ``image_transform(is_train=True)``; its own scale is (0.9, 1), MAE's (0.2, 1)."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
            _convert_to_rgb,
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )


def _same(text: str) -> str:
    return text


def webdataset_images(
    shards: list[str], batch: int, side: int, scale: tuple[float, float], workers: int
) -> Iterator[int]:
    """open_clip's ``get_wds_dataset`` with resampled shards; the caption is decoded and not tokenized, as in ours."""
    pipeline = wds.DataPipeline(
        wds.ResampledShards(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(SHUFFLE, initial=SHUFFLE),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=open_clip_transform(side, scale), text=_same),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    return _webdataset_sizes(pipeline, workers)


def webdataset_text(shards: list[str], batch: int, workers: int) -> Iterator[int]:
    pipeline = wds.DataPipeline(
        wds.ResampledShards(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(SHUFFLE, initial=SHUFFLE),
        wds.decode(),
        wds.to_tuple("txt"),
        wds.batched(batch, partial=False),
    )
    return _webdataset_sizes(pipeline, workers)


def _webdataset_sizes(pipeline: Any, workers: int) -> Iterator[int]:
    loader = wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=workers) if workers else pipeline
    for batch in loader:
        yield len(batch[0])


@dataclass(frozen=True)
class FloatImages:
    """MAE's half, with the pictures normalised here, where open_clip does it, and not on the device."""

    image: PrepareMAE
    needs: tuple[str, ...] = ("image",)

    def sample(self, sample: Sample, draws: Draws, index: int) -> Any:
        return self.image.sample(sample, draws, index)

    def collate(self, examples: list[Any], valid: list[bool] | None = None) -> Batch:
        batch = self.image.collate(examples, valid)
        assert batch.image is not None
        return replace(batch, image=replace(batch.image, pixels=normalise(batch.image.pixels)))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32, both channels-last: picture by picture, the fastest of five ways tried."""
    rows = pixels.permute(0, 2, 3, 1).flatten(2)  # [B, H, W * 3]
    mean, std = (255 * torch.tensor(values).repeat(pixels.shape[3]) for values in (MEAN, STD))
    floats = torch.empty(rows.shape)
    for row, made in zip(rows, floats, strict=True):
        made.copy_(row).mul_(1 / std).sub_(mean / std)
    return floats.view(len(pixels), *pixels.shape[2:], 3).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class RawText:
    """The text, decoded and no more: what webdataset's pipeline gives."""

    needs: tuple[str, ...] = ("text",)

    def sample(self, sample: Sample, draws: Draws, index: int) -> str:
        return sample_text(sample)

    def collate(self, examples: list[str], valid: list[bool] | None = None) -> Batch:
        return Batch(index=0, keys=[], counts={"text": len(examples)})


def mae(side: int, scale: tuple[float, float]) -> PrepareMAE:
    """What ``mmssl.MAE`` runs in the loader, patches of a fourteenth of the side."""
    return PrepareMAE(PrepareImage(RandomResizedCrop(side, scale), (14, 14), 0.75, "random"))


def mmssl_stream(
    shards: list[str], prepare: Prepare, batch: int, workers: int, lanes: int | None = None
) -> Iterator[int]:
    """Through the loader; with 0 workers in this process."""
    stream = TrainStream(
        [Source("bench", ShardSet(shards))], prepare, seed=0, batch_size=batch, lanes=lanes or choose_lanes(batch)
    )
    for made in Loader(stream, workers=workers):
        yield made.size


@dataclass(frozen=True)
class _Drawn:
    known: View

    def view(self, height: int, width: int, draws: Draws) -> View:
        return self.known


def bare_loop(shards: list[str], batch: int, side: int, scale: tuple[float, float], most: int) -> Iterator[int]:
    """Decode, crop and resize bytes that lie in memory, boxes drawn beforehand; nothing is read, drawn, stacked."""
    samples = ShardSet(shards)
    crop, work = RandomResizedCrop(side, scale), []
    for number in random.Random(0).sample(range(len(samples)), min(most, len(samples))):
        seen: list[View] = []
        data = sample_image(samples.read(number))
        load_image(data, _Recorded(crop, seen), Draws(number))
        work.append((data, _Drawn(seen[0])))
    nothing = Draws(0)
    endless = itertools.cycle(work)
    while True:
        for data, drawn in itertools.islice(endless, batch):
            load_image(data, drawn, nothing)
        yield batch


@dataclass(frozen=True)
class _Recorded:
    crop: RandomResizedCrop
    seen: list[View]

    def view(self, height: int, width: int, draws: Draws) -> View:
        self.seen.append(self.crop.view(height, width, draws))
        return self.seen[-1]
