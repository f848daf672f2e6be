"""Two real ranks of which one sees an old listing of the run's folder, as a network file system may show it."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_only
from ranks import fit, tiny_config

from mmssl.cli import folder as run_folder
from mmssl.cli import launch, main, same_start
from mmssl.pretrained.whole import latest_checkpoint

RunTo = Callable[..., tuple[list[int], str]]


@pytest.fixture
def run_to(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> RunTo:
    """Start or go on with a run to a step, on two ranks; 2 steps between its checkpoints."""

    def to(step: int, *options: str) -> tuple[list[int], str]:
        config = tiny_config(tokenizer_path, pair_shards, steps=step)
        config["data"]["num_workers"] = 0
        config["checkpoint"] = {"every_n_steps": 2, "keep": 9, "asynchronous": False}
        return fit(tmp_path / "run", config, *options, callbacks=[], seconds=60)

    return to


def blind(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Let this rank see nothing of what the run has saved."""
    begun = run_folder.begun

    def seen(folder: Path) -> bool:
        return rank_zero_only.rank != rank and begun(folder)  # type: ignore[attr-defined]

    monkeypatch.setattr(launch, "begun", seen)


def backward(monkeypatch: pytest.MonkeyPatch, rank: int, step: int) -> None:
    """Let this rank see the checkpoints up to ``step`` alone."""

    def seen(folder: Path, *args: object, **kwargs: object) -> Path:
        if rank_zero_only.rank == rank:  # type: ignore[attr-defined]
            return folder / "checkpoints" / f"step={step:08d}.ckpt"
        return latest_checkpoint(folder)

    monkeypatch.setattr(launch, "latest_checkpoint", seen)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_would_begin_apart_stop_with_one_line(
    run_to: RunTo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    assert run_to(3)[0] == [0, 0]
    before = sorted((tmp_path / "run").rglob("*"))
    blind(monkeypatch, rank)
    codes, said = run_to(6, "--resume_or_start")
    assert codes == [2, 2], said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert f"rank {rank} on " in line
    assert "sees no checkpoint" in line
    assert f"rank {1 - rank} on " in line
    assert "step=00000003.ckpt; nothing was begun" in line
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_rank_that_waits_for_others_says_so(run_to: RunTo, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: Any) -> None:
        time.sleep(4 * rank_zero_only.rank)  # type: ignore[attr-defined]
        same_start.agree_first(*args)

    monkeypatch.setattr(launch, "agree_first", late)
    monkeypatch.setattr(same_start, "WAIT_SECONDS", 1.0)
    codes, said = run_to(3)
    assert codes == [0, 0], said
    (line,) = [line for line in said.splitlines() if "has waited" in line]
    assert line.startswith("mmssl: rank 0 on ")
    assert " 1 s for the other ranks of 2 to meet it" in line
    assert "LOCAL_RANK=0" in line
    assert re.search("MASTER_ADDR=127.0.0.1, MASTER_PORT=[0-9]+", line)


def test_a_rank_that_others_forgot_is_told(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An earlier run in this process leaves LOCAL_RANK behind; Lightning would wait half an hour for nobody."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_config(tokenizer_path, pair_shards, steps=3)))
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), "--run", str(tmp_path / "run"), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "LOCAL_RANK=0 is set in the environment" in line
    assert "unset LOCAL_RANK" in line


def test_a_finished_run_is_left_by_all_ranks(run_to: RunTo, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_to(4)[0] == [0, 0]
    backward(monkeypatch, 1, 2)  # where it is not finished yet
    codes, said = run_to(4, "--resume")
    assert codes == [0, 0], said
    assert said.count("is at step 4 already; it is finished") == 1


def test_rank_0_says_from_where_all_go_on(run_to: RunTo, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_to(4)[0] == [0, 0]
    backward(monkeypatch, 0, 2)
    codes, said = run_to(4, "--resume")
    assert codes == [0, 0], said
    assert "from step 2 to step 4" in said
