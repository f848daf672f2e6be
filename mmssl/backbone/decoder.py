"""The small decoder of a masked autoencoder, used in pretraining only (He et al. 2022, section 3)."""

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmssl.backbone.attention import Packing, has_varlen
from mmssl.backbone.embed import sincos_1d, sincos_2d
from mmssl.backbone.vit import Encoded
from mmssl.types import Text, positions_in_segment


class Decoder(nn.Module):
    """Predicts the pixels of hidden patches from what the backbone made of visible patches (and of text).

    Visible tokens are projected, every hidden patch is one learned mask token, all get fixed 2-D sine-cosine positions
    (zero for prefix tokens), and pass through ``depth`` pre-norm blocks.  Attention knows no order but the positions,
    so tokens stay as [prefix, visible, hidden] and are never sorted back into the picture; only hidden ones reach
    the last norm and the prediction.

    With ``text`` a segment may also hold the sample's text tokens, projected, with fixed 1-D sine-cosine
    positions and a learned modality embedding (M3AE, Geng et al. 2022).

    Args:
        in_dim: width of the backbone.
        embed_dim, depth, num_heads: of the decoder.
        grid_size: (height, width) of the picture in patches.
        patch_size: in pixels.
        num_prefix_tokens: class and register tokens of the backbone.
        max_text_tokens: number of text positions.

    Raises:
        ValueError: a width that the heads or the positions (multiples of 4) do not divide.
    """

    positions: Tensor  # [N, D]
    text_positions: Tensor
    modality: nn.Parameter | None

    def __init__(
        self,
        in_dim: int,
        *,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        grid_size: tuple[int, int],
        patch_size: int,
        num_prefix_tokens: int,
        text: bool = False,
        max_text_tokens: int = 512,
    ) -> None:
        super().__init__()
        for divisor, what in ((num_heads, "num_heads"), (4, "4, for sines and cosines on two axes")):
            if embed_dim % divisor:
                near = [n for n in (embed_dim // divisor * divisor, -(-embed_dim // divisor) * divisor) if n]
                raise ValueError(
                    f"decoder embed_dim {embed_dim} is not divisible by {what}"
                    f"{f' = {num_heads}' if what == 'num_heads' else ''}; try {' or '.join(map(str, near))}"
                )
        self.patch_dim = patch_size**2 * 3
        self.num_prefix_tokens = num_prefix_tokens
        self._head_dim = embed_dim // num_heads
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(embed_dim))
        self.modality = nn.Parameter(torch.zeros(embed_dim)) if text else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(embed_dim)
        self.predict = nn.Linear(embed_dim, self.patch_dim)
        self.register_buffer("positions", sincos_2d(embed_dim, grid_size), persistent=False)
        words = torch.from_numpy(sincos_1d(embed_dim, np.arange(max_text_tokens if text else 0))).float()
        self.register_buffer("text_positions", words, persistent=False)
        self.apply(_initialise)
        for token in (self.mask_token, self.modality):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        for block in self.blocks:
            cast(Any, block).attn.fused_attn = True  # packed attention answers the fused call alone

    def forward(
        self, encoded: Encoded, visible: Int[Tensor, "B V"], hidden: Int[Tensor, "B U"], text: Text | None = None
    ) -> Float[Tensor, "B U K"]:
        """The hidden patches' pixels, K = patch_size**2 * 3 in the order row, column, channel.

        ``encoded`` comes from the backbone for the same ``visible`` (and ``text``).

        Raises:
            ValueError: no patches in ``encoded``, or text where the decoder has none, or text only half.
        """
        if encoded.prefix is None or encoded.patches is None:
            raise ValueError("the decoder needs encoded patches; give the backbone pictures")
        if (text is None) != (encoded.text is None):
            raise ValueError("the decoder needs the text that was encoded, or none")
        if text is not None and self.modality is None:
            raise ValueError("text came to a decoder without; build it with text=True")
        x = self.embed(torch.cat([encoded.prefix, encoded.patches], 1))
        prefix, patches = x.tensor_split([self.num_prefix_tokens], 1)
        patches = patches + self.positions[visible].to(x.dtype)
        masks = (self.mask_token + self.positions[hidden]).to(x.dtype)
        x = torch.cat([prefix, patches, masks], 1)
        if text is None or encoded.text is None:
            for block in self.blocks:
                x = block(x)
        else:
            packing = Packing.of(text, len(x), x.shape[1], has_varlen(x, self._head_dim))
            rows = packing.pack(x, self._embed_text(encoded.text, text))
            for block in self.blocks:
                rows = block(rows, attn_mask=packing)
            image, _ = packing.unpack(rows)
            assert image is not None
            x = image
        return cast(Tensor, self.predict(self.norm(x[:, x.shape[1] - hidden.shape[1] :])))

    def _embed_text(self, encoded: Float[Tensor, "T D"], text: Text) -> Float[Tensor, "T E"]:
        x: Tensor = self.embed(encoded)
        # A segment of padding may be longer than any text; its positions do not matter.
        position = positions_in_segment(text.cu_seqlens, len(encoded)).clamp(max=len(self.text_positions) - 1)
        assert self.modality is not None
        return x + (self.text_positions[position] + self.modality).to(x.dtype)


def _initialise(module: Any) -> None:
    """MAE's: Xavier-uniform matrices, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
