"""A pretrained backbone as graphs of tensors: what torch.export and ONNX hold.

A graph cannot look at a length while it runs, so texts come padded at their end, [B, L], with a mask.  The features are
those of :class:`mmssl.Pretrained`.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mmssl.pretrained.model import Pool, Pretrained, zero_at_padding

Kind = Literal["image", "text", "pair"]
Features = tuple[Float[Tensor, "B K D"], Float[Tensor, "B D"]]  # tokens, pooled


class ImageGraph(nn.Module):
    """``encode_image`` of squares of the backbone's size: tokens, pooled."""

    def __init__(self, model: Pretrained, pool: Pool | None = None) -> None:
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, pixels: UInt8[Tensor, "B 3 S S"]) -> Features:
        encoded = self.model(pixels, None, self.pool)
        return encoded.tokens, encoded.pooled


class TextGraph(nn.Module):
    """``encode_text`` of padded ids: tokens (zero at padding), pooled.  ``attention_mask`` is 0 at padding, else 1."""

    def __init__(self, model: Pretrained, pool: Pool | None = None) -> None:
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]) -> Features:
        real = attention_mask != 0
        tokens = zero_at_padding(self.model.backbone.forward_padded(None, input_ids, real), real)
        return tokens, self.model.pooled(self.pool, None, [tokens], [real])


class PairGraph(nn.Module):
    """``encode_pair`` of squares and padded ids: tokens ([prefix, patches, text], zero at padding), pooled."""

    def __init__(self, model: Pretrained, pool: Pool | None = None) -> None:
        super().__init__()
        self.model, self.pool = model, pool

    def forward(
        self, pixels: UInt8[Tensor, "B 3 S S"], input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]
    ) -> Features:
        real, backbone = attention_mask != 0, self.model.backbone
        x = backbone.forward_padded(self.model.normal(pixels), input_ids, real)
        prefix, patches, words = x.split([backbone.num_prefix_tokens, backbone.num_patches, input_ids.shape[1]], 1)
        words = zero_at_padding(words, real)
        parts = [prefix, patches, words]
        valid = [real.new_ones(part.shape[:2]) for part in (prefix, patches)]
        return torch.cat(parts, 1), self.model.pooled(self.pool, prefix, parts, [*valid, real])


def example(model: Pretrained, kind: Kind, batch: int, length: int) -> dict[str, Tensor]:
    """Random inputs of a graph by their names; every second text is shorter."""
    device, size = model.mean.device, model.img_size
    inputs: dict[str, Tensor] = {}
    if kind != "text":
        inputs["pixels"] = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    if kind != "image":
        if model.tokenizer is None:
            raise ValueError(f"this backbone knows no text, so there is no {kind} graph of it")
        inputs["input_ids"] = torch.randint(0, model.tokenizer.vocab_size, (batch, length), device=device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1::2, (length + 1) // 2 :] = 0
    return inputs


def export_graph(model: Pretrained, kind: Kind, pool: Pool | None = None) -> torch.export.ExportedProgram:
    """A graph for any number of samples, and texts of any length up to ``max_text_tokens``.

    Args:
        kind: "image": takes ``pixels``, uint8 [B, 3, S, S].  "text": ``input_ids`` and ``attention_mask``, int64
            [B, L].  "pair": all three.
        pool: as in :class:`mmssl.Pretrained`.

    Returns:
        A program whose ``module()`` gives (tokens, pooled); ``torch.export.save`` writes it.

    Raises:
        ValueError: text of a backbone without text, an unknown ``kind``, pooling that the backbone has not, or a
            backbone in training mode.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(get_args(Kind))}")
    if model.training:
        raise ValueError("the backbone is in training mode, and a graph drops no paths; call .eval() before")
    make = {"image": ImageGraph, "text": TextGraph, "pair": PairGraph}[kind]
    longest = model.backbone.max_text_tokens
    inputs = example(model, kind, 2, min(longest, 6))
    with torch.no_grad():
        graph = make(model, pool).eval()  # the wrapper; the backbone is in evaluation mode already
        graph(**inputs)  # what cannot be is said here, in one line
        return torch.export.export(graph, (), inputs, dynamic_shapes=dynamic_shapes(model, kind))


def dynamic_shapes(model: Pretrained, kind: Kind) -> dict[str, dict[int, torch.export.Dim]]:
    """Which axes of the inputs are free, by torch.export's rules."""
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1, max=model.backbone.max_text_tokens)
    of_text = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    of_image = {"pixels": {0: batch}}
    return {"image": of_image, "text": of_text, "pair": {**of_image, **of_text}}[kind]
