"""Says when a run is sick: steps that are skipped, and steps that never end."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from mmssl.data.lines import append_line
from mmssl.training.guard import SkipError, Skipped, StepGuard
from mmssl.training.hangs import HangWatch
from mmssl.training.messages import warn
from mmssl.training.together import hear_all
from mmssl.training.votes import Votes


class Health(Callback):
    """What ``mmssl fit`` watches over; it always installs this.

    A step whose gradients are not finite changes nothing on any rank, with or without this callback
    (:class:`mmssl.training.guard.StepGuard`).  Here it is counted as ``train/skipped_steps``, since the run began, and
    its samples are written to ``skipped_steps.jsonl`` in the run's folder.

    Args:
        skip_grad_norm: Skip steps with a finite but larger norm of the gradients as well; null skips none of them.
        skip_limit: The run stops after this many skipped steps in a row.
        hang_minutes: The run ends, with the stacks of every rank in ``stacks/``, when for so long no batch has ended;
            the first step, which may compile, and a checkpoint have three times as long.  null waits for ever.

    Raises (from ``Trainer.fit``):
        SkipError: Too many steps in a row were skipped.
    """

    def __init__(
        self, skip_grad_norm: float | None = None, skip_limit: int = 10, hang_minutes: float | None = 30.0
    ) -> None:
        if skip_grad_norm is not None and skip_grad_norm <= 0:
            raise ValueError(f"health.skip_grad_norm is {skip_grad_norm}; it must be above 0, or null")
        if skip_limit < 1:
            raise ValueError(f"health.skip_limit is {skip_limit}; it must be at least 1")
        if hang_minutes is not None and hang_minutes <= 0:
            raise ValueError(f"health.hang_minutes is {hang_minutes}; it must be above 0, or null to wait for ever")
        self.skip_grad_norm, self.skip_limit, self.hang_minutes = skip_grad_norm, skip_limit, hang_minutes
        self.skipped = 0  # steps since the run began
        self._in_a_row = 0  # how many of them were the last steps
        self._too_many = ""  # what the run is to end with, once it may
        self._guard: StepGuard | None = None
        self._votes: Votes | None = None
        self._watch: HangWatch | None = None
        self._seen_step = 0
        self._began = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._guard, self._votes = getattr(pl_module, "guard", None), getattr(pl_module, "votes", None)
        if self._guard is not None and self.skip_grad_norm is not None:
            self._guard.limit = self.skip_grad_norm
        self._in_a_row, self._too_many, self._began = 0, "", False
        if self.hang_minutes is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which leaves nothing
            rank = trainer.global_rank
            path = Path(trainer.default_root_dir) / "stacks" / f"rank-{rank:05d}.txt"
            self._watch = HangWatch(path, 60 * self.hang_minutes, rank)
            self._watch.start()

    def _beat(self, times: float = 1.0) -> None:
        if self._watch is not None:
            self._watch.beat(times)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._beat(3)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._votes is not None:
            self._votes.clock.begins(trainer.strategy.root_device)
        self._beat(1 if self._began else 3)  # the first step may compile

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._began = True
        self._beat()
        step = trainer.global_step
        if step == self._seen_step or self._guard is None:
            return
        self._seen_step = step
        logs = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if logs or self._guard.is_full or trainer.strategy.root_device.type == "cpu":
            self._count(trainer)
        if self._too_many:
            raise SkipError(self._too_many)
        if logs:
            pl_module.log("train/skipped_steps", float(self.skipped), rank_zero_only=True, batch_size=1)

    def _count(self, trainer: pl.Trainer) -> None:
        """All ranks together, and with the same answer: the norms are the same on all of them."""
        steps = self._guard.read() if self._guard is not None else []
        longest, last = 0, 0
        for step, skipped in steps:
            self._in_a_row = 0 if skipped is None else self._in_a_row + 1
            if self._in_a_row > longest:
                longest, last = self._in_a_row, step
        found = [skipped for _, skipped in steps if skipped is not None]
        if not found:
            return
        self.skipped += len(found)
        every = hear_all([skipped.keys for skipped in found])
        file = Path(trainer.default_root_dir) / "skipped_steps.jsonl"
        keys = [[key for rank in every for key in rank[number]] for number in range(len(found))]
        _write(file, found, keys)
        for skipped in found:
            rank_zero_only(warn)(
                f"step {skipped.step} is skipped: the norm of its gradients is {skipped.grad_norm:.3g}; "
                f"{self.skipped} skipped so far, their samples are in {file}"
            )
        if longest >= self.skip_limit:
            self._too_many = (
                f"{longest} steps in a row were skipped, up to step {last}, because their gradients "
                f"were not finite or too large; the weights are those of step {last - longest}; lower model.lr, "
                f"or look at their samples, all in {file}; of the last: {', '.join(keys[-1][:8])}"
            )

    # A validation, a checkpoint or a long end is no hang.
    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._beat(1 if args[1] else 3)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._beat()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beat()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._beat(3)
        self._count(trainer)  # what came behind the last logged step
        if self._too_many:
            raise SkipError(self._too_many)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Else a run that is preempted would forget what it has not looked at yet.  It goes on first of all: an error
        # here would leave no checkpoint.
        self._count(trainer)
        checkpoint["skipped_steps"], checkpoint["skipped_in_a_row"] = self.skipped, self._in_a_row
        self._beat(3)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.skipped = int(checkpoint.get("skipped_steps", 0))
        self._in_a_row = int(checkpoint.get("skipped_in_a_row", 0))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


@rank_zero_only
def _write(file: Path, found: list[Skipped], keys: list[list[str]]) -> None:
    try:
        for skipped, samples in zip(found, keys, strict=True):
            # As text: JSON has no NaN.
            append_line(file, {"step": skipped.step, "grad_norm": str(skipped.grad_norm), "keys": samples})
    except OSError as error:
        warn(f"cannot write {file} ({error.strerror}); training goes on without it")
