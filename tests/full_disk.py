"""A full disk for tests: around a block, or from a step on in one rank, or a folder that cannot be written."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mmssl.training.saving import saver_of


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process gets longer than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk(pl.Callback):
    """A limit on the size of files stands for the full disk: both end a write half-way, and also root's."""

    def __init__(self, rank: int, step: int, kind: str = "full") -> None:
        self.rank, self.step, self.kind = rank, step, kind

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank != self.rank or trainer.global_step != self.step:
            return
        saver_of(trainer).wait()  # what is being written in the background has its place
        if self.kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        else:  # a file in the folder's place: the superuser may write to folders that are read-only
            folder = Path(trainer.default_root_dir) / "checkpoints"
            shutil.move(folder, folder.with_name("before"))
            folder.write_text("")
