"""``mmssl.load_backbone``: from a run, a checkpoint, an export or a hub to a module that encodes."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.backbone import Backbone
from mmssl.pretrained.model import Pretrained
from mmssl.pretrained.sources import Source, Weights, find_source, read_into


def load_backbone(
    source: str | Path,
    *,
    weights: Weights = "online",
    img_size: int | None = None,
    drop_path_rate: float = 0.0,
    grad_checkpointing: bool = False,
) -> Pretrained:
    """Load a pretrained backbone, in evaluation mode on the CPU, with all its parameters trainable.

    Files are read as tensors and plain values; nothing in them is run.

    Args:
        source: a run's folder (its newest whole checkpoint), a .ckpt file, a sharded checkpoint's folder, a folder that
            ``mmssl export`` wrote, or "owner/name" ("hf://owner/name") of such a folder on the Hugging Face hub.
        weights: "online", those that the optimizer stepped on, or "ema", their average (the run must have kept one with
            Lightning's ``EMAWeightAveraging``).
        img_size: another picture size in pixels than that of pretraining; positions are interpolated as timm does.
        drop_path_rate: stochastic depth while training, for fine-tuning; that of pretraining is not kept.
        grad_checkpointing: recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: there is nothing at ``source``, it is nothing of mmssl's or by a newer version, its tokenizer is
            missing or another one, or it has no EMA weights.
        CheckpointError: a file is damaged or cut short.
    """
    return build(
        find_source(source, weights),
        img_size=img_size,
        drop_path_rate=drop_path_rate,
        grad_checkpointing=grad_checkpointing,
    )


def build(
    found: Source, *, img_size: int | None = None, drop_path_rate: float = 0.0, grad_checkpointing: bool = False
) -> Pretrained:
    """The backbone of a source, see :func:`load_backbone`.

    Raises:
        ValueError: the source does not fit the model that it names.
        CheckpointError: a file is damaged or cut short.
    """
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size is {img_size}; give pixels, or None for the size of pretraining")
    own = {"drop_path_rate": drop_path_rate, "grad_checkpointing": grad_checkpointing}
    options = {**found.options, **own, "img_size": img_size or found.options.get("img_size")}
    if not found.has_text:
        options.pop("experts", None)
    elif found.tokenizer is not None:
        size, rows = found.tokenizer.vocab_size, len(found.tensors["text.token_embedding.weight"])
        if size != rows:
            raise ValueError(
                f"{found.tokenizer.path} has {size} tokens but the weights in {found.where} {rows}; "
                "put the tokenizer.json there that they were trained with"
            )
        options |= {"vocab_size": size, "max_text_tokens": len(found.tensors["text.position"])}
    try:
        backbone = Backbone(found.backbone, **options)
    except TypeError as error:
        raise ValueError(
            f"{found.where} needs options that this mmssl does not know ({error}); upgrade mmssl"
        ) from error
    fill(backbone, found, resize=img_size is not None)
    return Pretrained(backbone, found.tokenizer, {"weights": found.weights, **found.about}).eval()


def fill(backbone: Backbone, found: Source, resize: bool) -> None:
    """Copy every tensor of a source into a backbone, one at a time: memory holds the model once."""
    ours = backbone.state_dict()
    missing = [name for name in ours if name not in found.tensors]
    if missing:
        raise ValueError(
            f"{found.where} lacks {len(missing)} of the {len(ours)} tensors of {found.backbone} "
            f"({', '.join(missing[:3])}, ...): another model wrote it"
        )
    resized: Mapping[str, Tensor] = resized_image_side(backbone, found.tensors) if resize else {}
    with torch.no_grad():
        read_into({name: ours[name] for name in resized}, resized, found.where)
        read_into({name: value for name, value in ours.items() if name not in resized}, found.tensors, found.where)


def resized_image_side(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image side's positions and patch embedding at the backbone's size, resampled by timm."""
    names = [name for name in ("vit.pos_embed", "vit.patch_embed.proj.weight") if name in tensors]
    vit: Any = backbone.vit
    convert = sys.modules[type(vit).__module__].checkpoint_filter_fn
    converted = convert({name.removeprefix("vit."): tensors[name] for name in names}, vit)
    return {f"vit.{name}": value for name, value in converted.items()}
