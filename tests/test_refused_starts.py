"""A start that is refused says why in one line of ours, once for all ranks, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from pairs import TINY
from ranks import fit, tiny_config
from runs import SMALL

from mmssl.cli import main
from mmssl.data.processors import processors
from mmssl.training.callbacks.health import Health
from mmssl.training.checkpoint import Checkpoints
from mmssl.training.preemption import Preemption


def refusal(capsys: pytest.CaptureFixture[str], *options: str, config: str = "toy.yaml") -> str:
    """What ``mmssl fit`` says when it refuses: one line, and not in Lightning's words."""
    capsys.readouterr()
    assert main(["fit", "--config", config, "--run", "runs/deep/a", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("mmssl: error: ")
    assert "\n" not in said
    assert "MisconfigurationException" not in said, said
    return said.removeprefix("mmssl: error: ")


@pytest.fixture
def real_config(toy_folder: Path, pair_shards: str) -> str:
    """A run of one of mmssl's own classes, whose schedule can be refused."""
    model = {"backbone": "vit_tiny_patch16_224", "backbone_options": TINY, "warmup_steps": 30, **SMALL}
    config = {
        "model": {"class_path": "mmssl.MAE", "init_args": model},
        "data": {"train": pair_shards, "batch_size": 8, "num_workers": 0},
        "trainer": {"max_steps": 20, "accelerator": "cpu"},
    }
    (toy_folder / "real.yaml").write_text(yaml.safe_dump(config))
    return "real.yaml"


# ---- nothing is left


def test_a_refused_start_leaves_no_folder(toy_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert "ratio is 2.0" in refusal(capsys, "--model.ratio", "2")
    assert not (toy_folder / "runs").exists()
    assert "there is no run at runs/deep/a" in refusal(capsys, "--resume")


def test_a_folder_that_was_there_stays(toy_folder: Path, capsys: pytest.CaptureFixture[str]):
    (toy_folder / "runs").mkdir()
    (toy_folder / "runs/notes.txt").touch()
    refusal(capsys, "--model.ratio", "2")
    assert [path.name for path in (toy_folder / "runs").iterdir()] == ["notes.txt"]


def test_a_warm_up_that_is_too_long_is_refused_before_w_and_b_has_a_run(
    toy_folder: Path, real_config: str, capsys: pytest.CaptureFixture[str]
):
    assert refusal(capsys, config=real_config).startswith("warmup_steps is 30 but trainer.max_steps is 20")
    assert not (toy_folder / "runs").exists()


def test_a_run_leaves_no_empty_folder_of_stacks(toy_folder: Path):
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a", "--trainer.max_steps=2"]) == 0
    assert not (toy_folder / "runs/a/stacks").exists()


# ---- what it says


def test_no_gpu(toy_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = refusal(capsys, "--trainer.accelerator=gpu")
    assert said.startswith("trainer.accelerator is gpu, but torch finds no GPU on this machine")
    assert "trainer.accelerator to cpu" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in refusal(capsys, "--trainer.accelerator=cuda", "--trainer.devices=4")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"torch {torch.__version__} is built without CUDA" in refusal(capsys, "--trainer.accelerator=cuda")


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("4", "trainer.devices is 4, but this machine has 2 GPUs; set it to 2, or to auto"),
        ("[0,5]", "trainer.devices names [0, 5], but this machine has 2 GPUs: number 0 to 1"),
        ("0,5", "trainer.devices names [0, 5]"),
    ],
)
@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_too_few_gpus(
    toy_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    devices: str,
    expected: str,
    accelerator: str,
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert expected in refusal(capsys, f"--trainer.accelerator={accelerator}", f"--trainer.devices={devices}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.devices=many"], "trainer.devices is many; give how many, 1 or more, or auto"),
        (["--trainer.devices=0"], "trainer.devices is 0; give how many"),
        (["--trainer.devices=[0,1]"], "trainer.devices is [0, 1], and there is no GPU to choose"),
        (["--trainer.accelerator=tpu"], "trainer.accelerator is tpu, and this machine has none; it has: cpu"),
        (["--trainer.accelerator=gpus"], "trainer.accelerator is 'gpus'; did you mean 'gpu'?"),
    ],
)
def test_devices_that_cannot_be(
    toy_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
):
    assert expected in refusal(capsys, *options)


# ---- what it says of a run that it starts


@pytest.mark.parametrize(("interval", "times"), [(3, 1), (2, 0)])
def test_a_validation_that_never_comes(
    toy_folder: Path,
    real_config: str,
    pair_shards: str,
    capsys: pytest.CaptureFixture[str],
    interval: int,
    times: int,
):
    steps = ["--trainer.max_steps=2", "--model.init_args.warmup_steps=0", "--trainer.logger=false"]
    options = [*steps, f"--data.val={pair_shards}", f"--trainer.val_check_interval={interval}"]
    assert main(["fit", "--config", real_config, "--run", "runs/a", *options]) == 0
    line = "mmssl: trainer.val_check_interval is 3 batches and the run has 2: it ends before its first validation"
    assert capsys.readouterr().out.count(line) == times


def test_more_workers_than_cores(toy_folder: Path, real_config: str, capsys: pytest.CaptureFixture[str]):
    """In a process of its own, where warnings are as a person sees them."""
    cores = processors()
    options = ["--trainer.max_steps=1", "--model.init_args.warmup_steps=0", "--trainer.logger=false"]
    command = ["fit", "--config", real_config, "--run", "runs/a", *options, f"--data.num_workers={cores + 1}"]
    done = subprocess.run([sys.executable, "-m", "mmssl", *command], capture_output=True, text=True, check=True)
    line = f"mmssl: data.num_workers is {cores + 1}, and each process has {cores} core"
    assert done.stdout.count(line) == 1
    assert done.stderr == ""


# ---- on two ranks


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ({"warmup_steps": 9}, {}, "warmup_steps is 9 but trainer.max_steps is 4"),
        ({}, {"lanes": 1, "batch_size": 9}, "lanes"),  # known only where the ranks have met
    ],
)
def test_two_ranks_refuse_once(
    tmp_path: Path,
    tokenizer_path: str,
    pair_shards: str,
    model: dict[str, Any],
    data: dict[str, Any],
    expected: str,
):
    config = tiny_config(tokenizer_path, pair_shards, steps=4)
    config["model"]["init_args"] |= model
    config["data"] |= {"num_workers": 0, **data}
    codes, said = fit(tmp_path / "run", config, callbacks=[], seconds=60)
    assert codes == [2, 2], said
    assert [line for line in said.splitlines() if expected in line] == [said.strip()], said


# ---- what a second Ctrl-C says


def test_the_checkpoints_of_a_python_script_are_its_trainer_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not those of the folder that one happens to stand in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step=00000007.ckpt").touch()
    preemption = Preemption(Checkpoints())
    trainer = pl.Trainer(default_root_dir=tmp_path / "mine", accelerator="cpu", logger=False, callbacks=[Health()])
    assert preemption._kept(trainer) == "interrupted, nothing saved"
