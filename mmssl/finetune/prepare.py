"""The loader's half of fine-tuning: pictures, texts or pairs with their label.

Axes: see :mod:`mmssl.types`.  L tokens of one text.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from mmssl.data.crops import Crop
from mmssl.data.images import load_image, stack
from mmssl.data.members import sample_image, sample_text
from mmssl.data.shards import ShardSet
from mmssl.data.tokenizer import TextTokenizer, beginning
from mmssl.draws import Draws
from mmssl.finetune.augment import Augment
from mmssl.finetune.labels import Labels
from mmssl.types import BadSample, Batch, Image, Sample, Text, ceil_to


class Example(NamedTuple):
    label: Any
    pixels: UInt8[Tensor, "C H W"] | None
    input_ids: Int[np.ndarray, " L"] | None


@dataclass(frozen=True)
class Tokens:
    """Tokenize and cut to ``max_tokens``, special tokens included: a text's beginning, as evaluation always does.

    The packed axis is rounded up to ``pad_to_multiple_of`` tokens.
    """

    tokenizer: TextTokenizer
    max_tokens: int
    pad_to_multiple_of: int = 1

    def sample(self, sample: Sample) -> NDArray[np.int64]:
        encoded = self.tokenizer.encode(sample_text(sample))
        if not (encoded.word_ids >= 0).any():
            raise BadSample("no_text", "the text has no token besides special ones")
        return beginning(encoded.ids, self.max_tokens).astype(np.int64)

    def collate(self, texts: list[NDArray[np.int64]]) -> Text:
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids in texts])])
        ids = np.concatenate(texts)
        if self.pad_to_multiple_of > 1:  # the padding is a segment of its own, possibly empty
            total = ceil_to(len(ids), self.pad_to_multiple_of)
            ids = np.concatenate([ids, np.full(total - len(ids), self.tokenizer.pad_id)])
            starts = np.append(starts, total)
        nothing = torch.empty(0, dtype=torch.int64)  # is hidden
        return Text(
            torch.from_numpy(ids),
            torch.from_numpy(starts.astype(np.int32)),
            max(self.max_tokens, self.pad_to_multiple_of),
            nothing,
            nothing,
        )


@dataclass(frozen=True)
class PrepareLabelled:
    """Decode, crop, augment, tokenize, read the label.

    Args:
        crop: None for texts alone.
        tokens: None for pictures alone.
        labels: how the label is read.
        patches: of a picture, all of which are visible.
        augment: what is done to a cropped picture, in order.
    """

    crop: Crop | None
    tokens: Tokens | None
    labels: Labels
    patches: int
    augment: tuple[Augment, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        parts = {"image": self.crop is not None, "text": self.tokens is not None, "label": self.labels.required}
        return tuple(name for name, needed in parts.items() if needed)

    def check(self, shards: ShardSet) -> None:
        """Raises ValueError for shards whose labels cannot be used."""
        self.labels.check(shards)

    def sample(self, sample: Sample, draws: Draws, index: int) -> Example:
        label = self.labels.of(sample)
        pixels = None if self.crop is None else self._picture(sample, self.crop, draws)
        return Example(label, pixels, None if self.tokens is None else self.tokens.sample(sample))

    def _picture(self, sample: Sample, crop: Crop, draws: Draws) -> UInt8[Tensor, "C H W"]:
        pixels = load_image(sample_image(sample), crop, draws)
        for change in self.augment:
            pixels = change(pixels, draws)
        return pixels

    def collate(self, examples: list[Example], valid: list[bool] | None = None) -> Batch:
        pixels = [e.pixels for e in examples if e.pixels is not None]
        texts = [e.input_ids for e in examples if e.input_ids is not None]
        return Batch(
            index=0,
            keys=[],
            image=_whole(pixels, self.patches) if pixels else None,
            text=self.tokens.collate(texts) if self.tokens is not None else None,
            labels=self.labels.target.stack([e.label for e in examples]),
            counts={"label": sum(valid) if valid is not None else len(examples)},
        )


@dataclass(frozen=True)
class PreparePair:
    """Decode, crop, tokenize: pairs that need no label.  Arguments as those of :class:`PrepareLabelled`."""

    crop: Crop | None
    tokens: Tokens
    patches: int
    needs: tuple[str, ...] = ("image", "text")

    def sample(self, sample: Sample, draws: Draws, index: int) -> Example:
        assert self.crop is not None
        return Example(None, load_image(sample_image(sample), self.crop, draws), self.tokens.sample(sample))

    def collate(self, examples: list[Example], valid: list[bool] | None = None) -> Batch:
        return Batch(
            index=0,
            keys=[],
            image=_whole([e.pixels for e in examples if e.pixels is not None], self.patches),
            text=self.tokens.collate([e.input_ids for e in examples if e.input_ids is not None]),
            counts={"contrastive": sum(valid) if valid is not None else len(examples)},
        )


def _whole(pixels: list[UInt8[Tensor, "C H W"]], patches: int) -> Image:
    """Pictures of which all is visible."""
    visible = torch.arange(patches).expand(len(pixels), -1)
    return Image(stack(pixels), visible, visible[:, :0])
