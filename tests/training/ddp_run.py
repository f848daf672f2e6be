"""Trains a tiny objective and saves its weights; run by test_module.py in one process or in two under DDP.

python ddp_run.py OUT NAME TOKENIZER SHARDS DEVICES BATCH_SIZE ACCUMULATE
"""

import sys

import torch
from lightning import Trainer, seed_everything
from pairs import TINY

import mmssl
from mmssl.training.callbacks.throughput import Throughput


def main(out: str, name: str, tokenizer: str, shards: str, devices: int, batch_size: int, accumulate: int) -> None:
    seed_everything(0)
    arguments: dict[str, object] = {"backbone": "vit_tiny_patch16_224", "backbone_options": TINY, "lr": 1e-2}
    if name != "MAE":
        arguments |= {"tokenizer": tokenizer, "max_tokens": 32, "pad_to_multiple_of": 1}
    if name != "MLM":
        arguments |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
    # SGD shows a wrong scale of the gradient, which AdamW would divide out; clipping would hide it as well.
    module = getattr(mmssl, name)(**arguments, clip_grad_norm=None)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    data = mmssl.DataModule(shards, batch_size=batch_size, lanes=2, num_workers=0)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=3,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        logger=False,
        callbacks=[Throughput()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=out + ".run",
    )
    trainer.fit(module, data)
    if trainer.is_global_zero:
        metrics = {key: float(value) for key, value in trainer.logged_metrics.items()}
        torch.save({"weights": module.state_dict(), "metrics": metrics, "batches": data.batches}, out)


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:8]))
