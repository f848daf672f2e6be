"""Ctrl-C, SIGTERM and SIGUSR2: save after the current optimizer step, then stop with an exit code that says so.

The handler only sets a flag.  Saving inside a handler deadlocks as soon as one rank is at another place than the
others, so the ranks look at the flag together at the end of a step, agree and save.  They leave before the next step:
a resumed run repeats neither this step's row in the logs nor a validation that is due now.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from mmssl.training.checkpoint import Checkpoints

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a batch script requeues on it
EXIT_INTERRUPTED = 130  # what shells report after Ctrl-C
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Preempted(SystemExit):
    """The run saved a checkpoint and stopped before its end.  Uncaught, the process exits with ``code``."""

    def __init__(self, signum: int, step: int, checkpoint: Path, rank: int = 0) -> None:
        super().__init__(EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_PREEMPTED)
        self.signal_name = signal.Signals(signum).name
        self.step = step
        self.checkpoint = checkpoint
        self.rank = rank


class Preemption(Callback):
    """Saves at the end of an optimizer step after SIGINT, SIGTERM or SIGUSR2, and stops before the next.

    A second Ctrl-C aborts at once, without saving.

    Args:
        checkpoints: Who saves.
        agree_every_n_steps: With several ranks, how many optimizer steps pass between two votes (a vote
            synchronises the device).

    Raises (from ``Trainer.fit``):
        Preempted: After the checkpoint is on disk.
    """

    def __init__(self, checkpoints: Checkpoints, agree_every_n_steps: int = 10) -> None:
        if agree_every_n_steps < 1:
            raise ValueError(f"agree_every_n_steps is {agree_every_n_steps}; it must be at least 1")
        self.checkpoints = checkpoints
        self.agree_every_n_steps = agree_every_n_steps
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._active = False
        self._pid = os.getpid()
        self._seen_step = 0
        self._leaving: Preempted | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._pid, self._active, self.received = os.getpid(), True, None
            self._leaving = None
            self._install()

    # Lightning puts its own SIGTERM handler, with a broadcast inside, before ours when the run starts: take it back.
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # a micro-batch inside an accumulated step
            return
        self._seen_step = step
        if self._leaving is not None or step == trainer.max_steps or not self._agreed(trainer, step):
            return
        self.checkpoints.note_rng()  # Lightning puts it behind every other callback: it has seen the batch before only
        path = self.checkpoints.save(trainer)
        self._leaving = Preempted(self.received or signal.SIGTERM, step, path, trainer.global_rank)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._leaving is not None:
            raise self._leaving

    def _agreed(self, trainer: pl.Trainer, step: int) -> bool:
        if trainer.world_size == 1:
            return self.received is not None
        if step % self.agree_every_n_steps:
            return False
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._uninstall()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._uninstall()

    def _install(self) -> None:
        if not self._active or threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            before = signal.signal(signum, self._handle)
            if before != self._handle:
                self._before.setdefault(signum, before)

    def _uninstall(self) -> None:
        self._active = False
        if threading.current_thread() is threading.main_thread():
            for signum, before in self._before.items():
                signal.signal(signum, before if before is not None else signal.SIG_DFL)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked loader worker.  Ctrl-C reaches the whole group; the parent decides when workers stop.
            if signum == signal.SIGTERM:
                self._as_before(signum, frame)
            return
        if not self._active:  # after an exception Lightning puts this handler back, when we are done already
            self._as_before(signum, frame)
        elif self.received is not None and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        elif self.received is None:
            self.received = signum
            again = "; Ctrl-C again stops at once, without saving" if signum == signal.SIGINT else ""
            # os.write: print may be in the middle of a line when the signal comes, and is not reentrant.
            os.write(2, f"\nmmssl: {signal.Signals(signum).name}: saving after this step{again}\n".encode())

    def _as_before(self, signum: int, frame: FrameType | None) -> None:
        before = self._before.get(signum, signal.SIG_DFL)
        if callable(before):
            before(signum, frame)
        elif before == signal.SIG_DFL:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
