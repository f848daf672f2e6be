"""What signals, votes, health and ledger cost of a training step, on two ranks of this machine.

    python tools/bench_health.py [--steps 400] [--batch 8]

One run of MLM on made-up captions, two gloo ranks under DDP.  In turns of 10 steps all of it is there, and taken out:
the two kinds of steps are seconds apart at most, so what else the machine does falls on both alike.  Printed are the
medians of both, and of the differences of neighbouring turns; wall time, and processor time of rank 0, which a busy
machine disturbs less.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mmssl import MLM
from mmssl.data.tokenizer import train_tokenizer
from mmssl.draws import Draws
from mmssl.training.callbacks.health import Health
from mmssl.training.callbacks.ledger import SampleLedger
from mmssl.training.checkpoint import Checkpoints
from mmssl.training.guard import StepGuard
from mmssl.training.launcher import supervise
from mmssl.training.preemption import Preemption
from mmssl.training.votes import Clock, Votes, sum_over_ranks
from mmssl.types import Batch, Sample

TURN = 10
WORDS = ["a", "red", "green", "blue", "square", "upon", "wide", "table", "with", "paper", "under", "it", "there"]


class PlainVotes(Votes):
    """The sums of the counts, and no more."""

    def add_up(self, counts: list[float], subject: str, world: int, device: torch.device) -> Tensor:
        sums = torch.stack([torch.full((), value, device=device) for value in counts])
        return sum_over_ranks(sums, world)


class NoGuard(StepGuard):
    def note(self, keys: list[str]) -> None:
        return

    def check(self, optimizer: Any, norm: Tensor, step: int) -> None:
        return


class NoClock(Clock):
    def begins(self, device: torch.device) -> None:
        return


class Turns(Callback):
    """Takes what is measured in and out, and notes how long each step took."""

    def __init__(self, measured: list[Callback]) -> None:
        self.measured = measured
        self.times: dict[bool, list[list[tuple[float, float]]]] = {True: [], False: []}
        self._last = (0.0, 0.0)
        self._kinds: dict[bool, tuple[Votes, StepGuard]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kinds = {True: (pl_module.votes, pl_module.guard), False: (PlainVotes(), NoGuard())}
        self._kinds[False][0].clock = NoClock()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter(), time.process_time()
        on = batch_idx // TURN % 2 == 0
        if batch_idx % TURN > 1:  # the step in which one takes the other's place is neither
            self.times[on][-1].append((now[0] - self._last[0], now[1] - self._last[1]))
        if batch_idx % TURN == 0:
            self.times[on].append([])
            pl_module.votes, pl_module.guard = self._kinds[on]
            others = [callback for callback in trainer.callbacks if callback not in self.measured]
            trainer.callbacks = [*others, *self.measured] if on else others
        self._last = now


class Captions(IterableDataset):
    def __init__(self, module: MLM, size: int) -> None:
        prepare = module.prepare(train=True)
        examples = []
        for i in range(size):
            text = " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 12 + i % 20)).encode()
            examples.append(prepare.sample(Sample(f"{i:06d}", "memory.tar", {"txt": text}), Draws(0, i), 0))
        self.batch: Batch = prepare.collate(examples)
        self.batch.keys = [f"memory.tar/{i:06d}" for i in range(size)]

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="texts of a rank")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([" ".join(WORDS)], vocab_size=200, path=Path(folder) / "tokenizer.json")
        options = {"options": {"embed_dim": asked.width, "depth": asked.depth, "num_heads": 3}}
        module = MLM(tokenizer=str(Path(folder) / "tokenizer.json"), backbone_options=options, max_tokens=64)
        measured: list[Callback] = [Health(), SampleLedger(), Preemption(Checkpoints())]
        turns = Turns(measured)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_steps=asked.steps,
            default_root_dir=folder,
            callbacks=[turns, *measured],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=20,
        )
        supervise(trainer)
        trainer.fit(module, DataLoader(Captions(module, asked.batch), batch_size=None))
    if trainer.is_global_zero:
        report(turns.times)


def report(times: dict[bool, list[list[tuple[float, float]]]]) -> None:
    for number, kind in enumerate(("wall", "processor")):
        on, off = (
            [statistics.median(t[number] for t in turn) for turn in times[key][2:] if turn] for key in (True, False)
        )
        pairs = list(zip(on, off, strict=False))
        more = statistics.median(a - b for a, b in pairs)
        base = statistics.median(off)
        print(
            f"{kind} time of a step: with {1e3 * statistics.median(on):.2f} ms, without {1e3 * base:.2f} ms, "
            f"difference {1e6 * more:+.0f} us = {more / base:+.2%} (median of {len(pairs)} pairs of turns)"
        )


if __name__ == "__main__":
    main()
