"""Losses for the log: (total, count) by name, added up on the device, and their means over all ranks."""

import torch
from torch import Tensor

from mmssl.training.votes import sum_over_ranks
from mmssl.types import Loss


def add_up(sums: dict[str, Tensor], losses: dict[str, Loss], dtype: torch.dtype) -> None:
    """Add a batch's (total, count) by name to ``sums``, in place."""
    for name, (total, count) in losses.items():
        sums[name] = sums.get(name, 0) + torch.stack([total.detach().to(dtype), count.to(dtype)])


def means(sums: dict[str, Tensor], weights: dict[str, float], world: int) -> dict[str, Tensor]:
    """total / count by name after adding up the ranks, and the weighted loss that is trained on.

    Args:
        sums: of :func:`add_up`, by the same names on all ranks, which call this together.
        weights: of the losses that are trained on; they are called ``loss_<name>``.
        world: number of ranks.
    """
    packed = torch.stack(list(sums.values())).float()
    if world > 1:
        packed = sum_over_ranks(packed, world)
    found = dict(zip(sums, packed[:, 0] / packed[:, 1], strict=True))
    if "loss" not in found:
        found["loss"] = torch.stack([weight * found[name] for name, weight in weights.items()]).sum()
    return {_metric_name(name, weights): value for name, value in found.items()}


def _metric_name(name: str, weights: dict[str, float]) -> str:
    source, slash, part = name.rpartition("/")
    return f"{source}{slash}loss_{part}" if part in weights else name
