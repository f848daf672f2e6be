"""A run keeps the tokenizer that its weights were trained with, and goes on with no other one."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from pairs import TINY

from mmssl.cli import main


@pytest.fixture
def folder(tmp_path: Path, tokenizer_path: str, pair_shards: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run of two steps, whose tokenizer has changed since where the config names it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tokenizer_path, "words.json")
    arguments = {"tokenizer": "words.json", "backbone": "vit_tiny_patch16_224", "backbone_options": TINY}
    config = {
        "model": {"class_path": "mmssl.MLM", "init_args": {**arguments, "max_tokens": 32}},
        "data": {"train": pair_shards, "val": pair_shards, "batch_size": 4, "num_workers": 0, "val_samples": 4},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0},
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml", "--run", "run"]) == 0
    content = json.loads(Path(tokenizer_path).read_text())
    words = content["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]  # of the same size, so the weights would load
    Path("words.json").write_text(json.dumps(content))
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    said = capsys.readouterr().err
    assert said.startswith("mmssl: error: ")
    assert said.count("\n") == 1
    return said


def test_a_run_goes_on_with_its_own_tokenizer(
    folder: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Path(tokenizer_path).read_text()
    assert Path("run/tokenizer.json").read_text() == original
    config = Path("run/config.yaml").read_text()
    for command in (["validate"], ["predict"], ["fit", "--resume", "--trainer.max_steps", "3"]):
        assert main([*command, "--run", "run"]) == 0
        assert Path("run/tokenizer.json").read_text() == original
    assert Path("run/config.yaml").read_text() == config.replace("max_steps: 2", "max_steps: 3")

    # Another one is refused where it is asked for, and where the run has lost its own.
    refusal = "tokenizer words.json is not the one that the checkpoint's weights were trained with"
    assert refusal in error_of(capsys, "validate", "--run", "run", "--model.tokenizer", "words.json")
    resume = ["fit", "--run", "run", "--resume", "--trainer.max_steps", "4"]
    assert refusal in error_of(capsys, *resume, "--model.tokenizer", "words.json")
    Path("run/tokenizer.json").unlink()
    assert refusal in error_of(capsys, *resume)
    assert not Path("run/tokenizer.json").exists()
    assert not Path("run/config.2.yaml").exists()


def test_a_trial_writes_no_run(folder: Path) -> None:
    trial = ["--run", "trial", "--trainer.fast_dev_run", "true", "--model.warmup_steps", "100"]
    assert main(["fit", "--config", "c.yaml", *trial, "--trainer.accumulate_grad_batches", "2"]) == 0
    assert not Path("trial").exists()


def test_another_tokenizer_is_never_written_over(
    folder: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("new").mkdir()
    shutil.copy(tokenizer_path, "new/tokenizer.json")
    message = error_of(capsys, "fit", "--config", "c.yaml", "--run", "new")
    assert "new/tokenizer.json is another tokenizer than words.json" in message
    assert Path("new/tokenizer.json").read_text() == Path(tokenizer_path).read_text()
    assert not Path("new/config.yaml").exists()
