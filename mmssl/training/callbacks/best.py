"""The best checkpoint by a metric of the validation, beside the newest ones."""

from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mmssl.pretrained.whole import CheckpointError
from mmssl.training.saving import saver_of


class Best(Checkpoint):
    """Keeps ``checkpoints/best.ckpt`` in the run's folder: the one after the best validation so far.

    ``mmssl test --run runs/NAME --ckpt_path best`` takes it.  What makes a run go on (``--resume``) are the checkpoints
    by step, which remember the best score as well.

    Args:
        monitor: name of the metric, such as val/accuracy.
        mode: whether the largest (max) or the smallest (min) is the best.

    Raises (from ``Trainer.fit``):
        CheckpointError: the validation gives no such metric, or the best could not be saved.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: Literal["min", "max"] = "max") -> None:
        self.monitor = monitor
        self.mode = mode
        self.score: float | None = None

    @property
    def state_key(self) -> str:
        return f"Best {self.mode} {self.monitor}"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise CheckpointError(f"monitor of Best is {self.monitor}, which no validation gave; there is {known}")
        # Rank 0's: ranks that judge by their own might not all save.
        score = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        better = score == score and (  # not a number: not the best of anything
            self.score is None or (score > self.score if self.mode == "max" else score < self.score)
        )
        if better:
            self.score = score
            saver_of(trainer).save(Path(trainer.default_root_dir) / "checkpoints" / "best.ckpt")

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score = state_dict["score"]
