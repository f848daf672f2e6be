"""A run that lasts as long as a test needs it: slow until a file appears, then as fast as it can."""

import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Throttle(Callback):
    """Waits at every step until ``<run>/hurry`` exists, at most ``seconds``."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not (Path(trainer.default_root_dir) / "hurry").exists():
            time.sleep(self.seconds)
