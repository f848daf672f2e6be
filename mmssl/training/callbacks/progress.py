"""Progress as plain lines: in a terminal, in a batch log and in CI."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from mmssl.training.callbacks.throughput import Throughput


class Lines(ProgressBar):
    """Prints a line at most every few seconds: step, loss, speed, data wait, time left.  Rank 0 alone speaks.

    Args:
        seconds: The shortest time between two lines; None means 5 in a terminal, and 30 in a log, which has to be
            read after a week.
        say: Where lines go; default: standard output, flushed, in a log with the time of day before each line.
    """

    def __init__(self, seconds: float | None = None, say: Callable[[str], None] | None = None) -> None:
        super().__init__()
        terminal = sys.stdout.isatty()
        if seconds is not None and seconds < 0:
            raise ValueError(f"seconds is {seconds}; give 0 or more, or null for a default")
        self.seconds = (5.0 if terminal else 30.0) if seconds is None else seconds
        self._say = say or (_print if terminal else _print_with_time)
        self._enabled = True
        self._last = 0.0
        self._began = 0.0
        self._first_step = 0
        # The first step of a start compiles and warms up; the time left is reckoned from its end on.
        self._timed_from: tuple[float, int] | None = None

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
        self._first_step, self._timed_from = trainer.global_step, None
        millions = sum(p.numel() for p in pl_module.parameters()) / 1e6
        device = f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision {trainer.precision}"
        start = f"from step {trainer.global_step} " if trainer.global_step else ""
        self._line(
            f"training {type(pl_module).__name__}, {millions:.1f} M parameters, {start}to step {trainer.max_steps} "
            f"on {device}{job()}"
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._timed_from is None and trainer.global_step > self._first_step:
            self._timed_from = now, trainer.global_step
        if self._timed_from is None or now - self._last < self.seconds:
            return
        self._last = now
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
        since, step = self._timed_from
        if trainer.max_steps > 0 and trainer.global_step > step:  # validation and checkpoints count: they come again
            left = (trainer.max_steps - trainer.global_step) * (now - since) / (trainer.global_step - step)
            parts.append(f"{_clock(left)} left")
        self._line(" | ".join(parts))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        where = f"step {trainer.global_step} | " if trainer.state.fn == "fit" else ""
        self._metrics(trainer, where + "validation", "val/")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self._metrics(trainer, "test", "test/")

    def _metrics(self, trainer: pl.Trainer, title: str, prefix: str) -> None:
        # In training, what the steps log stands there as well; outside, everything is a result, whatever its name.
        every = trainer.state.fn != "fit"
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if every or k.startswith(prefix)}
        if values:
            self._line(f"{title} " + " ".join(f"{k.removeprefix(prefix)} {v:.4g}" for k, v in values.items()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.global_step - self._first_step
        self._line(f"trained {steps} steps in {_clock(time.monotonic() - self._began)}, now at {trainer.global_step}")


def job(environ: Mapping[str, str] = os.environ) -> str:
    """Which SLURM job a line is from, and which of its starts, so that a log of many starts can be read; or nothing."""
    number = environ.get("SLURM_JOB_ID")
    if not number:
        return ""
    if array := environ.get("SLURM_ARRAY_JOB_ID"):
        number = f"{array}_{environ.get('SLURM_ARRAY_TASK_ID', '?')}"
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return f", SLURM job {number}" + (f", restart {restarts}" if restarts != "0" else "")


def _print(line: str) -> None:
    print(line, flush=True)


def _print_with_time(line: str) -> None:
    _print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


def _clock(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 2h10m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
