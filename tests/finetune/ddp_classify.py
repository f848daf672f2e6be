"""Trains and validates a tiny classifier; run by test_ranks.py in one process or in two under DDP.

python ddp_classify.py OUT SHARD DEVICES VAL_SAMPLES
"""

import sys
from typing import Any

import torch
from labelled import CLASSES
from lightning import Trainer, seed_everything
from pairs import TINY

import mmssl


def main(out: str, shard: str, devices: int, val_samples: int) -> None:
    seed_everything(0)
    scratch: dict[str, Any] = {
        "backbone_name": "vit_tiny_patch16_224",
        "backbone_options": TINY,
        "clip_grad_norm": None,
    }
    module = mmssl.ImageClassifier(num_classes=CLASSES, **scratch)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # shows a wrong scale
    data = mmssl.DataModule(
        shard, shard, batch_size=8, lanes=2, val_batch_size=8, val_samples=val_samples, num_workers=0
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=3,
        log_every_n_steps=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=out + ".run",
    )
    trainer.fit(module, data)
    if trainer.is_global_zero:
        metrics = {key: float(value) for key, value in trainer.logged_metrics.items()}
        torch.save({"weights": module.state_dict(), "metrics": metrics}, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
