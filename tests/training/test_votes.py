"""What rides in the reduce of the counts: on real ranks the same conclusions at the same step."""

import time
from pathlib import Path
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from forks import together

from mmssl.training import votes as votes_module
from mmssl.training.checkpoint import Checkpoints
from mmssl.training.votes import Clock, DivergenceError, Votes

CPU = torch.device("cpu")


def test_all_ranks_hear_of_one_s_signal_in_the_same_step(tmp_path: Path) -> None:
    def rank_of_two(rank: int) -> None:
        votes = Votes()
        told = (False, False)
        votes.begin(lambda: told)
        heard = []
        for step in range(4):
            if step == 2 and rank == 1:
                told = (True, False)
            sums = votes.add_up([3.0, 2.0**24 + rank], f"MLM {step}", 2, CPU)
            assert sums.tolist() == [6.0, 2.0**25]  # to a float32's digits
            heard.append(votes.read())
        assert heard == [(False, False)] * 2 + [(True, False)] * 2
        votes.begin(lambda: (False, rank == 0))
        assert votes.between(0, 2, CPU) == (False, True)

    together(2, tmp_path / "meet", rank_of_two)


def test_ranks_at_unlike_steps_raise_on_all(tmp_path: Path) -> None:
    def rank_of_three(rank: int) -> None:
        votes = Votes()
        votes.add_up([1.0], "MMM 7 pairs", 3, CPU)
        with pytest.raises(DivergenceError, match="not at the same step of the same objective"):
            votes.add_up([1.0], "MMM 8 texts" if rank == 2 else "MMM 8 pairs", 3, CPU)

    together(3, tmp_path / "meet", rank_of_three)


def test_one_rank_needs_no_sums() -> None:
    votes = Votes()
    votes.begin(lambda: (True, False))
    assert votes.add_up([5.0], "MLM 0", 1, CPU).tolist() == [5.0]
    assert votes.read() == (True, False)
    assert votes.between(3, 1, CPU) == (True, False)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are read late."""
    monkeypatch.setattr(Votes, "_reads_late", lambda self, device: True)
    monkeypatch.setattr(votes_module, "_now", Mock)


class Time:
    """A clock that stands still between two steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("rides", [True, False])
def test_a_signal_is_heard_of_within_seconds_or_a_long_step(rides: bool, tmp_path: Path) -> None:
    """With ten steps between two readings, whatever they take, a grace of half a minute is over."""

    def rank_of_two(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            clock = Time(patch)

            def steps_until_told(seconds: float, before: int) -> int:
                """How many steps the ranks train after rank 1 is told; both hear of it at the same one."""
                votes, told = Votes(), False
                votes.begin(lambda: (told, False))
                for step in range(before + 20):
                    clock.now += seconds * (1.2 if rank else 0.8)  # each has a clock of its own
                    told = step >= before and rank == 1
                    if rides:
                        votes.add_up([1.0], f"MLM {step}", 2, CPU)
                    if (votes.read() if rides else votes.meet(2, CPU))[0]:
                        return step - before
                raise AssertionError("nobody heard of it")

            for before in range(12, 24):
                assert steps_until_told(20.0, before) == 0
                assert steps_until_told(0.5, before) < 4  # two seconds
            # Short steps are read every ten of them.
            assert sorted(steps_until_told(0.01, before) for before in range(22, 32)) == list(range(10))

    together(2, tmp_path / "meet", rank_of_two)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_ranks_that_trained_apart_save_no_checkpoint(tmp_path: Path) -> None:
    def rank_of_two(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            clock, votes = Time(patch), Votes()
            votes.begin(lambda: (False, False))
            for step in range(14):
                clock.now += 0.01
                apart = rank if step == 13 else 0
                votes.add_up([1.0], f"MLM {step + apart}", 2, CPU)
                votes.read()
        trainer = Mock(pl.Trainer, global_step=14, lightning_module=Mock(votes=votes), default_root_dir=str(tmp_path))
        with pytest.raises(DivergenceError):
            Checkpoints().save(trainer)

    together(2, tmp_path / "meet", rank_of_two)


def test_times_that_nobody_reads_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def query(self) -> bool:
            return True

        def elapsed_time(self, other: "Event") -> float:
            return 500.0

    monkeypatch.setattr(Clock, "_mark", lambda self: self._marks.append(Event()))
    clock = Clock()
    for _ in range(4):
        clock.begins(torch.device("cuda"))
        clock.enters()
        clock.leaves()
    assert not clock._open
    assert clock.read() == (2.0, 2.0)
    assert clock.read() == (0.0, 0.0)
