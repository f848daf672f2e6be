"""Small runs that the real command trained, for what is done with a backbone afterwards."""

from pathlib import Path
from typing import Any

import lightning
import yaml
from pairs import TINY

from mmssl.cli import main

SMALL = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}


def train(folder: Path, objective: str, shards: str, callbacks: list[Any] | None = None, **model: Any) -> Path:
    """Four steps of ``mmssl fit``; returns the run's folder."""
    arguments = {"backbone": "vit_tiny_patch16_224", "backbone_options": {**TINY, "drop_path_rate": 0.1}, **model}
    config = {
        "model": {"class_path": f"mmssl.{objective}", "init_args": arguments},
        "data": {"train": shards, "val": shards, "batch_size": 8, "num_workers": 0, "val_samples": 8},
        "trainer": {
            "max_steps": 4,
            "val_check_interval": 4,
            "log_every_n_steps": 2,
            "accelerator": "cpu",
            "logger": False,
            "callbacks": callbacks,
        },
    }
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path), "--run", str(folder)]) == 0
    return folder


def save_untrained(module: lightning.LightningModule, path: Path) -> Path:
    """What ``trainer.save_checkpoint`` writes of a module, without training it."""
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(path)
    return path
