"""Which samples every step trained on: for audits, and to show that a resumed run lost and repeated nothing."""

import itertools
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from mmssl.data.lines import append_line
from mmssl.types import Batch


class LedgerError(RuntimeError):
    """The ledger could not be written or read.  The message says where, why and what to do."""


class SampleLedger(Callback):
    """Writes ``ledger/rank-00000.jsonl`` in the run's folder: one line per batch, before the batch is trained on.

    A line holds ``step`` (the optimizer step that the batch belongs to, from 1), ``batch`` (number of the global batch)
    and ``keys`` (this rank's samples, as shard/key; a replaced sample under its substitute's name).  Every start of the
    run adds a line with ``start`` (the number of steps that its checkpoint had), ``world`` and an ``id`` that all ranks
    share.  :func:`read_ledger` puts the ranks and starts together.

    Raises (from ``Trainer.fit``):
        LedgerError: the folder cannot be written to, or the disk is full.
    """

    def __init__(self) -> None:
        self._path = Path()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._path = Path(trainer.default_root_dir) / "ledger" / f"rank-{trainer.global_rank:05d}.jsonl"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"cannot write {self._path} ({error.strerror}); make its folder writable") from error
        start: str = trainer.strategy.broadcast(uuid.uuid4().hex[:12])
        self._write({"start": trainer.global_step, "world": trainer.world_size, "id": start}, fresh=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._write({"step": trainer.global_step + 1, "batch": batch.index, "keys": batch.keys})

    def _write(self, entry: dict[str, Any], fresh: bool = False) -> None:
        try:
            append_line(self._path, entry, fresh=fresh)
        except OSError as error:
            raise LedgerError(
                f"cannot write {self._path} ({error.strerror}); free some space, or take SampleLedger out"
            ) from error


def read_ledger(run: str | Path) -> dict[int, list[list[str]]]:
    """The samples that a run's steps trained on: {step: the keys of each of its global batches, sorted}.

    What a stopped start had trained on after the checkpoint from which the next one went on is left out: its steps were
    done again.  Of a run that was killed and has not gone on yet, the steps behind its newest checkpoint are in here,
    with the one that was begun by all ranks and perhaps not ended.

    Raises:
        LedgerError: if there is no ledger, or a line in the middle is damaged.
    """
    files = sorted((Path(run) / "ledger").glob("rank-*.jsonl"))
    if not files:
        raise LedgerError(f"there is no ledger in {run}; add mmssl.SampleLedger to trainer.callbacks")
    starts = [entry for entry in _lines(files[0]) if "start" in entry]
    until: dict[str, float] = {}  # a start's steps count up to where the first of the later starts began
    earliest = math.inf
    for entry in reversed(starts):
        until[entry["id"]] = earliest
        earliest = min(earliest, entry["start"])
    worlds = {entry["id"]: entry["world"] for entry in starts}
    parts: dict[int, dict[int, list[list[str]]]] = {}
    world: dict[int, int] = {}
    for file in files:
        start = ""
        for entry in _lines(file):
            if "start" in entry:
                start = entry["id"]
            elif entry["step"] <= until.get(start, 0):
                world[entry["step"]] = worlds[start]
                parts.setdefault(entry["step"], {}).setdefault(entry["batch"], []).append(entry["keys"])
    return {
        step: [sorted(itertools.chain(*batches[number])) for number in sorted(batches)]
        for step, batches in sorted(parts.items())
        if all(len(ranks) == world[step] for ranks in batches.values())
    }


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # A writer that was killed leaves half a line, behind which the next start begins a line of its own.
            if number + 1 < len(lines) and not lines[number + 1].startswith('{"start"'):
                raise LedgerError(f"{file}, line {number + 1}: is damaged; the ledger cannot be trusted") from None
