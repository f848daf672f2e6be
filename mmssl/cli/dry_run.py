"""``mmssl fit --dry_run``: all that a run does first, on one optimizer step, and what it would be; keeps nothing.

So that a mistake shows before a job waits in a queue for a day.
"""

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

from mmssl.cli.keys import UsageError
from mmssl.data.datamodule import DataModule
from mmssl.training.callbacks.throughput import Throughput
from mmssl.training.changed import Change, Changed
from mmssl.training.checkpoint import Checkpoints
from mmssl.training.loggers import Wandb


def check_place(folder: Path) -> None:
    """Whether a run's folder could be made, without making it.

    Raises:
        UsageError: Its parent cannot be written to.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {place}, where the run's folder {folder} would be; give another with --run")


def as_dry_run(
    config: dict[str, Any], callbacks: list[Callback], changes: list[Change], folder: Path, scratch: Path
) -> dict[str, Any]:
    """The Trainer's arguments for one step that leaves nothing behind.

    Args:
        config: the Trainer's arguments as asked for, callbacks as a list.
        callbacks: those that are set by keys of their own, such as ``checkpoint``.
        changes: what a resumed run does differently.
        folder: the run's, which is only named.
        scratch: what stands in for it.
    """
    if config["fast_dev_run"]:
        raise UsageError("give --dry_run or --trainer.fast_dev_run, not both")
    own, logger = config["callbacks"], config["logger"]
    report = DryRun(folder, logger, next((c for c in callbacks if isinstance(c, Checkpoints)), None))
    return {
        **config,
        "default_root_dir": str(scratch),
        "logger": False,
        "log_every_n_steps": 1,  # so that the step has a loss to show
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in own),
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in own),
        "callbacks": [Throughput(), *own, Changed(changes), report],
    }


class DryRun(Callback):
    """Stops after one optimizer step and prints what the run would be.

    Raises (from ``Trainer.fit``):
        UsageError: The step does not fit into the device's memory.
    """

    def __init__(self, folder: Path, logger: Any, checkpoints: Checkpoints | None) -> None:
        self._folder, self._checkpoints = folder, checkpoints
        self._logger = Wandb() if logger in (None, True) else logger
        self._first_step = 0
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step, self._began = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._first_step:
            return
        trainer.should_stop = True
        device = trainer.strategy.root_device
        step = f"{time.monotonic() - self._began:.1f} s with its loading and warming up"
        if device.type == "cuda":
            step += f", at most {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
        shown = {"loss": "train/loss", "gradient norm": "train/grad_norm"}
        for name, metric in shown.items():
            if metric in trainer.callback_metrics:
                step += f", {name} {float(trainer.callback_metrics[metric]):.4g}"
        if not trainer.is_global_zero:
            return
        lines = {
            "model": _model(pl_module),
            **_data(trainer),
            "batch": _batch(trainer),
            "steps": f"{trainer.max_steps}" + (f", from {self._first_step} on" if self._first_step else ""),
            "devices": f"{trainer.world_size} x {device.type}, precision {trainer.precision}",
            "folder": f"{self._folder}, {'goes on' if self._first_step else 'new'}",
            "saves": self._saves(trainer),
            "W&B": self._wandb(),
            "one step": step,
        }
        width = max(map(len, lines))
        print(
            "mmssl: dry run: nothing was kept",
            *(f"  {k:<{width}}  {v}" for k, v in lines.items()),
            sep="\n",
            flush=True,
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, torch.OutOfMemoryError):
            raise UsageError(
                f"a step does not fit into the memory of {trainer.strategy.root_device}: make data.batch_size smaller "
                "and trainer.accumulate_grad_batches larger, or set backbone_options.grad_checkpointing: true"
            ) from exception

    def _saves(self, trainer: pl.Trainer) -> str:
        if self._checkpoints is None or trainer.max_steps < 1:
            return "no checkpoints"
        every = self._checkpoints.every_n_steps
        return f"a checkpoint every {every} steps and at the end; the last {self._checkpoints.keep} are kept"

    def _wandb(self) -> str:
        loggers = self._logger if isinstance(self._logger, list | tuple) else [self._logger]
        wandb = next((logger for logger in loggers if isinstance(logger, Wandb)), None)
        if wandb is None:
            return "off"
        mode, why = wandb.mode()
        return f"{mode} ({why})" if why else mode


def _model(module: pl.LightningModule) -> str:
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    every, trained = sum(n for n, _ in sizes), sum(n for n, train in sizes if train)
    return f"{type(module).__name__}, {every / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained"


def _data(trainer: pl.Trainer) -> dict[str, str]:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DataModule):
        return {"data": type(data).__name__}
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    return data.describe(batches)


def _batch(trainer: pl.Trainer) -> str:
    data, windows = getattr(trainer, "datamodule", None), trainer.accumulate_grad_batches
    size = getattr(data, "batch_size", None)
    if not isinstance(size, int):
        return f"{windows} batches a step"
    each = f"{size} samples, {size // trainer.world_size} on each of {trainer.world_size} ranks"
    return each + (f"; {windows} such batches, {windows * size} samples, a step" if windows > 1 else "")
