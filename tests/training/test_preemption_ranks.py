"""Signals on two real ranks: one whole checkpoint, one exit code, and a run that goes on as if nothing had been."""

from pathlib import Path
from typing import Any

import pytest
from ranks import fit, tiny_config

from mmssl.training.callbacks.ledger import read_ledger
from mmssl.training.checkpoint import damage_of, latest_checkpoint, step_of

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
    codes, said = fit(
        run, config, callbacks=[LEDGER, slow, nobody_minds, at("train", "SIGUSR2+SIGUSR2", rank=1, step=2)]
    )
    assert codes == [75, 75], said
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
    assert "the validation of step 5, before which the run was stopped, comes first" in said
    assert said.count("validation loss") == 2
    assert read_ledger(run) == read_ledger(tmp_path / "whole")


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
    if rank == 1:
        assert "mmssl: rank 1 ended with exit code 1; the other ranks of this machine are ended" in said
