"""Throughput and the progress lines."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader
from toy import ToyData, ToyModule, ToyStream

from mmssl.training.callbacks.progress import Lines, _clock, job
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
    def hear_all(mine: Any) -> list[Any]:
        return [mine, Counter({"bad/decode": 2, "bad/truncated": 1})]

    monkeypatch.setattr("mmssl.training.callbacks.throughput.hear_all", hear_all)
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


def test_a_log_has_times_and_fewer_lines_than_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    assert Lines().seconds == 30
    Lines().print("a line")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d a line\n", capsys.readouterr().out)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert Lines().seconds == 5
    Lines().print("a line")
    assert capsys.readouterr().out == "a line\n"
    assert Lines(seconds=0.5).seconds == 0.5
    with pytest.raises(ValueError, match="seconds is -1"):
        Lines(seconds=-1)


def test_the_time_left_is_reckoned_without_the_first_step_and_without_what_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A first step of 500 s, as compiling makes it, then one of 2 s after another; gone on with from step 5."""
    clock = Mock(monotonic=Mock(return_value=0.0))
    monkeypatch.setattr("mmssl.training.callbacks.progress.time", clock)

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            clock.monotonic.return_value += 500 if trainer.global_step in (0, 5) else 2

    def lines(checkpoint: Path | None, last: int) -> list[str]:
        said: list[str] = []
        runner = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            max_steps=last,
            limit_val_batches=0,
            callbacks=[Clock(), Lines(seconds=0, say=said.append)],
        )
        runner.fit(ToyModule(), ToyData(), ckpt_path=checkpoint, weights_only=True)
        runner.save_checkpoint(tmp_path / "c.ckpt")
        return said

    lines(None, 5)
    said = lines(tmp_path / "c.ckpt", 15)
    assert "from step 5 to step 15" in said[0]
    assert said[1].startswith("step 6/15")
    assert "left" not in said[1]  # of the first step alone nothing can be said
    assert [line.rpartition(" | ")[2] for line in said[2:11]] == [f"{2 * left}s left" for left in range(8, -1, -1)]


def test_a_job_s_lines_say_which_start_they_are_from():
    assert job({}) == ""
    assert job({"SLURM_JOB_ID": "12"}) == ", SLURM job 12"
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert job(array) == ", SLURM job 11_3, restart 2"
