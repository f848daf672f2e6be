"""Ctrl-C, SIGTERM and SIGUSR2: save after the current optimizer step, then stop with an exit code that says so.

The handler only sets a flag (:mod:`mmssl.training.signals`).  Saving inside a handler deadlocks as soon as one rank is
at another place than the others, so the ranks look at the flag together, in sums that they need anyway
(:mod:`mmssl.training.votes`), agree and save.  They leave before the next step and before a validation that is due,
which the resumed run then begins with; a validation that is under way is broken off.
"""

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mmssl.training import signals
from mmssl.training.checkpoint import Checkpoints, step_of
from mmssl.training.launcher import own_signals_only
from mmssl.training.messages import warn
from mmssl.training.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, NothingBegun, Signals
from mmssl.training.votes import Votes


class Preempted(SystemExit):
    """The run saved a checkpoint and stopped before its end.  Uncaught, the process exits with ``code``."""

    def __init__(self, signum: int, step: int, checkpoint: Path, rank: int = 0) -> None:
        super().__init__(EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_PREEMPTED)
        self.signal_name = signal.Signals(signum).name
        self.step = step
        self.checkpoint = checkpoint
        self.rank = rank

    @property
    def line(self) -> str:
        """What a person is told, by rank 0 alone."""
        if self.rank:
            return ""
        return (
            f"{self.signal_name}: stopped after step {self.step}, saved {self.checkpoint}; "
            f"to go on: mmssl fit --run {self.checkpoint.parent.parent} --resume"
        )


class _BrokenOff(BaseException):
    """Ends a validation from within one of its batches."""


