"""What every run has beside what its config says: loggers, plugins, quiet logs."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from mmssl.cli.cluster import in_step
from mmssl.training.checkpoint import AtomicCheckpointIO
from mmssl.training.loggers import MetricsFile, Wandb


class Started(Callback):
    """Notes that building is over: what fails from here on is no longer a matter of the config."""

    def __init__(self, state: dict[str, bool]) -> None:
        self._state = state

    def _note(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._state["building"] = False

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _note


def loggers(subcommand: str, folder: Path, asked: Any) -> list[Logger]:
    """The CSV file in any case, and for training W&B, unless something else is asked for."""
    if subcommand != "fit":
        return [MetricsFile(folder / f"{subcommand}.csv", first_step=0)]
    metrics = MetricsFile(folder / "metrics.csv")
    if asked is False:
        return [metrics]
    if asked is None or asked is True:
        asked = Wandb()
    others = list(asked) if isinstance(asked, list | tuple) else [asked]
    for logger in others:
        if isinstance(logger, Wandb):
            logger.set_folder(folder)
    return [*others, metrics]


def plugins(asked: Any) -> list[Any]:
    """Those asked for; and atomic checkpoints, and under SLURM its environment, unless these are asked for."""
    found = list(asked) if isinstance(asked, list | tuple) else [asked] if asked is not None else []
    if not any(isinstance(p, CheckpointIO) for p in found):
        found.append(AtomicCheckpointIO())
    if any(isinstance(p, ClusterEnvironment) for p in found):
        return found
    if in_step():
        found.append(SLURMEnvironment(auto_requeue=False))  # Lightning's own saves inside the signal handler
    elif SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        found.append(LightningEnvironment())  # in a job, but alone: Lightning takes any process there for one of srun's
    return found


def quiet() -> None:
    """Keep Lightning's advertisements and notices out of the log; warnings that matter stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*callbacks used to create the checkpoint.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*sync_dist=True.*",  # what is logged is over all ranks already
        ".*This DataLoader will create .* worker processes.*",  # mmssl.data.loader says it in one line, once
        ".*You're using the WeightAveraging callback.*",  # where it does not go, FSDP, it is refused
        ".*Total length of `list` across ranks is zero.*",  # a run without validation data
        # Inside a job it is worth reading; on a machine that merely has srun it says nothing.
        *((".*`srun` command is available.*",) if "SLURM_JOB_ID" not in os.environ else ()),
    ):
        warnings.filterwarnings("ignore", pattern)
