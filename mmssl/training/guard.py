"""Keeps gradients that are not finite, or far too large, out of the weights, without making the host wait."""

from collections import deque
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

READ_EVERY = 100  # steps after which the host looks at last, where logging is rarer


class SkipError(RuntimeError):
    """Too many steps in a row had no usable gradient.  The message names their samples."""


class Skipped(NamedTuple):
    """A step that changed nothing, and the samples of this rank's batches in it."""

    step: int
    grad_norm: float
    keys: list[str]


class StepGuard:
    """Skips optimizer steps by the norm of their gradients, which is the same on all ranks: so all skip alike.

    A skipped step leaves weights, moments and the optimizer's count of steps as they were, to the bit.  A fused AdamW
    sees to that on the device; for other optimizers the host looks at every norm, and takes the gradients away.

    Attributes:
        limit: Steps whose norm is above it are skipped as well; infinity allows any finite one.
    """

    def __init__(self) -> None:
        self.limit = float("inf")
        self._keys: list[str] = []
        self._steps: deque[tuple[int, list[str]]] = deque(maxlen=READ_EVERY)  # not read yet
        self._norms: deque[Tensor] = deque(maxlen=READ_EVERY)

    def note(self, keys: list[str]) -> None:
        """The samples of a micro-batch of the step that is under way."""
        self._keys = [*self._keys, *keys]

    def check(self, optimizer: Any, norm: Float[Tensor, ""], step: int) -> None:
        """Before optimizer step ``step``, with gradients of this norm: let it change nothing if they are bad."""
        self._steps.append((step, self._keys))
        self._norms.append(norm.detach())
        self._keys = []
        bad = self._bad(norm)
        if all(group.get("fused") for group in optimizer.param_groups):  # a restored one may differ from its defaults
            # What a GradScaler would set; with one the step is not fused, and it skips by itself.
            optimizer.found_inf, optimizer.grad_scale = bad.to(torch.float32), None
        elif bool(bad):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # which an optimizer passes over: no decay, no moment, no count

    def _bad(self, norm: Tensor) -> Bool[Tensor, "*K"]:
        return ~(norm <= self.limit) | ~torch.isfinite(norm)  # a comparison with NaN is False

    @property
    def is_full(self) -> bool:
        return len(self._steps) >= READ_EVERY

    def read(self) -> list[tuple[int, Skipped | None]]:
        """Every step since the last reading, with what is known of it if it was skipped.  Waits for the device."""
        if not self._steps:
            return []
        norms = torch.stack(list(self._norms)).float().cpu()
        bad = self._bad(norms).tolist()
        found = [
            (step, Skipped(step, norm, keys) if skip else None)
            for (step, keys), norm, skip in zip(self._steps, norms.tolist(), bad, strict=True)
        ]
        self._steps.clear()
        self._norms.clear()
        return found
