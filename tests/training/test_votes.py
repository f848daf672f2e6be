"""What rides in the reduce of the counts: on real ranks the same conclusions at the same step."""

from pathlib import Path

import pytest
import torch
from forks import together

from mmssl.training.votes import DivergenceError, Votes

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
