"""Checkpoints of real ranks that fail, and that go on: one exit code, one line, the earlier checkpoint whole."""

from pathlib import Path

import pytest
import torch
from ranks import fit, tiny_config

import mmssl
from mmssl.cli import main
from mmssl.training.checkpoint import damage_of, latest_checkpoint

STRATEGIES = Path(__file__).parents[2] / "configs" / "strategy"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("strategy", "rank", "kind", "asynchronous"),
    [("ddp", 0, "full", True), ("fsdp", 1, "full", True), ("fsdp", 0, "read-only", False)],
)
def test_a_disk_that_fails_one_rank_ends_all(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, strategy: str, rank: int, kind: str, asynchronous: bool
):
    config = tiny_config(tokenizer_path, pair_shards, steps=60)
    config["checkpoint"] = {"every_n_steps": 4, "keep": 9, "asynchronous": asynchronous}
    disk = ("full_disk.FullDisk", {"rank": rank, "step": 5, "kind": kind})
    overlay = ["--config", str(STRATEGIES / f"{strategy}.yaml"), "--trainer.accelerator", "cpu"]
    codes, said = fit(tmp_path / "run", config, *overlay, callbacks=[disk])
    assert codes == [2, 2], said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1, said
    assert "cannot save" in errors[0]
    assert "earlier checkpoints are untouched" in errors[0]
    folder = tmp_path / "run" / ("before" if kind == "read-only" else "checkpoints")
    assert [path.name for path in folder.iterdir()] == ["step=00000004.ckpt"]
    path = latest_checkpoint(folder)
    assert damage_of(path) is None
    assert path.is_dir() == (strategy != "ddp")


@pytest.mark.timeout(400)
def test_what_else_reads_checkpoints_reads_sharded_ones(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, capsys: pytest.CaptureFixture[str]
):
    """validate, export, consolidate, load_backbone and resuming in one process; and the best is one as well."""
    run = tmp_path / "run"
    config = tiny_config(tokenizer_path, pair_shards, steps=4)
    config["data"] |= {"val": pair_shards, "val_samples": 16}
    config["trainer"]["val_check_interval"] = 2
    best = ("mmssl.training.callbacks.best.Best", {"monitor": "val/loss", "mode": "min"})
    overlay = ["--config", str(STRATEGIES / "fsdp.yaml"), "--trainer.accelerator", "cpu"]
    codes, said = fit(run, config, *overlay, callbacks=[best])
    assert codes == [0, 0], said
    folder = run / "checkpoints"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"best.ckpt", "step=00000004.ckpt"}
    assert damage_of(folder / "best.ckpt") is None

    one = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert main(["validate", "--run", str(run), "--ckpt_path", "best", *one]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    file = tmp_path / "one.ckpt"
    assert main(["consolidate", str(run), "--out", str(file)]) == 0
    name = "blocks.0.attn.qkv.weight"
    weights = [
        mmssl.load_backbone(source).backbone.vit.state_dict()[name] for source in (run, file, tmp_path / "export")
    ]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    capsys.readouterr()
    assert main(["fit", "--run", str(run), "--resume", "--trainer.max_steps", "6", *one]) == 0
    assert "from step 4 to step 6" in capsys.readouterr().out
    assert latest_checkpoint(run).is_file()
