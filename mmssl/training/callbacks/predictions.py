"""What ``mmssl predict`` leaves behind: hidden words with their guesses, grids of completed pictures, or classes."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from mmssl.training.callbacks.pictures import draw_grid
from mmssl.training.completion import Completion, Rows
from mmssl.types import Batch

_WRITTEN = re.compile(r".+-(\d+)\.jsonl|batch-\d+-(\d+)\.png")  # the rank


class PredictionsError(RuntimeError):
    """Predictions could not be written.  The message says where, why and what to do."""


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PredictionsError(
            f"cannot write predictions to {folder} ({error.strerror or error}); free some space or make it writable"
        ) from error


class Predictions(Callback):
    """Writes ``predictions/`` in the run's folder, one file a rank and batch by batch, so that memory stays flat.

    ``words-0.jsonl`` has a line per sample: its key, the text as it was seen, and for every hidden token the truth and
    the guess.  ``batch-00000-0.png`` shows the first pictures of a batch.  A fine-tuned model leaves lines of its own,
    such as ``labels-0.jsonl``.  The last number is the rank.

    Args:
        pictures: rows of the grid of each batch; 0 draws none.
        grids: draw the first so many batches.

    Raises (from ``Trainer.predict``):
        PredictionsError: the folder cannot be written to, or the disk is full.
    """

    def __init__(self, pictures: int = 8, grids: int = 4) -> None:
        self.pictures, self.grids = pictures, grids
        self.folder = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = Path(trainer.default_root_dir) / "predictions"
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for earlier in list(self.folder.iterdir()):
                written = _WRITTEN.fullmatch(earlier.name)
                rank = int(written[1] or written[2]) if written else -1
                nobody = trainer.is_global_zero and rank >= trainer.world_size  # of an earlier run with more ranks
                if rank == trainer.global_rank or nobody:
                    earlier.unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if isinstance(outputs, Completion):
            with _writing(self.folder):
                self._write(trainer, pl_module, outputs, batch, batch_idx)
        elif isinstance(outputs, Rows):
            with _writing(self.folder):
                self._append(outputs.name, trainer.global_rank, outputs.rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            kinds = sorted({path.name.rpartition("-")[0] + "-*" + path.suffix for path in self.folder.iterdir()})
            print(f"mmssl: predictions are in {self.folder}: {', '.join(kinds)}", flush=True)

    def _append(self, name: str, rank: int, rows: Iterable[dict[str, Any]]) -> None:
        # A key may hold bytes that are no UTF-8; backslashes are how JSON writes such.
        path = self.folder / f"{name}-{rank}.jsonl"
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _write(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Completion, batch: Batch, batch_idx: int
    ) -> None:
        tokenizer: Any = getattr(pl_module, "tokenizer", None)
        if outputs.input_ids is not None:
            valid = [True] * batch.size if batch.valid is None else batch.valid.tolist()
            chosen = [(i, key) for i, key in enumerate(batch.keys) if valid[i]]
            self._append("words", trainer.global_rank, (_words(outputs, i, key, tokenizer) for i, key in chosen))
        if self.pictures and batch_idx < self.grids:
            few = Completion._make(None if x is None else x[: self.pictures] for x in outputs)
            draw_grid(few, tokenizer).save(self.folder / f"batch-{batch_idx:05d}-{trainer.global_rank}.png")


def _words(outputs: Completion, i: int, key: str, tokenizer: Any) -> dict[str, Any]:
    assert outputs.input_ids is not None
    assert outputs.hidden is not None
    assert outputs.labels is not None
    assert outputs.guesses is not None
    return {
        "key": key,
        "seen": " ".join(map(tokenizer.token, outputs.input_ids[i])),
        "hidden": [
            {"position": position, "truth": tokenizer.token(truth), "guess": tokenizer.token(guess)}
            for position, truth, guess in zip(outputs.hidden[i], outputs.labels[i], outputs.guesses[i], strict=True)
        ],
    }
