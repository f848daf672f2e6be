"""Saving on all ranks together: one after another, and what fails on one rank fails on all."""

import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import together
from stand_in import StandIn

import mmssl
from mmssl.pretrained.whole import CheckpointError, read_checkpoint
from mmssl.training import sharded
from mmssl.training.reshard import load_sharded
from mmssl.training.saving import AtomicCheckpointIO, Saver
from mmssl.training.sharded import write_sharded


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


def test_a_value_that_cannot_be_written_is_named_on_all_ranks(tmp_path: Path):
    """A closure or a lock in the states of callbacks, which rank 0 alone writes: an error of another kind each."""
    values = {"closure": (lambda n: lambda: n)(1), "lock": threading.Lock()}

    def save(rank: int) -> None:
        for name, value in values.items():
            content = {"state_dict": {"w": torch.zeros(3)}, "callbacks": {"Mine": {name: value}}}
            with pytest.raises(
                CheckpointError, match=f"neither a tensor nor plain Python .*{name_of[name]}.*callbacks"
            ):
                write_sharded(content, tmp_path / "run" / "a.ckpt")
            dist.barrier()
            assert os.listdir(tmp_path / "run") == []

    name_of = {"closure": "local object", "lock": "lock"}
    together(2, tmp_path / "meet", save)
    for name, value in values.items():
        with pytest.raises(CheckpointError, match=f"neither a tensor nor plain Python .*{name_of[name]}"):
            AtomicCheckpointIO().save_checkpoint({"callbacks": value}, tmp_path / "run" / "a.ckpt")
    assert os.listdir(tmp_path / "run") == []


def test_what_one_rank_alone_stumbles_over_all_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Errors that nobody foresaw: while a state is taken apart, written, copied, and while it is loaded."""

    def fails(*_: object) -> None:
        raise KeyError("nobody thought of this")

    def run(rank: int) -> None:
        message = "KeyError: 'nobody thought of this'"
        content = {"state_dict": {"w": torch.zeros(3)}}
        net = torch.nn.Linear(2, 2)
        path = tmp_path / "b.ckpt"
        write_sharded({"state_dict": net.state_dict()}, path)
        for where in ("split", "_finish_part"):
            with monkeypatch.context() as patch:
                if rank == 1:
                    patch.setattr(sharded, where, fails)
                with pytest.raises(CheckpointError, match=rf"rank 1: cannot save .*a\.ckpt: {message}"):
                    write_sharded(content, tmp_path / "a.ckpt")
        with monkeypatch.context() as patch:
            if rank == 1:
                patch.setattr(net, "state_dict", fails)
            with pytest.raises(CheckpointError, match=rf"rank 1: cannot load .*b\.ckpt: {message}"):
                load_sharded(path, net, [])
        saver = Saver(StandIn(rank, 2, words=8))
        if rank == 1:
            monkeypatch.setattr(saver, "_copy", fails)
        with pytest.raises(CheckpointError, match=rf"rank 1: cannot save .*c\.ckpt: {message}"):
            saver.save(tmp_path / "c.ckpt", background=True)
        dist.barrier()

    together(2, tmp_path / "meet", run)
    assert {path.name for path in tmp_path.iterdir()} == {"meet", "b.ckpt"}
