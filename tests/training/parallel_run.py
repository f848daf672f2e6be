"""Trains a list of tiny cases and saves what they came to; test_strategies.py runs it on two ranks, and itself on one.

python parallel_run.py CASES.json OUT

One list for several cases, because starting two processes takes longer than training in them.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from pairs import TINY
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

import mmssl
from mmssl.training.callbacks.throughput import Throughput
from mmssl.training.checkpoint import AtomicCheckpointIO, Checkpoints
from mmssl.training.strategies import whole

SMALL = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}


class Notes(Callback):
    """Keeps of every step what it logged, its gradients before clipping, and how uneven the ranks' counts were."""

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self.steps: list[dict[str, float]] = []
        self.grads: list[dict[str, Tensor | None]] = []
        self.counts: list[dict[str, int]] = []
        self.keys: list[list[str]] = []
        self.tokens: list[float] = []  # of a sample
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.counts.append(batch.counts)
        self.keys.append(batch.keys)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.gradients:
            grads = {name: p.grad for name, p in pl_module.named_parameters()}
            self.grads.append({name: None if g is None else whole(g).clone() for name, g in grads.items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            logged = {key: float(value) for key, value in trainer.logged_metrics.items()}
            self.steps.append({key: value for key, value in logged.items() if key.startswith("train/")})
            if "speed/text_tokens_per_second" in logged:
                tokens = logged["speed/text_tokens_per_second"] / logged["speed/samples_per_second"]
                self.tokens.append(tokens)


def build(case: dict[str, Any], seed: int) -> LightningModule:
    """The case's model: an objective's name, arguments, and ``sgd`` or AdamW."""
    seed_everything(seed, verbose=False)
    name, more = case["model"], dict(case.get("arguments", {}))
    arguments: dict[str, Any] = {"lr": 1e-2, "clip_grad_norm": None}
    if name in ("ImageClassifier", "DualEncoder"):
        arguments |= {"backbone_name": "vit_tiny_patch16_224", "backbone_options": TINY}
        arguments |= {"num_classes": 4} if name == "ImageClassifier" else {"tokenizer": case["tokenizer"]}
    else:
        arguments |= {"backbone": "vit_tiny_patch16_224"}
        if name in ("MLM", "MMM"):
            arguments |= {"tokenizer": case["tokenizer"], "max_tokens": 32, "pad_to_multiple_of": 1}
        if name in ("MAE", "MMM"):
            arguments |= SMALL
        arguments["backbone_options"] = {**TINY, **more.pop("options", {})}
    module = getattr(mmssl, name)(**arguments | more)
    if case.get("sgd", True):
        # SGD shows a wrong scale of the gradient, which AdamW would divide out.
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    return module


def strategy_of(case: dict[str, Any]) -> Any:
    kind, options = case.get("strategy", "one"), case.get("strategy_options", {})
    if kind == "one":
        return "auto"
    return mmssl.FSDP(**{"checkpoint": "full", **options}) if kind == "fsdp" else DDPStrategy(**options)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train one case; what rank 0 found, with the other ranks' counts and keys."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    module = build(case, seed=rank if case.get("unlike") else 0)
    data = mmssl.DataModule(
        case["train"], case["val"], batch_size=case["batch"], lanes=2, num_workers=0, val_samples=10, val_batch_size=4
    )
    notes = Notes(case.get("gradients", True))
    callbacks: list[Callback] = [Throughput(), notes, *([mmssl.SampleLedger()] if case.get("ledger") else [])]
    if "save_every" in case:
        callbacks.append(Checkpoints(every_n_steps=case["save_every"], keep=10))
    strategy = strategy_of(case)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        max_steps=case.get("steps", 3),
        accumulate_grad_batches=case.get("accumulate", 1),
        precision=case.get("precision", "32-true"),
        log_every_n_steps=1,
        num_sanity_val_steps=1,
        val_check_interval=case.get("steps", 3) * case.get("accumulate", 1),
        check_val_every_n_epoch=None,
        logger=False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing="save_every" in case,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=case["folder"],
    )
    reduced = _count_reductions()
    trainer.fit(module, data, ckpt_path=case.get("resume"), weights_only=True)
    found: dict[str, Any] = {
        "steps": notes.steps,
        "grads": notes.grads,
        "tokens": notes.tokens,
        "weights": {name: whole(value).clone() for name, value in module.state_dict().items()},
        "val": {key: float(value) for key, value in trainer.logged_metrics.items() if key.startswith("val/")},
        "bytes": _bytes(module, trainer.optimizers[0]),
        "reductions": reduced(),
        "groups": sum(isinstance(part, FSDPModule) for part in module.modules()),
        "mesh": list(strategy.device_mesh.shape) if isinstance(strategy, mmssl.FSDP) else None,
        "sent_buffers": len(getattr(trainer.model, "modules_buffers", [])),
    }
    mine = {"counts": notes.counts, "keys": notes.keys}
    found["ranks"] = [mine]
    if trainer.world_size > 1:
        found["ranks"] = [None, None]
        torch.distributed.all_gather_object(found["ranks"], mine)
    return found


def _bytes(module: nn.Module, optimizer: Any) -> int:
    """What this rank holds of parameters and optimizer state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in [*module.parameters(), *states]]
    return sum(part.numel() * part.element_size() for part in parts)


def _count_reductions() -> Any:
    """Counts FSDP2's reduce-scatters from here on; the returned function ends it and gives their number."""
    real, calls = _fsdp_param_group.foreach_reduce, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    _fsdp_param_group.foreach_reduce = counted

    def stop() -> int:
        _fsdp_param_group.foreach_reduce = real
        return len(calls)

    return stop


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    found = {name: run(case) for name, case in cases.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[2])
