"""The best checkpoint by a metric of the validation, beside the newest ones."""

from typing import Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Best(ModelCheckpoint):
    """Keeps ``checkpoints/best.ckpt`` in the run's folder: Lightning's ModelCheckpoint with one file of a fixed name.

    ``mmssl test --run runs/NAME --ckpt_path best`` takes it.  What makes a run go on (``--resume``) are the checkpoints
    by step, not this one.

    Args:
        monitor: name of the metric, such as val/accuracy.
        mode: whether the largest (max) or the smallest (min) is the best.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: Literal["min", "max"] = "max") -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:  # not Lightning's way, which makes a folder for each logger
            self.dirpath = f"{trainer.default_root_dir}/checkpoints"
        super().setup(trainer, pl_module, stage)
