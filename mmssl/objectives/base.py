"""What the objectives share: the text half and the picture half of ``prepare``, the head, the pixels.

An objective is one file with three classes: ``PrepareX`` (runs in the loader), ``XNetwork`` (the one module that
is sharded and called on the device) and ``X``, the LightningModule that users name in YAML.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor, nn

from mmssl.backbone import Backbone, Normalizes
from mmssl.backbone.make import make_backbone
from mmssl.data.crops import RandomResizedCrop, ResizeCenterCrop
from mmssl.data.images import load_image, stack
from mmssl.data.members import sample_image, sample_text
from mmssl.data.tokenizer import TextTokenizer
from mmssl.draws import Draws
from mmssl.masking.image import ImageStrategy, check_image_strategy, hide_patches
from mmssl.masking.text import HiddenTokens, TextStrategy, check_text_strategy, hide_tokens
from mmssl.pretrained.start import start_from
from mmssl.training.completion import Completion, split_by_sample
from mmssl.types import BadSample, Image, Loss, Sample, Text, ceil_to

Ratio = float | tuple[float, float] | list[float]  # of a list, exactly two: [first, last]


class ImageExample(NamedTuple):
    pixels: UInt8[Tensor, "C H W"]
    visible: NDArray[np.int64]
    hidden: NDArray[np.int64]


def check_ratio(name: str, ratio: Ratio) -> None:
    """Raises ValueError unless it is one number, or two, strictly between 0 and 1."""
    values = ratio if isinstance(ratio, tuple | list) else (ratio, ratio)
    if len(values) != 2:
        raise ValueError(f"{name} is {ratio}; give one number or [first, last]")
    for value in values:
        if not 0 < value < 1:
            raise ValueError(
                f"{name} is {value}; a part of the data must be hidden and a part seen: give 0 < ratio < 1"
            )


def ratio_at(ratio: Ratio, index: int, batches: int) -> float:
    """The ratio at a batch: fixed, or moving in a straight line from the first to the second value."""
    if not isinstance(ratio, tuple | list):
        return ratio
    first, last = ratio
    return first + (last - first) * min(1.0, index / max(1, batches - 1))


@dataclass(frozen=True)
class PrepareText:
    """Tokenize, cut to length, hide, pack.

    A text longer than ``max_tokens`` gives a random window in training and its beginning in evaluation.
    A scheduled ratio stands at its last value in evaluation, whatever batch it is told.
    The packed axis is rounded up to ``pad_to_multiple_of`` tokens (a power of two keeps compiled kernels few).
    """

    tokenizer: TextTokenizer
    max_tokens: int
    ratio: Ratio
    strategy: TextStrategy
    batches: int  # over which a scheduled ratio moves
    train: bool
    pad_to_multiple_of: int = 1

    def sample(self, sample: Sample, draws: Draws, index: int) -> HiddenTokens:
        encoded = self.tokenizer.encode(sample_text(sample))
        ids, word_ids = encoded.ids.astype(np.int64), encoded.word_ids.astype(np.int64)
        if len(ids) > self.max_tokens:
            # Keep the special tokens of both ends; the window lies between them.
            room = self.max_tokens - 2
            start = 1 + (draws.integer(len(ids) - 1 - room) if self.train else 0)
            keep = np.r_[0, start : start + room, len(ids) - 1]
            ids, word_ids = ids[keep], word_ids[keep]
        if not (word_ids >= 0).any():
            raise BadSample("no_text", "the text has no token besides special ones")
        return hide_tokens(
            ids,
            word_ids,
            draws,
            ratio=ratio_at(self.ratio, index if self.train else self.batches, self.batches),
            strategy=self.strategy,
            mask_id=self.tokenizer.mask_id,
            replacements=self.tokenizer.ordinary_ids,
        )

    def collate(self, examples: list[HiddenTokens], valid: list[bool] | None) -> Text:
        lengths = [len(e.input_ids) for e in examples]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        use = valid or [True] * len(examples)
        pairs = [(s, e) for s, e, u in zip(starts, examples, use, strict=False) if u]
        ids = np.concatenate([e.input_ids for e in examples])
        hidden = np.concatenate([start + e.hidden for start, e in pairs] or [np.empty(0, np.int64)])
        labels = np.concatenate([e.labels for _, e in pairs] or [np.empty(0, np.int64)])
        if self.pad_to_multiple_of > 1:
            # The padding is a segment of its own, possibly empty: cu_seqlens keeps one length for all batches.
            total = ceil_to(len(ids), self.pad_to_multiple_of)
            ids = np.concatenate([ids, np.full(total - len(ids), self.tokenizer.pad_id)])
            starts = np.append(starts, total)
        return Text(
            torch.from_numpy(ids),
            torch.from_numpy(starts.astype(np.int32)),
            max(self.max_tokens, self.pad_to_multiple_of),
            torch.from_numpy(hidden),
            torch.from_numpy(labels),
        )


@dataclass(frozen=True)
class PrepareImage:
    """Decode, crop, hide; every picture of a batch hides equally many patches."""

    transform: RandomResizedCrop | ResizeCenterCrop
    grid_size: tuple[int, int]
    ratio: float
    strategy: ImageStrategy

    def sample(self, sample: Sample, draws: Draws) -> ImageExample:
        pixels = load_image(sample_image(sample), self.transform, draws)
        return ImageExample(pixels, *hide_patches(self.grid_size, draws, ratio=self.ratio, strategy=self.strategy))

    def collate(self, examples: list[ImageExample]) -> Image:
        return Image(
            stack([e.pixels for e in examples]),
            torch.from_numpy(np.stack([e.visible for e in examples])),
            torch.from_numpy(np.stack([e.hidden for e in examples])),
        )


def check_image_masking(grid_size: tuple[int, int], ratio: float, strategy: str) -> None:
    """Raises ValueError for an unknown strategy, a ratio outside (0, 1), or a picture of one patch."""
    check_image_strategy(strategy)
    if isinstance(ratio, tuple | list):
        raise ValueError(f"mask_ratio of the image is {ratio}, but it does not move; give one number")
    check_ratio("mask_ratio of the image", ratio)
    if grid_size == (1, 1):
        raise ValueError("the picture is one single patch, which cannot be both seen and hidden; take smaller patches")


def check_text_masking(
    tokenizer: TextTokenizer, vocab_size: int | None, ratio: Ratio, strategy: str, max_tokens: int
) -> None:
    """Raises ValueError for an unknown strategy, a ratio outside (0, 1), another vocabulary, or no room for text."""
    check_text_strategy(strategy)
    check_ratio("mask_ratio of the text", ratio)
    if max_tokens < 3:
        raise ValueError(f"max_tokens is {max_tokens}, of which [CLS] and [SEP] take 2; give at least 3")
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size} but the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens; "
            "name the tokenizer this model was made for, or leave vocab_size out"
        )


class TextHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, then the token embedding transposed, plus a bias.

    Called with hidden positions only: [M, D] -> logits [M, vocabulary].
    """

    def __init__(self, embed_dim: int, token_embedding: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.out = nn.Linear(embed_dim, token_embedding.num_embeddings)
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)
        nn.init.zeros_(self.out.bias)
        self.out.weight = token_embedding.weight  # tied: one tensor serves both

    def forward(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M K"]:
        return cast(Tensor, self.out(self.norm(nn.functional.gelu(self.dense(hidden)))))


class Pixels(Normalizes):
    """uint8 pictures to normalised floats, and to and from patches of K = p * p * C numbers."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], patch_size: int, normalize_patches: bool
    ) -> None:
        super().__init__(mean, std)
        self.patch_size = patch_size
        self.patch_dim = patch_size**2 * len(mean)
        self.normalize_patches = normalize_patches

    def forward(self, pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.normalized(pixels)

    def restore(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalised floats back to [0, 1]."""
        return (pixels * self.std + self.mean).clamp(0, 1)

    def patchify(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N K"]:
        """MAE's order: patches row by row, within a patch row, column, channel."""
        b, c, h, w = pixels.shape
        p = self.patch_size
        x = pixels.reshape(b, c, h // p, p, w // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)

    def unpatchify(self, patches: Float[Tensor, "B N K"], height: int) -> Float[Tensor, "B C H W"]:
        b, n, d = patches.shape
        p = self.patch_size
        h, w = height // p, n // (height // p)
        x = patches.reshape(b, h, w, p, p, d // p**2)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, d // p**2, h * p, w * p)

    def targets(self, pixels: Float[Tensor, "B C H W"], ids: Int[Tensor, "B U"]) -> Float[Tensor, "B U K"]:
        """What is to be predicted: the patches, each with zero mean and unit variance if ``normalize_patches``."""
        target = take(self.patchify(pixels), ids)
        if self.normalize_patches:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)  # unbiased, as MAE has it
            target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def complete(
        self, pixels: Float[Tensor, "B C H W"], image: Image, prediction: Float[Tensor, "B U K"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """(what was visible on grey, the picture with its hidden patches predicted), both in [0, 1].

        With normalised targets a prediction has no mean and variance of its own: the true ones are lent to it,
        as in MAE's own figures.  Errors must therefore not be measured on these pictures.
        """
        patches = self.patchify(pixels)
        if self.normalize_patches:
            truth = take(patches, image.hidden)
            mean, var = truth.mean(-1, keepdim=True), truth.var(-1, keepdim=True)
            prediction = prediction * (var + 1e-6).sqrt() + mean
        index = image.hidden.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        height = pixels.shape[2]
        grey = (0.5 - self.mean.view(-1)) / self.std.view(-1)
        blank = grey.repeat(self.patch_size**2).expand(index.shape)
        visible = self.unpatchify(patches.scatter(1, index, blank.to(patches.dtype)), height)
        completed = self.unpatchify(patches.scatter(1, index, prediction.to(patches.dtype)), height)
        return self.restore(visible), self.restore(completed)


def take(tokens: Float[Tensor, "B N D"], ids: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """tokens[b, ids[b]] for every b."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def begin_backbone(
    name: str,
    options: dict[str, Any] | None,
    needs: tuple[str, ...],
    init_from: str | None,
    tokenizer: TextTokenizer | None = None,
    **fixed: Any,
) -> Backbone:
    """A backbone for an objective: new, or from ``init_from`` with a printed account of what was taken.

    Raises:
        ValueError: what :func:`make_backbone` or :func:`mmssl.pretrained.start.start_from` refuse.
    """
    if init_from is not None and options and (options.get("pretrained") or options.get("weights")):
        raise ValueError("init_from and backbone_options' pretrained or weights are both given; choose one")
    backbone = make_backbone(name, options, needs, **fixed)
    if init_from is not None:
        rank_zero_only(print)(start_from(backbone, init_from, tokenizer), flush=True)
    return backbone


def reconstruction_loss(
    prediction: Float[Tensor, "B U K"], target: Float[Tensor, "B U K"], valid: Bool[Tensor, " B"] | None
) -> Loss:
    """Mean squared error of each hidden patch, summed over the patches, with their number (He et al. 2022)."""
    error = (prediction.float() - target.float()).square().mean(-1)  # [B, U]
    if valid is not None:
        error = error * valid.unsqueeze(1)
        return Loss(error.sum(), error.shape[1] * valid.sum().float())
    return Loss(error.sum(), torch.full((), float(error.numel()), device=error.device))


def token_losses(logits: Float[Tensor, "M K"], labels: Int[Tensor, " M"]) -> tuple[Loss, Loss]:
    """(cross-entropy, top-1 hits) over the hidden tokens: sums with their number; L = sum -log p."""
    count = torch.full((), float(len(labels)), device=logits.device)  # filled there: a copy would make the host wait
    total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    hits = (logits.detach().argmax(-1) == labels).sum().float()
    return Loss(total, count), Loss(hits, count)


def guesses(logits: Float[Tensor, "M K"], text: Text, samples: int) -> Completion:
    """The words of a Completion, sample by sample."""
    labels, hidden = split_by_sample(text.labels, text.hidden, text.cu_seqlens, samples)
    guessed, _ = split_by_sample(logits.argmax(-1), text.hidden, text.cu_seqlens, samples)
    bounds = text.cu_seqlens.tolist()
    ids = [text.input_ids[a:b].tolist() for a, b in itertools.pairwise(bounds)][:samples]
    return Completion(input_ids=ids, hidden=hidden, labels=labels, guesses=guessed)
