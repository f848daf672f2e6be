"""Signals on two real ranks: one whole checkpoint, one exit code, and a run that goes on as if nothing had been."""

import csv
from pathlib import Path
from typing import Any

import pytest
from ranks import fit, tiny_config

from mmssl.training import signals
from mmssl.training.callbacks.ledger import read_ledger
from mmssl.training.checkpoint import damage_of, latest_checkpoint, step_of

TESTS = Path(__file__).parents[1]

LEDGER = ("mmssl.SampleLedger", {})


def at(moment: str, what: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    return "disturb.Disturb", {"at": moment, "what": what, **arguments}


@pytest.mark.timeout(600)
def test_preempted_again_and_again(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> None:
    """Before the first step, beside a slow rank, in a validation by two signals: each sample was seen once."""
    config = tiny_config(tokenizer_path, pair_shards, steps=12)
    config["data"] |= {"val": pair_shards, "val_samples": 32}  # two batches a rank
    config["trainer"]["val_check_interval"] = 5
    codes, said = fit(tmp_path / "whole", config, callbacks=[LEDGER], ranks=1)
    assert codes == [0], said
    run = tmp_path / "run"

    codes, said = fit(run, config, callbacks=[LEDGER, at("setup", "SIGTERM", rank=1)])
    assert codes == [75, 75], said
    assert said.count("before the first step: nothing was begun") == 1
    assert "Traceback" not in said
    assert not list(run.glob("checkpoints/*.ckpt"))

    slow = ("disturb.Slow", {"rank": 0, "seconds": 0.4})
    nobody_minds = at("train", "workers:SIGTERM+SIGUSR2", rank=0, step=1)
    told = at("train", "SIGUSR2+SIGUSR2", rank=1, step=2)
    codes, said = fit(run, config, callbacks=[LEDGER, slow, nobody_minds, told], launched=True)
    assert codes == [75], said
    assert "Traceback" not in said
    assert said.count(": stopped after step") == 1
    path = latest_checkpoint(run)
    assert step_of(path) in (3, 4)
    assert damage_of(path) is None
    assert sorted(run.glob("checkpoints/*")) == [path]

    codes, said = fit(
        run, config, "--resume", callbacks=[LEDGER, at("validation", "SIGTERM+SIGUSR2+SIGTERM", rank=1, step=5)]
    )
    assert codes == [75, 75], said
    assert "Traceback" not in said
    assert step_of(latest_checkpoint(run)) == 5
    assert "validation loss" not in said

    codes, said = fit(run, config, "--resume", callbacks=[LEDGER])
    assert codes == [0, 0], said
    assert "the validation of step 5, before which the checkpoint was saved, comes first" in said
    assert said.count("validation loss") == 2
    assert read_ledger(run) == read_ledger(tmp_path / "whole")


@pytest.mark.timeout(300)
def test_ranks_that_cannot_agree_to_leave_leave_alone(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 reads indices for an hour, say, and rank 1 waits for it in a collective, where no handler runs."""
    monkeypatch.setattr(signals, "START_SECONDS", 2.0)
    config = tiny_config(tokenizer_path, pair_shards, steps=7)
    told = [at("setup", "SIGTERM", rank=rank) for rank in (0, 1)]
    codes, said = fit(tmp_path / "run", config, callbacks=[*told, at("setup", "sleep", rank=0, seconds=10000)])
    assert codes == [75, 75], said
    assert "SIGTERM before the first step: nothing was begun" in said


def losses(run: Path) -> dict[str, list[str]]:
    """train/loss and val/loss by row."""
    with open(run / "metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return {name: [row.get(name, "") for row in found] for name in ("step", "train/loss", "val/loss")}


@pytest.mark.timeout(300)
def test_a_validation_of_a_sharded_model_is_broken_off(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> None:
    config = tiny_config(tokenizer_path, pair_shards, steps=7)
    config["data"] |= {"val": pair_shards, "val_samples": 32}
    config["trainer"]["val_check_interval"] = 4
    fsdp = ["--config", str(TESTS.parent / "configs" / "strategy" / "fsdp.yaml")]
    codes, said = fit(tmp_path / "whole", config, *fsdp, callbacks=[])
    assert codes == [0, 0], said
    codes, said = fit(tmp_path / "run", config, *fsdp, callbacks=[at("validation", "SIGUSR2", rank=1, step=4)])
    assert codes == [75, 75], said
    assert step_of(latest_checkpoint(tmp_path / "run")) == 4
    assert losses(tmp_path / "run")["val/loss"] == [""] * 4
    codes, said = fit(tmp_path / "run", config, *fsdp, "--resume", callbacks=[])
    assert codes == [0, 0], said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_ends_the_others(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, rank: int
) -> None:
    config = tiny_config(tokenizer_path, pair_shards, steps=50)
    fails = at("train", "raise", rank=rank, step=2)
    codes, said = fit(tmp_path / "run", config, callbacks=[fails], launched=True)
    assert codes == [1], said
    assert "ZeroDivisionError: a bad shard, say" in said
