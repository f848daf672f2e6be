"""AdamW over timm's parameter groups, and the schedule of the learning rate by step."""

import math
from collections.abc import Callable, Collection
from typing import Any

import lightning.pytorch as pl
import torch
from timm.optim import param_groups_weight_decay
from torch import nn


def adamw(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    no_weight_decay: Collection[str] = (),
    groups: list[dict[str, Any]] | None = None,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); biases, norms and ``no_weight_decay`` names (wildcards) are not decayed.

    ``groups`` take the place of these where given, each with its own ``weight_decay`` and, if it likes, ``lr``.
    The fused kernel is used, unless ``fused`` is False, where every parameter lies on a device that has one; a
    checkpoint of the other kind is loaded into this one.
    """
    if groups is None:
        groups = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=no_weight_decay)
    kinds = {parameter.device.type for parameter in module.parameters()}
    fused = fused and kinds <= {"cuda", "cpu"} and len(kinds) == 1
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)

    def stay(restored: torch.optim.Optimizer) -> None:
        """A checkpoint brings its own groups along, from a run in another precision perhaps."""
        for group in restored.param_groups:
            group["fused"] = fused
        place_steps(restored)

    optimizer.register_load_state_dict_post_hook(stay)
    return optimizer


def place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move the counts of steps to where the optimizer wants them: with the parameters if fused, else to the host."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if "fused" in group else ():
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), torch.Tensor):
                on_device = group["fused"] or group.get("capturable")
                state["step"] = state["step"].to(parameter.device if on_device else "cpu")


def warmup_cosine(warmup_steps: int, max_steps: int, floor: float) -> Callable[[int], float]:
    """Factor of the peak rate at a step: linear from 0 over ``warmup_steps``, then a half cosine to ``floor``.

    Step 0 already moves ((step + 1) / warmup_steps); ``floor`` is a part of the peak, reached at the last step.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def check_trainer(trainer: pl.Trainer, warmup_steps: int) -> None:
    """Raises ValueError for what a Trainer was given that does not go with this optimizer and schedule."""
    if trainer.gradient_clip_val:
        raise ValueError(
            "trainer.gradient_clip_val is set; set model.init_args.clip_grad_norm instead, which also works "
            "with the fused optimizer under mixed precision"
        )
    if trainer.max_steps < 1:
        raise ValueError("trainer.max_steps is not set; the cosine schedule ends there, so give the number of steps")
    limit, window = trainer.limit_train_batches, trainer.accumulate_grad_batches
    trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # whose few steps are no schedule
    if isinstance(limit, int) and limit % window and not trial:
        raise ValueError(
            f"trainer.limit_train_batches is {limit}, which trainer.accumulate_grad_batches {window} does not "
            f"divide: the last optimizer step would lack batches; give a multiple of {window}"
        )
    if warmup_steps >= trainer.max_steps and not trial:
        raise ValueError(
            f"warmup_steps is {warmup_steps} but trainer.max_steps is {trainer.max_steps}; "
            "warm up for fewer steps than the run has"
        )
