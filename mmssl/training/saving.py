"""Saving on all ranks together: at once, or in the background while training goes on.

A save in the background stalls training for a copy of the state to the host's memory; a thread writes the copy.  There
is one thread, so two checkpoints are never written at once, and it is not a daemon: Python waits for it at the end.
"""

import os
import pickle
import weakref
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO

from mmssl.pretrained.whole import CheckpointError, first_line, read_checkpoint
from mmssl.training.fsdp_checkpoint import SavesSharded
from mmssl.training.host_copy import HostCopy
from mmssl.training.in_place import put_in_place, remove, why_not_plain, why_not_written, write_plain
from mmssl.training.together import fail_together, same_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints atomically and refuses damaged ones; give it to the Trainer's ``plugins``.

    Loading is ``weights_only``: tensors and plain Python values, never code.  It reads sharded checkpoints as well.
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
            write_plain(checkpoint, temporary)
            put_in_place(temporary, path)
        except pickle.PickleError as error:
            raise CheckpointError(why_not_plain(error, path)) from error
        except (OSError, RuntimeError) as error:  # a full disk is an OSError or torch's RuntimeError
            raise CheckpointError(
                f"cannot save {path}: {why_not_written(error)}; earlier checkpoints are untouched, "
                "free some space or make the folder writable, then go on with --resume"
            ) from error
        finally:
            remove(temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, a file or a sharded one, after checking that it is whole.

        Where there are several ranks, all of them call this together, and rank 0's path counts.

        Raises:
            CheckpointError: There is no such checkpoint, it is damaged, or a rank does not see it.
        """
        # Mapped, or each rank of a machine would hold all of it while its own state is filled from it.
        return read_checkpoint(same_checkpoint(Path(path)), thorough=False, mapped=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


class Saver:
    """Saves a Trainer's state, on all of its ranks together; see :func:`saver_of`."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer: Callable[[], pl.Trainer | None] = weakref.ref(trainer)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None
        self._copy = HostCopy()

    @property
    def trainer(self) -> pl.Trainer:
        trainer = self._trainer()
        assert trainer is not None
        return trainer

    def save(self, path: Path, background: bool = False, after: Callable[[], None] | None = None) -> None:
        """Save to ``path``; every rank calls this at the same step.

        Args:
            path: the same on all ranks.
            background: return as soon as the state is copied; :meth:`finish` or the next save waits for the rest.
            after: what rank 0 does when the checkpoint is on the disk.

        Raises:
            CheckpointError: on every rank, if this one, or an earlier one in the background, could not be written.
        """
        self.finish()
        strategy = self.trainer.strategy
        content = self.trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        write: Callable[[], None] = _nothing
        if isinstance(strategy, SavesSharded):
            strategy.settle = self.finish
            # A thread must not touch a GPU: it would use the first one, on a stream of its own.
            if strategy.saves_sharded and (background or strategy.root_device.type != "cpu"):
                content = self._copied(content, path)
            write = strategy.writing(content, path)
        else:
            if background:
                content = self._copied(content if strategy.is_global_zero else {}, path)
            if strategy.is_global_zero:
                write = partial(strategy.checkpoint_io.save_checkpoint, content, path)
        self._running = self._thread.submit(_in_turn, write, after if strategy.is_global_zero and after else _nothing)
        if not background:
            self.finish()

    def _copied(self, content: dict[str, Any], path: Path) -> dict[str, Any]:
        message, cause = None, None
        try:
            content = self._copy(content)
        except Exception as error:  # noqa: BLE001  # whatever it is, the others would train on and wait for this rank
            message, cause = f"cannot save {path}: {type(error).__name__}: {first_line(error)}", error
        fail_together(message, cause=cause)
        return content

    def finish(self) -> None:
        """Wait until nothing is being written; every rank calls this at the same step.

        Raises:
            CheckpointError: on every rank, if what was written in the background failed on any.
        """
        running, self._running = self._running, None
        if running is not None:  # on all ranks or on none
            error = running.exception()
            fail_together(first_line(error) if error else None, cause=error)

    def wait(self) -> None:
        """Wait until this rank has written what it was about to, without asking the others."""
        if self._running is not None:
            futures.wait([self._running])

    @property
    def state(self) -> tuple[bool, bool]:
        """(something is still being written, it failed), on this rank, without waiting."""
        running = self._running
        if running is None or not running.done():
            return running is not None, False
        return False, running.exception() is not None


_SAVERS: "weakref.WeakKeyDictionary[pl.Trainer, Saver]" = weakref.WeakKeyDictionary()


def saver_of(trainer: pl.Trainer) -> Saver:
    """The one Saver of a Trainer, so that two callbacks never write at once."""
    if trainer not in _SAVERS:
        _SAVERS[trainer] = Saver(trainer)
    return _SAVERS[trainer]


def _in_turn(*work: Callable[[], None]) -> None:
    for one in work:
        one()


def _nothing() -> None:
    """What a rank writes that has nothing to write."""
