"""``mmssl fit --dry_run`` tries one step, tells what would be trained, and leaves no trace."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from pairs import TINY
from runs import SMALL

from mmssl.cli import main


def write_config(folder: Path, shards: str) -> Path:
    model = {"backbone": "vit_tiny_patch16_224", "backbone_options": TINY, "warmup_steps": 5, **SMALL}
    config = {
        "model": {"class_path": "mmssl.MAE", "init_args": model},
        "data": {"train": shards, "val": shards, "batch_size": 8, "num_workers": 0, "val_samples": 10},
        "trainer": {"max_steps": 20, "accumulate_grad_batches": 2, "accelerator": "cpu", "logger": None},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def files(folder: Path) -> set[str]:
    """Everything but what wandb makes in the folder for temporary files when it is imported."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "wandb-" not in path.name}


@pytest.fixture
def config(tmp_path: Path, pair_shards: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return write_config(tmp_path, pair_shards)


def test_it_says_what_would_be_trained_and_keeps_nothing(config: Path, capsys: pytest.CaptureFixture[str]):
    before = files(config.parent)
    assert main(["fit", "--config", str(config), "--run", "runs/a", "--dry_run"]) == 0
    assert files(config.parent) == before
    told = capsys.readouterr().out
    for line in (
        r"model +MAE, 0\.1 M parameters, 0\.1 M of them trained",
        r"train +64 samples in 2 shards, 5 epochs",  # 20 steps of 2 batches of 8
        r"val +10 of 64 samples",
        r"batch +8 samples, 8 on each of 1 ranks; 2 such batches, 16 samples, a step",
        r"steps +20\n",
        r"folder +runs/a, new",
        r"saves +a checkpoint every 1000 steps and at the end; the last 2 are kept",
        r"W&B +offline \(WANDB_MODE=offline\)",
        r"one step +[\d.]+ s .*, loss [\d.]+, gradient norm [\d.]+",
    ):
        assert re.search(f"\n  {line}", told), (line, told)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--data.train=nothing-*.tar"], "nothing-"),
        (["--model.warmup_steps=20"], "warmup_steps is 20 but trainer.max_steps is 20"),
        (["--data.batch_size=0"], "batch_size is 0"),
        (["--run=config.yaml/a"], "cannot write to config.yaml, where the run"),
        (["--trainer.fast_dev_run=true"], "not both"),
    ],
)
def test_mistakes_show(config: Path, capsys: pytest.CaptureFixture[str], options: list[str], error: str):
    before = files(config.parent)
    assert main(["fit", "--config", str(config), "--run", "runs/a", "--dry_run", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("mmssl: error: ")
    assert error in said
    assert "\n" not in said
    assert files(config.parent) == before


def test_what_does_not_fit_into_memory_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("mmssl.MAE.forward", full)
    assert (
        main(["fit", "--config", str(config), "--run", "runs/a", "--dry_run", "--trainer.num_sanity_val_steps=0"]) == 2
    )
    assert "does not fit into the memory of cpu: make data.batch_size smaller" in capsys.readouterr().err


def test_a_resumed_run_is_tried_from_its_checkpoint(config: Path, capsys: pytest.CaptureFixture[str]):
    run = ["fit", "--config", str(config), "--run", "runs/a"]
    assert main([*run, "--trainer.max_steps=6", "--trainer.logger=false"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    capsys.readouterr()
    assert main([*run, "--resume", "--dry_run", "--model.lr=0.1", "--trainer.logger=false"]) == 0
    told = capsys.readouterr().out
    assert "changed from step 6 on: model.init_args.lr: 0.00015 -> 0.1" in told
    assert re.search("steps +20, from 6 on", told)
    assert main([*run, "--resume", "--dry_run", "--data.batch_size=16"]) == 2
    assert "data.batch_size was 8" in capsys.readouterr().err
    assert main([*run, "--dry_run"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before
