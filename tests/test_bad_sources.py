"""What a person gives by mistake for a run, a checkpoint, an export or a picture: one line says what it is."""

import fractions
import inspect
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ends, fork
from full_disk import full_disk

import mmssl
from mmssl.cli import main
from mmssl.export import write_export
from mmssl.pretrained.model import Pretrained
from mmssl.pretrained.whole import CheckpointError

ADVICE = ("weights_only", "trust", "\\x1b", "zip file", "miniz")  # torch's words, which help nobody here


def refusal(call: Any) -> str:
    """The one line of an error that a person can correct."""
    with pytest.raises((ValueError, CheckpointError)) as raised:
        call()
    said = str(raised.value)
    assert "\n" not in said
    assert not [word for word in ADVICE if word in said], said
    return said


@pytest.fixture
def files(tmp_path: Path, image_run: Path) -> dict[str, Path]:
    """Files that are no whole checkpoints."""
    (whole,) = image_run.glob("checkpoints/*.ckpt")
    content = whole.read_bytes()
    made = {name: tmp_path / f"{name}.ckpt" for name in ("text", "cut", "code")}
    made["text"].write_text("# A page of words\n")
    made["cut"].write_bytes(content[: len(content) // 2])
    torch.save({"state_dict": {}, "half": fractions.Fraction(1, 2)}, made["code"])
    return made


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "no checkpoint, or its beginning is damaged"),
        ("cut", "damaged or cut short"),
        ("code", "it holds a fractions.Fraction, which only code could read, and no file's code is run"),
    ],
)
def test_a_file_that_is_no_checkpoint(files: dict[str, Path], name: str, said: str):
    line = refusal(lambda: mmssl.load_backbone(files[name]))
    assert said in line
    assert str(files[name]) in line


@pytest.mark.parametrize(
    ("name", "said"), [("text", "no file of torch"), ("cut", "damaged or cut short"), ("code", "fractions.Fraction")]
)
def test_a_file_that_is_no_beginning(files: dict[str, Path], name: str, said: str):
    line = refusal(lambda: mmssl.MAE(backbone="vit_tiny_patch16_224", init_from=str(files[name])))
    assert said in line
    assert str(files[name]) in line


def test_an_export_without_its_weights(image_run: Path, tmp_path: Path):
    assert main(["export", str(image_run), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "out/model.safetensors").unlink()
    assert "model.safetensors: there is no such file" in refusal(lambda: mmssl.load_backbone(tmp_path / "out"))


@pytest.mark.parametrize("limit", [100, 100_000])  # in the first file, or in one behind it
def test_an_export_on_a_full_disk(joint_run: Path, tmp_path: Path, limit: int):
    """A real one, for safetensors reports it in its own way."""
    with full_disk(limit):
        line = refusal(lambda: write_export(joint_run, tmp_path / "out"))
    assert f"cannot write {tmp_path / 'out'}: " in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["mmssl.export.save_file", "mmssl.export._card", "os.fsync", "pathlib.Path.rename"])
def test_a_killed_export_leaves_nothing_by_its_name(
    joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    def export() -> None:
        monkeypatch.setattr(moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write_export(joint_run, tmp_path / "out")

    (status,) = ends([fork(export)], 60)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    write_export(joint_run, tmp_path / "out")  # what was left is in nobody's way
    mmssl.load_backbone(tmp_path / "out")


def test_arguments_that_cannot_be(image_run: Path, joint_run: Path):
    assert "the source is empty" in refusal(lambda: mmssl.load_backbone(""))
    assert "img_size is 0" in refusal(lambda: mmssl.load_backbone(image_run, img_size=0))
    backbone = mmssl.load_backbone(joint_run)
    text = inspect.unwrap(Pretrained.text)  # the tests' type checker would refuse it first
    assert "text 1 is a int; give strings" in refusal(lambda: text(backbone, ["a", 3]))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("export {run} --out {tmp}/file/out", "cannot write {tmp}/file/out: "),
        ("export {run} --out {tmp}/out --weights best", "expected one of online, ema, got 'best'"),
        ("predict --run {run} --data.val null", "data.val is not set, but mmssl predict runs on it"),
        ("predict --run {run} --ckpt_path best", "best.ckpt; mmssl.training.callbacks.best.Best keeps it"),
        ("predict --run {begun}", "there is no checkpoint in {begun}"),
    ],
)
def test_commands(image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, said: str):
    (tmp_path / "file").touch()
    (tmp_path / "begun").mkdir()
    shutil.copy(image_run / "config.yaml", tmp_path / "begun")
    names = {"run": image_run, "tmp": tmp_path, "begun": tmp_path / "begun"}
    capsys.readouterr()
    assert main(command.format(**names).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(**names) in line
    assert "MMSSL_TRACEBACK" not in line
    assert not (tmp_path / "out").exists()