class Preemption(Callback):
    """Saves at the end of an optimizer step after SIGINT, SIGTERM or SIGUSR2, and stops before the next.

    A second Ctrl-C aborts at once, without saving.

    Args:
        checkpoints: Who saves.
        agree_every_n_steps: With several ranks on GPUs, how many optimizer steps pass at most between two agreements
            (one waits for the device), or fewer, if those take more than two seconds; on CPUs one.

    Raises (from ``Trainer.fit``):
        Preempted: After the checkpoint is on disk.
        NothingBegun: A signal came before the first step.
    """

    def __init__(self, checkpoints: Checkpoints, agree_every_n_steps: int = 10) -> None:
        if agree_every_n_steps < 1:
            raise ValueError(f"agree_every_n_steps is {agree_every_n_steps}; it must be at least 1")
        self.checkpoints = checkpoints
        self.agree_every_n_steps = agree_every_n_steps
        self.signals = Signals()
        self._own = False
        self._votes: Votes | None = None
        self._apart = Votes()  # for a module that is not mmssl's, in whose steps nothing can ride
        self._seen_step = 0
        self._validated_step = -1
        self._owed = False  # the checkpoint that was loaded was saved before a validation
        self._must_finish = False
        self._weights: Tensor | None = None
        self._loops: dict[str, Any] | None = None
        self._leaving: Preempted | None = None

    # ---- before the first step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._own = not signals.current.installed
        if self._own:  # a Trainer of the user's own; mmssl fit has the handlers in place long before
            signals.current = Signals()
        self.signals = signals.current
        self.signals.install()
        self._leaving = None
        self._votes = getattr(pl_module, "votes", None)
        own_signals_only(trainer)
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.run = self._validation(trainer, loop.run)  # type: ignore[method-assign]
        self._leave_if_told(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._leave_if_told(trainer)
        self.signals.phase = "running"  # every rank has voted to begin: from here on they leave after a step only
        votes = self._votes or self._apart
        votes.agree_every_n_steps = self.agree_every_n_steps
        votes.begin(self._ask)
        if self._owed and trainer.enable_validation:
            rank_zero_only(print)(
                f"mmssl: the validation of step {trainer.global_step}, before which the checkpoint was saved, "
                "comes first",
                flush=True,
            )
            _validate(trainer)
        self._owed = False

    def _ask(self) -> tuple[bool, bool]:
        return self.signals.preempted, self.signals.interrupted

    def _leave_if_told(self, trainer: pl.Trainer) -> None:
        told = self.signals.preempted
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            stop = NothingBegun(self.signals.name)
            stop.line = stop.line if trainer.is_global_zero else ""
            raise stop

    # ---- at the end of a step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # a micro-batch inside an accumulated step
            return
        self._seen_step = step
        preempt, interrupt = self._told(trainer)
        if self._leaving is not None or step == trainer.max_steps or not (preempt or interrupt):
            return
        self.checkpoints.note_rng()  # Lightning puts it behind every other callback: it has seen the batch before only
        self._leaving = self._saved(trainer, preempt)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._leaving is not None:
            raise self._leaving

    def _told(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Whether any rank was told to stop, by a cluster, by a person; the same answer on all ranks."""
        if trainer.world_size == 1:
            return self._ask()
        if self._votes is not None:
            return self._votes.read()
        return self._apart.meet(trainer.world_size, trainer.strategy.root_device)

    def _saved(self, trainer: pl.Trainer, preempt: bool) -> Preempted:
        """Save, and say what all ranks then stop with."""
        path = self.checkpoints.save(trainer)
        mine = [signum for signum in self.signals.received if (signum != signal.SIGINT) == preempt]
        signum = mine[0] if mine else signal.SIGTERM if preempt else signal.SIGINT
        return Preempted(signum, trainer.global_step, path, trainer.global_rank)

    # ---- during a validation

    def _validation(self, trainer: pl.Trainer, run: Callable[[], Any]) -> Callable[[], Any]:
        """Lightning's validation loop, which stops between two batches if the ranks agree to."""

        def validation() -> Any:
            if self._leaving is not None:
                raise self._leaving
            if trainer.sanity_checking or self.signals.phase != "running" or trainer.global_step == trainer.max_steps:
                return run()  # the last one, too: the run would be over without it
            self._must_finish = False
            self._weights = _fingerprint(trainer.lightning_module)
            # As it was when the step ended: a resumed run must not think that it had validated.
            self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
            for count in ("total", "current"):
                progress = self._loops["epoch_loop.batch_progress"][count]
                progress["completed"] = progress["processed"] - 1
            try:
                return run()
            except _BrokenOff:
                trainer.training = True
                preempt = self._votes.told[0] if self._votes and trainer.world_size > 1 else self.signals.preempted
                raise self._saved(trainer, preempt) from None
            finally:
                self._loops = self._weights = None

        return validation

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._loops is None or self._must_finish:
            return
        if trainer.world_size > 1 and self._votes is None:
            return  # with a module of the user's own, ranks may have unequal numbers of batches: nobody would answer
        told = self._ask()
        if self._votes is not None:
            told = self._votes.between(batch_idx, trainer.world_size, trainer.strategy.root_device)
        if not any(told):
            return
        if self._own_weights(trainer, pl_module):
            raise _BrokenOff
        self._must_finish = True
        rank_zero_only(warn)("a callback has other weights in place for the validation, which therefore ends first")

    def _own_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Put the trained weights back in place of averaged ones; whether all ranks have them now."""
        averages = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        assert self._weights is not None
        other = not torch.equal(_fingerprint(pl_module), self._weights)
        if other:
            for average in averages:
                average._swap_models(pl_module)
        same = torch.equal(_fingerprint(pl_module), self._weights)
        if trainer.world_size > 1:
            same = trainer.strategy.reduce_boolean_decision(same, all=True)
        if other and not same:
            for average in averages:
                average._swap_models(pl_module)
        return same

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step

    # ---- in a checkpoint

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        fetcher, loop = trainer.fit_loop._data_fetcher, trainer.fit_loop.epoch_loop
        due = fetcher is not None and trainer.global_step != self._validated_step and loop._should_check_val_fx(fetcher)
        checkpoint["validation_due"] = due
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._owed = bool(checkpoint.get("validation_due", False))

    # ---- the end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._over()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            exception.line = self._kept(trainer)  # type: ignore[attr-defined]
        if self.signals.phase == "running":
            self._over()

    def _kept(self, trainer: pl.Trainer) -> str:
        """What a second Ctrl-C leaves behind."""
        if trainer.global_rank:
            return ""
        whole = sorted(self.checkpoints.place(trainer).glob("step=*.ckpt"), key=step_of)
        if not whole:
            return "interrupted, nothing saved"
        return (
            f"interrupted after step {trainer.global_step}; saved is step {step_of(whole[-1])}; "
            f"to go on: mmssl fit --run {whole[-1].parent.parent} --resume"
        )

    def _over(self) -> None:
        self.signals.phase = "over"
        if self._own:
            self.signals.uninstall()


def _validate(trainer: pl.Trainer) -> None:
    """A validation as the training loop runs it, before the first batch."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    first = trainer._logger_connector._first_loop_iter
    loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first


def _fingerprint(module: torch.nn.Module) -> Tensor:
    """A norm of every parameter of this rank: other weights have others."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # the root stays gathered behind an evaluation's forward
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in map(torch.Tensor.detach, module.parameters())]
    return torch.stack(torch._foreach_norm([weight for weight in weights if weight.is_floating_point()]))
