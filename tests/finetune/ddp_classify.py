"""Trains and validates tiny models one after the other; run by test_ranks.py in one process or on two ranks.

python ddp_classify.py OUT SHARD TOKENIZER DEVICES

One list for several cases, because starting two processes takes longer than training in them.
"""

import sys
from typing import Any

import torch
from labelled import CLASSES
from lightning import LightningModule, Trainer, seed_everything
from pairs import TINY

import mmssl
from mmssl.training.strategies import whole

# (what is trained, validation samples): of 3 samples the second rank has none, of 13 the last batch is padded.
CASES = [(kind, samples) for kind in ("class", "multilabel", "regression") for samples in (3, 13)]
CASES += [("text with adapters", 13), ("retrieval", 3)]


def build(kind: str, tokenizer: str) -> LightningModule:
    seed_everything(0, verbose=False)
    common: dict[str, Any] = {
        "backbone_name": "vit_tiny_patch16_224",
        "backbone_options": {**TINY, "experts": kind == "text with adapters"},
        "clip_grad_norm": None,
    }
    words = {"tokenizer": tokenizer, "max_tokens": 16}
    if kind == "text with adapters":
        return mmssl.TextClassifier(num_classes=CLASSES, lora_rank=2, **common, **words)
    if kind == "retrieval":
        module = mmssl.DualEncoder(embed_dim=16, **common, **words)
        torch.nn.init.constant_(module.network.log_scale, 5.0)  # beyond its limit, log 100
        return module
    targets: dict[str, dict[str, Any]] = {
        "class": {"num_classes": CLASSES},
        "multilabel": {"num_classes": CLASSES, "target": "multilabel", "label_key": "colours"},
        "regression": {"num_classes": 2, "target": "regression", "label_key": "red"},
    }
    return mmssl.ImageClassifier(**targets[kind], **common)


def fit(kind: str, val_samples: int, folder: str, shard: str, tokenizer: str, devices: int) -> dict[str, Any]:
    module = build(kind, tokenizer)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # shows a wrong scale
    data = mmssl.DataModule(
        shard, shard, batch_size=8, lanes=2, val_batch_size=8, val_samples=val_samples, num_workers=0
    )
    several: Any = mmssl.FSDP(checkpoint="full") if kind == "retrieval" else "ddp"
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=several if devices > 1 else "auto",
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
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    return {
        "weights": {name: whole(value).clone() for name, value in module.state_dict().items()},
        "metrics": {key: float(value) for key, value in trainer.logged_metrics.items()},
    }


def main(out: str, shard: str, tokenizer: str, devices: int) -> None:
    found = {case: fit(*case, out + ".run", shard, tokenizer, devices) for case in CASES}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
