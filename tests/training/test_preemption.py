"""Signals, in a real process: a whole checkpoint at an optimizer step, and a run that goes on from it."""

import csv
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from mmssl.cli import main
from mmssl.training.checkpoint import Checkpoints, damage_of, latest_checkpoint
from mmssl.training.preemption import Preempted, Preemption

TESTS = Path(__file__).parents[1]

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


def test_second_ctrl_c_stops_at_once(toy_folder: Path, monkeypatch, capsys):
    import toy

    def step_with_signals(self: toy.ToyModule, batch: object, batch_idx: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(toy.ToyModule, "training_step", step_with_signals)
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a"]) == 130
    assert "mmssl: interrupted, nothing saved" in capsys.readouterr().err
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
    assert "the validation of step 10, before which the checkpoint was saved, comes first" in capsys.readouterr().out
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


def whole_and_broken_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, callback: str, at: int
) -> tuple[dict, dict, str]:
    """Checkpoints of step ``at`` of a run with this callback, and of one that gets a signal as it validates at 10."""
    import toy

    callbacks = f"--trainer.callbacks={callback}"
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/b", callbacks, f"--checkpoint.every_n_steps={at}"]) == 0
    step = toy.ToyModule.validation_step

    def step_with_signal(self: toy.ToyModule, batch: object, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, batch, batch_idx)

    monkeypatch.setattr(toy.ToyModule, "validation_step", step_with_signal)
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a", callbacks]) == 75
    monkeypatch.setattr(toy.ToyModule, "validation_step", step)
    whole, cut = (
        torch.load(folder / f"runs/{run}/checkpoints/step=000000{at}.ckpt", weights_only=True) for run in "ba"
    )
    return whole, cut, callbacks


def test_a_validation_that_is_broken_off_saves_no_averaged_weights(toy_folder: Path, monkeypatch, capsys):
    average = "lightning.pytorch.callbacks.EMAWeightAveraging"
    whole, cut, callbacks = whole_and_broken_off(
        toy_folder, monkeypatch, f"{{class_path: {average}, init_args: {{decay: 0.5}}}}", at=10
    )
    assert "validation loss" not in capsys.readouterr().out.split("to step 20")[-1]
    for key in ("state_dict", "current_model_state"):
        for name, weight in whole[key].items():
            assert torch.equal(cut[key][name], weight), (key, name)
    assert not torch.equal(whole["state_dict"]["network.0.weight"], whole["current_model_state"]["network.0.weight"])

    assert main(["fit", "--run", "runs/a", "--resume", callbacks]) == 0
    assert "the validation of step 10" in capsys.readouterr().out
    ends = [torch.load(latest_checkpoint(toy_folder / f"runs/{run}"), weights_only=True) for run in "ab"]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(ends[1]["state_dict"][name], weight), name
    a, b = rows(toy_folder / "runs/a/metrics.csv"), rows(toy_folder / "runs/b/metrics.csv")
    assert {step: row["val/loss"] for step, row in a.items()} == {step: row["val/loss"] for step, row in b.items()}


def test_weights_that_cannot_be_put_back_are_not_saved(toy_folder: Path, monkeypatch, capsys):
    """The validation then ends first, and one more step is taken."""
    monkeypatch.syspath_prepend(str(TESTS))
    whole, cut, _ = whole_and_broken_off(toy_folder, monkeypatch, "disturb.Halved", at=11)
    assert (
        "a callback has other weights in place for the validation, which therefore ends first"
        in capsys.readouterr().err
    )
    for name, weight in whole["state_dict"].items():
        assert torch.equal(cut["state_dict"][name], weight), name
    assert rows(toy_folder / "runs/a/metrics.csv")[10]["val/loss"]


def test_a_second_ctrl_c_tells_what_is_saved(toy_folder: Path, monkeypatch, capsys):
    import toy

    def step_with_signals(self: toy.ToyModule, batch: object, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(toy.ToyModule, "validation_step", step_with_signals)
    at_once = ["--checkpoint.every_n_steps=5", "--checkpoint.asynchronous=false"]
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a", *at_once]) == 130
    said = capsys.readouterr().err
    assert "mmssl: interrupted after step 10; saved is step 10; to go on: mmssl fit --run runs/a --resume" in said
    assert "nothing saved" not in said


def test_a_signal_while_saving(toy_folder: Path, monkeypatch, capsys):
    """What is being written is finished; then, as ever, a step."""
    monkeypatch.syspath_prepend(str(TESTS))
    sends = "{class_path: disturb.Disturb, init_args: {at: save, what: SIGUSR2+SIGTERM, step: 5}}"
    fit = ["fit", "--config", "toy.yaml", "--run", "runs/a", f"--trainer.callbacks={sends}"]
    assert main([*fit, "--checkpoint.every_n_steps=5"]) == 75
    assert "SIGUSR2: stopped after step 6, saved" in capsys.readouterr().err
    paths = sorted((toy_folder / "runs/a/checkpoints").glob("*"))
    assert [path.name for path in paths] == ["step=00000005.ckpt", "step=00000006.ckpt"]
    assert not any(map(damage_of, paths))


@pytest.mark.parametrize("moment", ["setup", "sanity"])
def test_before_the_first_step_there_is_nothing_to_save(toy_folder: Path, monkeypatch, capsys, moment: str):
    monkeypatch.syspath_prepend(str(TESTS))
    sends = f"{{class_path: disturb.Disturb, init_args: {{at: {moment}, what: SIGTERM}}}}"
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a", f"--trainer.callbacks={sends}"]) == 75
    assert "mmssl: SIGTERM before the first step: nothing was begun" in capsys.readouterr().err
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a"]) == 0  # and nothing is in the way


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_signal_while_torch_is_imported(toy_folder: Path):
    command = [sys.executable, "-m", "mmssl", "fit", "--config", "toy.yaml", "--run", "runs/a"]
    process = subprocess.Popen(command, cwd=toy_folder, stderr=subprocess.PIPE, text=True)

    def handled() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGUSR2 - 1) & 1)

    try:
        deadline = time.monotonic() + 60
        while not handled():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR2)
        assert "SIGUSR2 before the first step: nothing was begun" in process.communicate(timeout=60)[1]
        assert process.returncode == 75
    finally:
        process.kill()
        process.wait()


def test_what_is_taken_out_of_lightning_is_still_what_does_it():
    """Else its handler with a broadcast inside, its broadcast before every batch or its observer would be back."""
    connector = inspect.getsource(_SignalConnector.register_signal_handlers)
    assert "_sigterm_notifier_fn" in connector
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(pl.Trainer._run)
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    assert "broadcast" not in inspect.getsource(_TrainingEpochLoop.run)
    launch = inspect.getsource(_SubprocessScriptLauncher.launch)
    assert "self._call_children_scripts()" in launch
    assert "_launch_process_observer(self.procs)" in launch
