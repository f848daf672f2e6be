"""timm's blocks with two additions: an optional feed-forward for text, and stochastic depth per sample when packed.

The blocks are timm's, re-classed in place: parameters, their names and their hooks stay.  Text experts follow
BEiT-3's multiway transformer (Wang et al. 2023, section 2.1): attention is shared, each modality has its own
feed-forward network with its own norm before it (layer scale is shared).
"""

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import DropPath
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from mmssl.backbone.attention import Layout, Packing


class TextExpert(nn.Module):
    """A block's second feed-forward, for text: starts as a copy of the image's, so that pretrained image weights
    serve both modalities from the first step on.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm2 = copy.deepcopy(block.norm2)
        self.mlp = copy.deepcopy(block.mlp)


class _SharedBlock(nn.Module):
    """forward() of all four block types: x + drop(scale(attention)), x + drop(scale(feed-forward))."""

    post_norm = False
    attn: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    text_expert: TextExpert | None

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        rope: Tensor | None = None,
        attn_mask: Layout | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "B N D"]:
        """``attn_mask``: None for dense images, a Packing for a packed axis [1, R, D], a Padded for padded rows."""
        rotary = {} if rope is None else {"rope": rope}
        attend = partial(self.attn, attn_mask=attn_mask, is_causal=is_causal, **rotary)
        x = x + self._branch(1, self._normed(self.norm1, attend, x), attn_mask)
        return x + self._branch(2, self._feed(x, attn_mask), attn_mask)

    def _normed(self, norm: nn.Module, layer: Any, x: Tensor) -> Tensor:
        return norm(layer(x)) if self.post_norm else layer(norm(x))

    def _feed(self, x: Tensor, packing: Layout | None) -> Tensor:
        if self.text_expert is None or packing is None:
            return self._normed(self.norm2, self.mlp, x)
        text_expert = partial(self._normed, self.text_expert.norm2, self.text_expert.mlp)
        if not packing.images:
            return text_expert(x)
        image, text = packing.to_source(x).split([packing.images * packing.image_tokens, packing.text_tokens], 1)
        return packing.to_packed(torch.cat([self._normed(self.norm2, self.mlp, image), text_expert(text)], 1))

    def _branch(self, index: int, y: Tensor, packing: Layout | None) -> Tensor:
        """Layer scale (a module in timm's Block, a parameter in EvaBlock, absent otherwise), then stochastic depth."""
        scale, gamma = getattr(self, f"ls{index}", None), getattr(self, f"gamma_{index}", None)
        y = y if scale is None else scale(y)
        y = y if gamma is None else gamma * y
        drop = getattr(self, f"drop_path{index}")
        if not isinstance(packing, Packing) or not isinstance(drop, DropPath) or not (self.training and drop.drop_prob):
            return drop(y)
        # timm draws one number per row of the batch axis, which here is a single row: draw one per segment.
        keep = 1 - drop.drop_prob
        kept = y.new_empty(len(packing.cu_seqlens) - 1).bernoulli_(keep)
        return y * (kept / keep)[packing.segments, None]


class SharedBlock(_SharedBlock, Block):
    """timm's Block."""


class SharedResPostBlock(_SharedBlock, ResPostBlock):
    """timm's ResPostBlock."""

    post_norm = True


class SharedEvaBlock(_SharedBlock, EvaBlock):
    """timm's EvaBlock."""


class SharedEvaBlockPostNorm(_SharedBlock, EvaBlockPostNorm):
    """timm's EvaBlockPostNorm."""

    post_norm = True


SHARED: dict[type[nn.Module], type[nn.Module]] = {
    Block: SharedBlock,
    ResPostBlock: SharedResPostBlock,
    EvaBlock: SharedEvaBlock,
    EvaBlockPostNorm: SharedEvaBlockPostNorm,
}


def share(block: Any, text_expert: bool) -> None:
    """Make a timm block serve images and text, in place."""
    block.__class__ = SHARED[type(block)]
    block.attn.fused_attn = True  # packed attention answers the fused call alone
    block.text_expert = TextExpert(block) if text_expert else None
