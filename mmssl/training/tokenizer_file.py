"""A run keeps its tokenizer: the weights mean nothing under another vocabulary."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mmssl.data.tokenizer import TextTokenizer

_NAME = "tokenizer.json"


def tokenizer_of_run(folder: Path, named: Any) -> Any:
    """The run's own tokenizer.json if it has one, else what its config names.

    The file that a config names may have changed or gone since, or the run may have come from another machine.
    """
    return str(folder / _NAME) if (folder / _NAME).is_file() else named


class TokenizerFile(Callback):
    """Writes the tokenizer of a text model to the run's folder when training starts, and never over another one.

    Args:
        folder: the run's folder.

    Raises (from ``Trainer.fit``):
        ValueError: the folder holds another tokenizer.json.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / _NAME

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tokenizer = getattr(pl_module, "tokenizer", None)
        if not isinstance(tokenizer, TextTokenizer) or not self.path.is_file():
            return
        if self.path.read_text(encoding="utf-8") != tokenizer.to_json():
            raise ValueError(
                f"{self.path} is another tokenizer than {tokenizer.path}, and checkpoints may depend on it; set "
                f"model.tokenizer to {self.path}, or start a new run in another folder"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tokenizer = getattr(pl_module, "tokenizer", None)
        if trainer.is_global_zero and isinstance(tokenizer, TextTokenizer):
            partial = self.path.with_name(f".{_NAME}.tmp")
            partial.write_text(tokenizer.to_json(), encoding="utf-8")
            os.replace(partial, self.path)  # a killed run leaves no half file
