"""Embeddings of text, and the fixed sine-cosine positions of the decoder."""

from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmssl.types import Text, positions_in_segment


class TextEmbedding(nn.Module):
    """Token + learned position within its text + modality, then LayerNorm (BERT, Devlin et al. 2019, section 3).

    The modality vector takes the place of BERT's segment embedding.  Weights start as N(0, 0.02).
    ``token_embedding.weight`` may be tied to a prediction head.
    """

    def __init__(self, vocab_size: int, embed_dim: int, max_tokens: int) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "max_text_tokens": max_tokens}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.max_tokens = max_tokens
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position = nn.Parameter(torch.empty(max_tokens, embed_dim))
        self.modality = nn.Parameter(torch.empty(embed_dim))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for weight in (self.token_embedding.weight, self.position, self.modality):
            nn.init.normal_(weight, std=0.02)

    def forward(self, text: Text) -> Float[Tensor, "T D"]:
        """Embed packed tokens; positions count from 0 in every text.

        Raises:
            ValueError: a text is longer than ``max_tokens``.  Read on the CPU only, for on a device that would mean
                waiting; there (and for a segment of padding everywhere) the positions beyond share the last one.
        """
        cu, rows = text.cu_seqlens, len(text.input_ids)
        if text.max_seqlen > self.max_tokens and cu.device.type == "cpu":
            longest = max(cu.diff()[:-1].tolist(), default=0)  # the last segment may be padding
            if longest > self.max_tokens:
                raise ValueError(
                    f"a text has {longest} tokens but the backbone has {self.max_tokens} positions; "
                    "raise max_text_tokens or cut the texts"
                )
        position = positions_in_segment(cu, rows).clamp(max=self.max_tokens - 1)
        x = self.token_embedding(text.input_ids) + self.position[position] + self.modality
        return cast(Tensor, self.norm(x))

    def padded(self, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Embed texts padded to one length, at most ``max_tokens``; padding stands at their end."""
        x = self.token_embedding(input_ids) + self.position[: input_ids.shape[1]] + self.modality
        return cast(Tensor, self.norm(x))


def sincos_1d(embed_dim: int, positions: np.ndarray) -> np.ndarray:
    """[..., embed_dim]: sin(p w) then cos(p w), w from 1 to 1/10000 (Vaswani et al. 2017, in MAE's layout)."""
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2))
    angle = positions[..., None].astype(np.float64) * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], -1)


def sincos_2d(embed_dim: int, grid_size: tuple[int, int]) -> Float[Tensor, "N D"]:
    """Positions of a (height, width) grid of patches, row by row: the column first, then the row (MAE's layout)."""
    row, column = np.mgrid[: grid_size[0], : grid_size[1]].reshape(2, -1)
    both = np.concatenate([sincos_1d(embed_dim // 2, column), sincos_1d(embed_dim // 2, row)], -1)
    return torch.from_numpy(both).float()
