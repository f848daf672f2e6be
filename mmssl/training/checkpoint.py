"""Checkpoints on disk: whole or absent, checked when read, and the newest whole one is found again.

A checkpoint is written under a temporary name in its own folder, synced, read back (its index, not its tensors) and
only then renamed, so a kill, a full disk or a power cut leaves the previous one untouched.  A checkpoint is a zip
archive in which torch stores a CRC-32 of every record; torch itself does not check them on reading, so we do.
"""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from mmssl.pretrained.whole import CheckpointError, damage_of, first_line, latest_checkpoint, step_of

__all__ = ["AtomicCheckpointIO", "CheckpointError", "Checkpoints", "damage_of", "latest_checkpoint", "step_of"]


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints atomically and refuses damaged ones; give it to the Trainer's ``plugins``.

    Loading is ``weights_only``: tensors and plain Python values, never code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            CheckpointError: The folder is read-only, the disk is full, or the content could not be loaded again.
                What stood at ``path`` before is still there.
        """
        path = Path(path)
        # In the target's folder: a move across file systems is a copy, and a copy can be cut short.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            # Memory-mapped, so this reads the pickle alone: a value that weights_only refuses shows now, not on resume.
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"cannot save {path}: a value in it is neither a tensor nor plain Python ({first_line(error)}); "
                "look for a Path or an object among the hyperparameters and the states of modules and callbacks"
            ) from error
        except (OSError, RuntimeError) as error:  # a full disk is an OSError or torch's RuntimeError
            raise CheckpointError(
                f"cannot save {path}: {first_line(error)}; earlier checkpoints are untouched, "
                "free some space or make the folder writable, then go on with --resume"
            ) from error
        finally:
            _remove_quietly(temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint after checking that it is whole.

        Raises:
            CheckpointError: There is no such file, or it is damaged.
        """
        path = Path(path)
        damage = damage_of(path)
        if damage:
            raise CheckpointError(f"cannot load {path}: {damage}; name another checkpoint")
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only is not False)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"cannot load {path}: {first_line(error)}") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        _remove_quietly(Path(path))


class Checkpoints(Checkpoint):
    """Saves every N optimizer steps and at the end; keeps the last few.  ``mmssl fit`` always installs it.

    Files are named ``step=00001000.ckpt``.  Each holds, beside what Lightning stores, the state of the random
    generators of Python, NumPy and torch of every rank, which a resumed run takes over before its first step.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        keep: How many of them stay.  Two, so that there is one to fall back to.

    Attributes:
        folder: Where they go; unless set before, ``checkpoints`` in the Trainer's ``default_root_dir``.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.folder: str | Path | None = None
        self._seen_step = 0
        self._saved_step = -1
        self._rng: dict[str, Any] | None = None
        self._restore_rng = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit" and trainer.is_global_zero:
            for leftover in Path(self.folder).glob(".*.tmp"):  # of a run that was killed while it saved
                _remove_quietly(leftover)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._saved_step = trainer.global_step if trainer.global_step else -1

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
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer)

    def note_rng(self) -> None:
        """Keep the generators' state at the end of a batch, which is what a checkpoint saved from here on holds."""
        self._rng = rng_state()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Validation draws from the generators too (a loader's seed); a run that resumes after it must not notice.
        self._restore_rng = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Save now, unless this step is saved already; call it on every rank."""
        step = trainer.global_step
        path = Path(self.folder or ".") / f"step={step:08d}.ckpt"
        if step != self._saved_step:
            trainer.save_checkpoint(path)
            self._saved_step = step
            if trainer.is_global_zero:
                self._prune(step)
        return path

    def _prune(self, step: int) -> None:
        ours = [path for path in Path(self.folder or ".").glob("step=*.ckpt") if step_of(path) <= step]
        for path in sorted(ours, key=step_of)[: -self.keep]:
            _remove_quietly(path)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [self._rng or rng_state()]
        if trainer.world_size > 1:
            mine, states = states[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(states, mine)
        checkpoint["rng"] = states

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


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        return  # it is gone, or cannot go; neither is worth stopping a run
