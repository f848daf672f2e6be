"""Signals, in a real process: a whole checkpoint at an optimizer step, and a run that goes on from it."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mmssl.cli import main
from mmssl.training.checkpoint import Checkpoints, damage_of, latest_checkpoint
from mmssl.training.preemption import Preempted, Preemption

SLOW = ["--model.step_seconds=0.05", "--trainer.max_steps=2000", "--trainer.val_check_interval=100000"]


@contextmanager
def running(folder: Path, *more: str) -> Iterator[subprocess.Popen]:
    """A fit in a process group of its own, as a terminal makes one, after its first steps."""
    command = [sys.executable, "-m", "mmssl", "fit", "--config", "toy.yaml", "--run", "runs/a", *SLOW, *more]
    with open(folder / "out.txt", "w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while "train/loss" not in read(folder / "runs/a/metrics.csv"):
                assert process.poll() is None, read(folder / "out.txt")
                assert time.monotonic() < deadline, read(folder / "out.txt")
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_ctrl_c_saves_and_resume_goes_on(toy_folder: Path, capsys):
    """With loader workers, which get the signal too, and with accumulation: never inside a step."""
    with running(toy_folder, "--data.workers=1", "--trainer.accumulate_grad_batches=2") as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    said = read(toy_folder / "out.txt")
    assert "SIGINT: saving after this step" in said
    assert "to go on: mmssl fit --run runs/a --resume" in said
    assert "Traceback" not in said

    path = latest_checkpoint(toy_folder / "runs/a")
    saved = torch.load(path, weights_only=True)
    step = saved["global_step"]
    assert path.name == f"step={step:08d}.ckpt"
    assert saved["ToyData"]["batches"] == 2 * step
    assert saved["state_dict"]["seen"].sum() == 2 * step

    end = step + 3
    more = ["--resume", "--trainer.accumulate_grad_batches=2", f"--trainer.max_steps={end}"]
    assert main(["fit", "--run", "runs/a", "--config", "toy.yaml", *more]) == 0
    assert f"from step {step} to step {end}" in capsys.readouterr().out
    seen = torch.load(latest_checkpoint(toy_folder / "runs/a"), weights_only=True)["state_dict"]["seen"]
    assert seen[: 2 * end].tolist() == [1] * (2 * end)  # every batch once, none twice


def test_second_ctrl_c_stops_at_once(toy_folder: Path):
    with running(toy_folder, "--model.step_seconds=2", "--trainer.log_every_n_steps=1") as process:
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert "nothing saved" in read(toy_folder / "out.txt")
    assert not list((toy_folder / "runs/a").glob("checkpoints/*.ckpt"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_cluster_s_signals_exit_with_75(toy_folder: Path, monkeypatch, signum: signal.Signals):
    """In this process, so as not to start another: the signal comes in the middle of the third step."""
    import toy

    step = toy.ToyModule.training_step

    def step_with_signal(self: toy.ToyModule, batch: object, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            os.kill(os.getpid(), signum)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(toy.ToyModule, "training_step", step_with_signal)
    came: list[int] = []
    signal.signal(signum, lambda number, frame: came.append(number))
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a"]) == 75
    assert came == []
    os.kill(os.getpid(), signum)  # after the run, the handler that was there before is in force again
    assert came == [signum]
    signal.signal(signum, signal.SIG_DFL)
    [path] = (toy_folder / "runs/a/checkpoints").glob("*.ckpt")
    assert path.name == "step=00000003.ckpt"
    assert damage_of(path) is None


def test_the_row_of_the_last_step_is_kept_and_its_validation_comes_first(toy_folder: Path, monkeypatch, capsys):
    """A signal in step 10, after which both are due: a long validation would take the time that there is to leave."""
    import toy

    step = toy.ToyModule.training_step

    def step_with_signal(self: toy.ToyModule, batch: object, batch_idx: int) -> torch.Tensor:
        if batch_idx == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(toy.ToyModule, "training_step", step_with_signal)
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a"]) == 75
    assert latest_checkpoint(toy_folder / "runs/a").name == "step=00000010.ckpt"
    cut = rows(toy_folder / "runs/a/metrics.csv")
    assert list(cut) == [5, 10]
    assert cut[10]["train/loss"]
    assert "val/loss" not in cut[10]

    monkeypatch.setattr(toy.ToyModule, "training_step", step)
    assert main(["fit", "--run", "runs/a", "--resume"]) == 0
    assert "the validation of step 10, before which the run was stopped, comes first" in capsys.readouterr().out
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/b"]) == 0
    whole, both = rows(toy_folder / "runs/b/metrics.csv"), rows(toy_folder / "runs/a/metrics.csv")
    assert list(whole) == list(both) == [5, 10, 15, 20]
    for number, row in whole.items():
        for name in ("train/loss", "val/loss"):
            assert both[number][name] == row[name], (number, name)


def rows(path: Path) -> dict[int, dict[str, str]]:
    with path.open(newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def test_a_signal_in_the_last_step_does_not_spoil_a_finished_run(toy_folder: Path, monkeypatch):
    import toy

    step = toy.ToyModule.training_step

    def step_with_signal(self: toy.ToyModule, batch: object, batch_idx: int) -> torch.Tensor:
        if batch_idx == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(toy.ToyModule, "training_step", step_with_signal)
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a"]) == 0


def test_the_exit_code_travels_with_the_exception():
    assert Preempted(signal.SIGINT, 1, Path("x")).code == 130
    assert Preempted(signal.SIGUSR2, 1, Path("x")).code == 75
    with pytest.raises(ValueError, match="agree_every_n_steps is 0"):
        Preemption(Checkpoints(), agree_every_n_steps=0)
