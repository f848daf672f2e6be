"""Saving on all ranks together: one after another, and what fails on one rank fails on all."""

from datetime import timedelta
from pathlib import Path

import torch
from forks import together
from stand_in import StandIn

import mmssl
from mmssl.pretrained.whole import read_checkpoint
from mmssl.training.saving import Saver


def test_a_save_of_other_people_s_waits_for_the_one_in_the_background(tmp_path: Path):
    """``trainer.save_checkpoint``, as Lightning's ModelCheckpoint calls it: both write on one group of ranks."""

    def save(rank: int) -> None:
        trainer = StandIn(rank, 2)
        saver = Saver(trainer)
        for step in range(1, 6):
            trainer.step = step
            trainer.weight.fill_(float(step))
            saver.save(tmp_path / f"step={step}.ckpt", background=True)
            trainer.strategy.save_checkpoint(trainer.dump_checkpoint(False), tmp_path / f"other={step}.ckpt")
            assert saver.state == (False, False)
        saver.finish()

    together(2, tmp_path / "meet", save)
    for step in range(1, 6):
        for name in ("step", "other"):
            content = read_checkpoint(tmp_path / f"{name}={step}.ckpt")
            assert content["state_dict"]["w"].unique().tolist() == [step]


def test_the_ranks_wait_for_each_other_as_long_as_the_strategy_says(tmp_path: Path):
    def wait(rank: int) -> None:
        strategy = mmssl.FSDP(timeout=timedelta(seconds=77))
        strategy.writing({}, tmp_path / "a.ckpt")
        assert strategy._group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)

    together(1, tmp_path / "meet", wait)
