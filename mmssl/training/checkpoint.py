"""Which checkpoints a run keeps, and when it saves them; with them the random generators of every rank.

How one is written stands in :mod:`mmssl.training.saving`: whole or absent, at once or in the background.
"""

import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

from mmssl.pretrained.whole import REPLACED, CheckpointError, damage_of, latest_checkpoint, step_of
from mmssl.training.in_place import remove
from mmssl.training.saving import AtomicCheckpointIO, saver_of
from mmssl.training.together import hear_all
from mmssl.training.votes import Votes

__all__ = ["AtomicCheckpointIO", "CheckpointError", "Checkpoints", "damage_of", "latest_checkpoint", "step_of"]

LOOK_EVERY_N_STEPS = 10  # at rank 0's clock and at what is written in the background, where there are several ranks


class Checkpoints(Checkpoint):
    """Saves every N optimizer steps or minutes and at the end; keeps the last few.  ``mmssl fit`` always installs it.

    They are named ``step=00001000.ckpt``: files, or folders under sharded FSDP.  Each holds, beside what Lightning
    stores, the state of the random generators of Python, NumPy and torch of every rank, which a resumed run takes over
    before its first step.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; null saves by time and at the end only.
        every_n_minutes: Save as well when so many minutes have passed since the last one, by rank 0's clock.
        keep: How many of the newest stay.  Two, so that there is one to fall back to.
        keep_every_n_steps: Save at each multiple of this as well, and let those stay for good.
        asynchronous: Go on with training once the state is copied to the host's memory (one state more in it on each
            rank that writes), and write the copy meanwhile.  One that fails ends the run some steps later.

    Attributes:
        folder: Where they go; unless set before, ``checkpoints`` in the Trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        every_n_steps: int | None = 1000,
        keep: int = 2,
        every_n_minutes: float | None = None,
        keep_every_n_steps: int | None = None,
        asynchronous: bool = True,
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "keep": keep, "keep_every_n_steps": keep_every_n_steps}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it must be at least 1")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(f"checkpoint.every_n_minutes is {every_n_minutes}; it must be above 0, or null")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.keep_every_n_steps = keep_every_n_steps
        self.asynchronous = asynchronous
        self.folder: str | Path | None = None
        self._seen_step = 0
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._unfinished = False
        self._rng: dict[str, Any] | None = None
        self._restore_rng = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            folder = self.place(trainer)
            for leftover in [*folder.glob(".*.tmp"), *folder.glob(f".*{REPLACED}")]:  # of a run that was killed
                remove(leftover)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        # Saved is what was loaded from here, by rank 0's word; what came from elsewhere is yet to be saved here.
        loaded, own = trainer.ckpt_path, self._path(trainer)
        here = loaded is not None and Path(loaded).resolve() == own.resolve()
        self._saved_step = trainer.global_step if hear_all(here)[0] else -1
        self._saved_at, self._unfinished = time.monotonic(), False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restore_rng and self._rng is not None:
            restore_rng_state(self._rng)
        self._restore_rng = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.note_rng()
        step = trainer.global_step
        if step == self._seen_step:  # a micro-batch inside an accumulated step
            return
        self._seen_step = step
        if self._by_step(step) or step == trainer.max_steps or self._by_time(trainer, step):
            self.save(trainer, wait=False)

    def note_rng(self) -> None:
        """Keep the generators' state at the end of a batch, which is what a checkpoint saved from here on holds."""
        self._rng = rng_state()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Validation draws from the generators too (a loader's seed); a run that resumes after it must not notice.
        self._restore_rng = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt):
            saver_of(trainer).wait()  # what is being written is whole when this fit ends, or it is told

    def save(self, trainer: pl.Trainer, wait: bool = True) -> Path:
        """Save now, unless this step is saved already; call it on every rank.

        Args:
            trainer: whose state.
            wait: return when it is on the disk, also if it is to be written in the background otherwise.

        Raises:
            CheckpointError: on every rank, if this or an earlier checkpoint could not be written on any.
            DivergenceError: on every rank, if they have trained apart: their weights make no checkpoint.
        """
        step = trainer.global_step
        path = self._path(trainer)
        if step != self._saved_step:
            if isinstance(votes := getattr(trainer.lightning_module, "votes", None), Votes):
                votes.settle()
            self._saved_step, self._saved_at = step, time.monotonic()
            self._unfinished = self.asynchronous and not wait
            saver_of(trainer).save(path, background=self._unfinished, after=partial(self._prune, path))
        elif wait:
            saver_of(trainer).finish()
        return path

    def place(self, trainer: pl.Trainer) -> Path:
        """The folder of the checkpoints; never the one that one happens to stand in."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"
        return Path(self.folder)

    def _path(self, trainer: pl.Trainer) -> Path:
        """Of a checkpoint of the present step."""
        return self.place(trainer) / f"step={trainer.global_step:08d}.ckpt"

    def _by_step(self, step: int) -> bool:
        return any(every is not None and step % every == 0 for every in (self.every_n_steps, self.keep_every_n_steps))

    def _by_time(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether rank 0's clock asks for a checkpoint; and ends the run if one in the background has failed."""
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self.every_n_minutes is not None and minutes >= self.every_n_minutes and trainer.is_global_zero
        running, failed = saver_of(trainer).state
        if trainer.world_size > 1:
            # No collective that is not needed: the votes of others are asked for while there is something to learn.
            if step % LOOK_EVERY_N_STEPS or not (self._unfinished or self.every_n_minutes is not None):
                return False
            votes = torch.tensor([due, running, failed], dtype=torch.float32, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(votes)
            due, running, failed = (vote > 0 for vote in votes.tolist())
        self._unfinished = running
        if failed:
            saver_of(trainer).finish()
        return due

    def _prune(self, newest: Path) -> None:
        found = sorted(newest.parent.glob("step=*.ckpt"), key=step_of)
        for path in [path for path in found if step_of(path) <= step_of(newest)][: -self.keep]:
            if self.keep_every_n_steps is None or step_of(path) % self.keep_every_n_steps:
                remove(path)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["rng"] = hear_all(self._rng or rng_state())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get("rng", [])
        if len(states) == trainer.world_size:  # with another number of ranks there is no state to go on from
            self._rng, self._restore_rng = states[trainer.global_rank], True


def rng_state() -> dict[str, Any]:
    """The state of this process's global random generators, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
