"""Progress as plain lines: the same in a terminal, in a batch log and in CI."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from mmssl.training.callbacks.throughput import Throughput


class Lines(ProgressBar):
    """Prints a line at most every few seconds: step, loss, speed, data wait, time left.

    Args:
        seconds: The shortest time between two lines.
        say: Where lines go; default: standard output, flushed.
    """

    def __init__(self, seconds: float = 5.0, say: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self._say = say or (lambda line: print(line, flush=True))
        self._enabled = True
        self._last = 0.0
        self._began = 0.0
        self._first_step = 0

    # Lightning turns off all but one progress bar through these two.
    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        self._line(" ".join(map(str, args)))

    def _line(self, text: str) -> None:
        if self._enabled:
            self._say(text)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._last = time.monotonic()
        self._first_step = trainer.global_step
        millions = sum(p.numel() for p in pl_module.parameters()) / 1e6
        device = f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision {trainer.precision}"
        start = f"from step {trainer.global_step} " if trainer.global_step else ""
        self._line(
            f"training {type(pl_module).__name__}, {millions:.1f} M parameters, {start}to step {trainer.max_steps} "
            f"on {device}"
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        done = trainer.global_step - self._first_step
        if done == 0 or now - self._last < self.seconds:
            return
        self._last = now
        left = (trainer.max_steps - trainer.global_step) * (now - self._began) / done
        parts = [f"step {trainer.global_step}/{trainer.max_steps}"]
        # The loss is read only when a line is due, so that the device is not made to wait at every step.
        loss = trainer.callback_metrics.get("train/loss")
        if loss is None and isinstance(outputs, dict):
            loss = outputs.get("loss")
        if loss is not None:
            parts.append(f"loss {float(loss):.4g}")
        speed = next((c.latest for c in trainer.callbacks if isinstance(c, Throughput)), {})  # type: ignore[attr-defined]
        if speed:
            parts.append(f"{speed['samples_per_second']:.0f} samples/s")
            parts.append(f"data wait {speed['data_wait_share']:.0%}")
        if trainer.max_steps > 0:
            parts.append(f"{_clock(left)} left")
        self._line(" | ".join(parts))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if values:
            where = f"step {trainer.global_step} | " if trainer.state.fn == "fit" else ""
            self._line(where + "validation " + " ".join(f"{k[4:]} {v:.4g}" for k, v in values.items()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.global_step - self._first_step
        self._line(f"trained {steps} steps in {_clock(time.monotonic() - self._began)}, now at {trainer.global_step}")


def _clock(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 2h10m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
