"""Throughput and the progress lines."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from toy import ToyData, ToyModule, ToyStream

from mmssl.training.callbacks.progress import Lines, _clock
from mmssl.training.callbacks.throughput import Throughput


class SlowData(ToyData):
    def train_dataloader(self) -> DataLoader:
        class Slow(ToyStream):
            def __iter__(self) -> Any:
                for batch in super().__iter__():
                    time.sleep(0.02)
                    yield batch

        return DataLoader(Slow(self.batches, None), batch_size=None)


def train(tmp_path: Path, data: ToyData, callbacks: list[pl.Callback], **trainer: Any) -> pl.Trainer:
    runner = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(c, Lines) for c in callbacks),
        callbacks=callbacks,
        **{"max_steps": 10, "log_every_n_steps": 5, "limit_val_batches": 0, **trainer},
    )
    runner.fit(ToyModule(step_seconds=0.005), data)
    return runner


def test_waiting_for_data_is_told_from_work(tmp_path: Path):
    throughput = Throughput()
    runner = train(tmp_path, SlowData(), [throughput])
    speed = throughput.latest
    assert 0.015 < speed["data_wait_seconds"] < speed["step_seconds"]
    assert 0.5 < speed["data_wait_share"] < 0.95
    assert speed["samples_per_second"] == pytest.approx(2 / speed["step_seconds"])
    assert speed["text_tokens_per_second"] == pytest.approx(4 / speed["step_seconds"])  # and one of padding
    assert runner.callback_metrics["data/bad/truncated"] == 10
    assert runner.callback_metrics["speed/samples_per_second"] == pytest.approx(speed["samples_per_second"])


def test_a_step_is_an_optimizer_step(tmp_path: Path):
    throughput = Throughput()
    runner = train(tmp_path, ToyData(), [throughput], accumulate_grad_batches=3, max_steps=5)
    assert throughput.latest["samples_per_second"] == pytest.approx(3 * 2 / throughput.latest["step_seconds"])
    assert throughput.latest["step_seconds"] > 0.015
    assert runner.callback_metrics["data/bad/truncated"] == 15


def test_counters_survive_a_checkpoint(tmp_path: Path):
    runner = train(tmp_path, ToyData(), [Throughput()])
    runner.save_checkpoint(tmp_path / "c.ckpt")
    again = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        max_steps=15,
        log_every_n_steps=5,
        limit_val_batches=0,
        callbacks=[Throughput()],
    )
    again.fit(ToyModule(), ToyData(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert again.callback_metrics["data/bad/truncated"] == 15


def test_counters_are_sums_over_ranks_that_met_other_names(monkeypatch: pytest.MonkeyPatch):
    def gather(every: list[Any], mine: Any) -> None:
        every[:] = [mine, (4, Counter({"bad/decode": 2, "bad/truncated": 1}))]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer = Mock(spec=pl.Trainer, world_size=2, is_global_zero=True)
    first, checkpoint = Throughput(), {}
    first._totals.update({"bad/truncated": 3})
    first.on_save_checkpoint(trainer, Mock(spec=pl.LightningModule), checkpoint)
    assert checkpoint["notes"] == {"bad/truncated": 4, "bad/decode": 2}
    for zero in (True, False):  # counted once after a resumption, not once a rank
        trainer.is_global_zero = zero
        first.on_load_checkpoint(trainer, Mock(spec=pl.LightningModule), checkpoint)
        assert first._totals == (checkpoint["notes"] if zero else {})


def test_lines_are_few_and_whole(tmp_path: Path):
    said: list[str] = []
    train(tmp_path, SlowData(), [Throughput(), Lines(seconds=0.1, say=said.append)], max_steps=30)
    assert said[0].startswith("training ToyModule, 0.0 M parameters, to step 30 on 1 x cpu")
    assert said[-1].startswith("trained 30 steps in ")
    steps = said[1:-1]
    assert 2 <= len(steps) <= 12  # 30 steps of 25 ms or more, a line every 100 ms
    assert re.fullmatch(r"step \d+/30 \| loss [\d.e+-]+ \| \d+ samples/s \| data wait \d+% \| \d+s left", steps[-1]), (
        steps
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.4, "59s"), (185, "3m05s"), (7800, "2h10m")])
def test_clock(seconds: float, text: str):
    assert _clock(seconds) == text
