"""What goes wrong on a cluster, as a callback for real runs of the tests: at a named moment, on one rank."""

import os
import signal
import subprocess
import time
from multiprocessing import active_children
from typing import Any

import lightning.pytorch as pl
import torch
from lightning import Callback

from mmssl.training.callbacks.health import Health


class Disturb(Callback):
    """Does ``what`` on rank ``rank`` at the hook ``at``, once, where the run has ``step`` steps behind it.

    ``what``: names of signals, joined by +, to this process, or with "workers:" before them to its loader's workers;
    "raise"; "exit"; "sleep" for ``seconds``; "nan", which spoils the loss.
    """

    def __init__(self, at: str, what: str, rank: int = 0, step: int = 0, seconds: float = 0.0) -> None:
        self.at, self.what, self.rank, self.step, self.seconds = at, what, rank, step, seconds
        self._name = f"Disturb {at} {what} {rank} {step}"

    @property
    def state_key(self) -> str:
        return self._name

    def _now(self, at: str, trainer: pl.Trainer, *args: Any) -> None:
        if at != self.at or trainer.global_rank != self.rank or trainer.global_step != self.step:
            return
        if self.what != "sleep":
            self.at = ""
        if self.what == "raise":
            raise ZeroDivisionError("a bad shard, say")
        if self.what == "exit":
            os._exit(3)
        if self.what == "sleep":
            time.sleep(self.seconds)
        elif self.what == "nan":
            args[1].mul_(torch.nan)
        else:
            where, _, names = self.what.rpartition(":")
            pids = [process.pid for process in active_children()] if where else [os.getpid()]
            assert pids
            for pid in pids:
                for name in names.split("+"):
                    if where:  # from a process that is not the worker's parent, as a cluster would
                        subprocess.run(["kill", "-s", name.removeprefix("SIG"), str(pid)], check=True)
                    else:
                        os.kill(pid, getattr(signal, name))

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._now("setup", trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._now("sanity", trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._now("train", trainer)

    def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        self._now("backward", trainer, *args)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if batch_idx == 1 and not trainer.sanity_checking:
            self._now("validation", trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        self._now("save", trainer)


class Slow(Callback):
    """A rank whose steps take longer than the others'."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


class Impatient(Callback):
    """From the end of the first step on, a run is taken for hung after ``seconds``; its start may take longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        [health] = [callback for callback in trainer.callbacks if isinstance(callback, Health)]
        health._watch.seconds = self.seconds


class Halved(Callback):
    """Puts other weights in place for a validation, in a way that nobody else knows to undo."""

    def _scale(self, module: pl.LightningModule, factor: float) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(factor)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._scale(module, 0.5)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._scale(module, 2.0)
