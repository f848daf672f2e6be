"""What ``mmssl predict`` leaves behind: every hidden word with its guess, and grids of completed pictures."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from mmssl.training.callbacks.pictures import draw_grid
from mmssl.training.module import Completion
from mmssl.types import Batch


class Predictions(Callback):
    """Writes ``predictions/`` in the run's folder, one file a rank and batch by batch, so that memory stays flat.

    ``words-0.jsonl`` has a line per sample: its key, the text as it was seen, and for every hidden token the truth and
    the guess.  ``batch-00000-0.png`` shows the first pictures of a batch.  The last number is the rank.

    Args:
        pictures: rows of the grid of each batch; 0 draws none.
        grids: draw the first so many batches.
    """

    def __init__(self, pictures: int = 8, grids: int = 4) -> None:
        self.pictures, self.grids = pictures, grids
        self.folder = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = Path(trainer.default_root_dir) / "predictions"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"words-{trainer.global_rank}.jsonl").unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, Completion):
            return
        tokenizer: Any = getattr(pl_module, "tokenizer", None)
        if outputs.input_ids is not None:
            with (self.folder / f"words-{trainer.global_rank}.jsonl").open("a", encoding="utf-8") as file:
                for i, key in enumerate(batch.keys):
                    if batch.valid is None or bool(batch.valid[i]):
                        file.write(json.dumps(_words(outputs, i, key, tokenizer), ensure_ascii=False) + "\n")
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
