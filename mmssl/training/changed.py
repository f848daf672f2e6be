"""What a resumed run does differently from before: hyperparameters that the checkpoint would put back, and a record.

Restoring an optimizer restores its hyperparameters too, and a schedule its peak rates.  Left alone, a new ``lr``,
``betas``, ``eps`` or ``weight_decay`` would be without effect, and a new schedule would begin one step late.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mmssl.training.messages import warn
from mmssl.training.optim import place_steps


class ResumeError(ValueError):
    """A hyperparameter cannot be changed in the middle of this run.  The message says which, and what to do."""


class Change(NamedTuple):
    """One key of the config, before and now, and what that means."""

    key: str
    old: Any
    new: Any
    note: str

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.old)} -> {shown(self.new)} ({self.note})"


class Changed(Callback):
    """Makes the optimizer and the schedule follow the config after a resume, says what changed, and notes it.

    ``changes.jsonl`` in the run's folder gets a line for every changed key: step, time, key, old, new.  W&B gets
    the whole config.

    Args:
        changes: what differs from the config that the run last trained with; empty for a new run.
        config: the whole resolved config, for W&B.
        record: the file for the changes; None writes none.

    Raises (from ``Trainer.fit``):
        ResumeError: the rate changed, and the schedule is one that it cannot be put into.
    """

    def __init__(self, changes: list[Change], config: dict[str, Any] | None = None, record: Path | None = None) -> None:
        self.changes, self._config, self._record = changes, config, record
        self._asked: list[list[dict[str, Any]]] = []

    # After the optimizers are made from the config and before a checkpoint is put into them.
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asked = [[_values(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            schedules = {id(config.scheduler.optimizer): config.scheduler for config in trainer.lr_scheduler_configs}
            for optimizer, asked in zip(trainer.optimizers, self._asked, strict=True):
                schedule = schedules.get(id(optimizer))
                follow(optimizer, asked, schedule, rate=schedule is not None or bool(self.changes))
        if not trainer.is_global_zero:
            return
        for change in self.changes:
            print(f"mmssl: changed from step {trainer.global_step} on: {change}", flush=True)
        if self.changes and self._record is not None:
            _append(self._record, trainer.global_step, self.changes)
        for logger in trainer.loggers:
            if self._config is not None and isinstance(logger, WandbLogger):  # others may refuse a changed value
                logger.log_hyperparams(self._config)


def follow(optimizer: Optimizer, asked: list[dict[str, Any]], schedule: LRScheduler | None, *, rate: bool) -> None:
    """Give a restored optimizer the values that its config asks for, and its schedule the rates.

    Args:
        asked: by group, the values before the restore.
        schedule: of the learning rate; its position stays.
        rate: whether the learning rate is put back too.  Without a schedule, somebody may be setting it by hand.

    Raises:
        ResumeError: the rate changed and ``schedule`` is not a function of the step alone.
    """
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        group.update({name: value for name, value in values.items() if name not in ("lr", "initial_lr")})
    place_steps(optimizer)
    if schedule is None:
        for group, values in zip(optimizer.param_groups, asked, strict=True):
            group["lr"] = values["lr"] if rate else group["lr"]
        return
    peaks = [values.get("initial_lr", values["lr"]) for values in asked]
    if not isinstance(schedule, LambdaLR):
        if peaks != list(schedule.base_lrs):
            raise ResumeError(
                f"the learning rate was {shown(schedule.base_lrs[0])} in the checkpoint, now {shown(peaks[0])}, and "
                f"{type(schedule).__name__} cannot take another one in mid-run; keep the old one, or use LambdaLR"
            )
        return
    # In closed form, so that without a change the very same rates come out.
    schedule.base_lrs = peaks
    rates = [peak * factor(schedule.last_epoch) for peak, factor in zip(peaks, schedule.lr_lambdas, strict=True)]
    for group, peak, now in zip(optimizer.param_groups, peaks, rates, strict=True):
        group["initial_lr"], group["lr"] = peak, now
    schedule._last_lr = rates


def _values(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _append(path: Path, step: int, changes: list[Change]) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    rows = [{"step": step, "time": now, "key": c.key, "old": c.old, "new": c.new} for c in changes]
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
    except OSError as error:  # a record is not worth a run
        warn(f"cannot write {path} ({error.strerror or error}); what changed stands above")


def shown(value: Any) -> str:
    """A value as a config holds it, shortened."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
