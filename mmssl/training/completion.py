"""What an objective hands out for a person to look at, and what it is made with."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


class Completion(NamedTuple):
    """What a person looks at: pictures of a few samples, in [0, 1], and the guesses for the hidden tokens."""

    original: Float[Tensor, "B C H W"] | None = None
    visible: Float[Tensor, "B C H W"] | None = None
    completed: Float[Tensor, "B C H W"] | None = None
    input_ids: list[list[int]] | None = None  # per sample, as the model saw them
    hidden: list[list[int]] | None = None  # per sample, positions within the text
    labels: list[list[int]] | None = None
    guesses: list[list[int]] | None = None


class Rows(NamedTuple):
    """Predictions as lines of JSON, for the file ``<name>-<rank>.jsonl``."""

    name: str
    rows: list[dict[str, Any]]


def split_by_sample(
    values: Int[Tensor, " M"], positions: Int[Tensor, " M"], cu_seqlens: Int[Tensor, " E"], samples: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Hand values at packed positions back to their samples: (values, positions within the text) per sample."""
    owner = torch.searchsorted(cu_seqlens.to(positions.dtype), positions, right=True) - 1
    out_values: list[list[int]] = [[] for _ in range(samples)]
    out_positions: list[list[int]] = [[] for _ in range(samples)]
    starts = cu_seqlens.tolist()
    for value, position, sample in zip(values.tolist(), positions.tolist(), owner.tolist(), strict=True):
        out_values[sample].append(value)
        out_positions[sample].append(position - starts[sample])
    return out_values, out_positions


def unit_pixels(pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """uint8 to floats in [0, 1]."""
    return pixels.float() / 255
