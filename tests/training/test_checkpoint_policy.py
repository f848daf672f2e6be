"""When checkpoints are saved, which of them stay, and what a save in the background may and may not do."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toy import ToyData, ToyModule

from mmssl.training import checkpoint as module
from mmssl.training.callbacks.best import Best
from mmssl.training.checkpoint import AtomicCheckpointIO, CheckpointError, Checkpoints, damage_of, step_of
from mmssl.training.saving import saver_of


def fit(folder: Path, *callbacks: Callback, resume: Path | None = None, **more: Any) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=list(callbacks),
        **{"max_steps": 10, "limit_val_batches": 0, **more},
    )
    trainer.fit(ToyModule(), ToyData(), ckpt_path=resume, weights_only=True)
    return trainer


def steps_in(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in (folder / "checkpoints").glob("step=*.ckpt"))


def test_the_newest_stay_and_milestones_for_good(tmp_path: Path):
    fit(tmp_path, Checkpoints(every_n_steps=2, keep=2, keep_every_n_steps=3))
    assert steps_in(tmp_path) == [3, 6, 9, 10]
    fit(tmp_path / "b", Checkpoints(every_n_steps=4, keep=3))
    assert steps_in(tmp_path / "b") == [4, 8, 10]
    fit(tmp_path / "c", Checkpoints(every_n_steps=None))
    assert steps_in(tmp_path / "c") == [10]


def test_by_the_clock(tmp_path: Path, monkeypatch):
    """A step takes a minute here: a checkpoint after four of them, counted from the last one, whatever saved it."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 60

    fit(tmp_path, Slow(), Checkpoints(every_n_steps=6, every_n_minutes=4, keep=10), max_steps=16)
    assert steps_in(tmp_path) == [4, 6, 10, 12, 16]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every_n_steps": 0}, "checkpoint.every_n_steps is 0"),
        ({"keep": 0}, "checkpoint.keep is 0"),
        ({"keep_every_n_steps": -1}, "checkpoint.keep_every_n_steps is -1"),
        ({"every_n_minutes": 0}, "checkpoint.every_n_minutes is 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Checkpoints(**arguments)


def test_the_same_is_saved_in_the_background(tmp_path: Path):
    """Of its step to the last bit, although training goes on while it is written."""
    for name, asynchronous in (("now", False), ("later", True)):
        fit(tmp_path / name, Checkpoints(every_n_steps=1, keep=20, asynchronous=asynchronous))
    for step in range(1, 11):
        path = f"checkpoints/step={step:08d}.ckpt"
        now, later = (torch.load(tmp_path / name / path, weights_only=True) for name in ("now", "later"))
        assert torch.equal(now["state_dict"]["network.0.weight"], later["state_dict"]["network.0.weight"])
        for one, other in zip(*(c["optimizer_states"][0]["state"].values() for c in (now, later)), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert now["loops"] == later["loops"]
        assert torch.equal(now["rng"][0]["torch"], later["rng"][0]["torch"])
        assert now.keys() == later.keys()


class Disk:
    """AtomicCheckpointIO's disk: it writes when it is let, and fails when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.fails = threading.Event(), False
        self.writing = 0
        real = AtomicCheckpointIO.save_checkpoint

        def save(io: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
            self.writing += 1
            assert self.writing == 1, "two are written at once"
            try:
                assert self.go.wait(20)
                if self.fails:
                    raise CheckpointError(f"cannot save {path}: No space left on device")
                real(io, checkpoint, path)
            finally:
                self.writing -= 1

        monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)


class Probe(Callback):
    """Calls a function at the end of a step."""

    def __init__(self, **at: Any) -> None:
        self.at = {int(name.removeprefix("step_")): function for name, function in at.items()}
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        self.at.get(trainer.global_step, lambda trainer: None)(trainer)


def test_training_goes_on_while_one_is_written(tmp_path: Path, monkeypatch):
    disk = Disk(monkeypatch)
    seen: list[list[int]] = []

    def look(trainer: pl.Trainer) -> None:  # three steps after the save began
        seen.append(steps_in(tmp_path))
        assert saver_of(trainer).state == (True, False)
        disk.go.set()

    fit(tmp_path, Checkpoints(every_n_steps=4, keep=5), Probe(step_7=look))
    assert seen == [[]]
    assert steps_in(tmp_path) == [4, 8, 10]  # the second waited for the first, and the end for the last


def test_a_disk_that_fails_in_the_background_ends_the_run(tmp_path: Path, monkeypatch):
    """Within a step of the failure in one process, and not only at the next save; the one before is whole."""
    disk = Disk(monkeypatch)
    disk.go.set()

    def fail(trainer: pl.Trainer) -> None:
        saver_of(trainer).wait()
        disk.fails = True

    def wait(trainer: pl.Trainer) -> None:
        saver_of(trainer).wait()

    probe = Probe(step_4=fail, step_6=wait, step_7=wait)
    with pytest.raises(CheckpointError, match="No space left on device"):
        fit(tmp_path, Checkpoints(every_n_steps=3, keep=5), probe, max_steps=100)
    assert probe.steps[-1] in (6, 7)
    assert steps_in(tmp_path) == [3]


def test_preemption_waits_for_the_disk(tmp_path: Path, monkeypatch):
    """save(trainer), as at a signal, returns when it is written, also what a save in the background began."""
    disk = Disk(monkeypatch)
    checkpoints = Checkpoints(every_n_steps=4, keep=5)
    found: list[list[int]] = []

    def signal(trainer: pl.Trainer) -> None:
        threading.Timer(0.2, disk.go.set).start()
        checkpoints.save(trainer)
        found.append(steps_in(tmp_path))
        checkpoints.save(trainer)

    class After(Probe):
        """Behind Checkpoints, which Lightning puts last."""

        def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4 and not found:
                signal(trainer)

    fit(tmp_path, checkpoints, After())
    assert found == [[4]]


class First(Callback):
    """Saves before the first step, as a signal during the validation that a resumed run still owes does."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.saved: list[tuple[Path, str | None, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.saved:
            path = self.checkpoints.save(trainer)
            self.saved.append((path, damage_of(path), path.stat().st_mtime_ns if path.exists() else 0))


def test_a_run_that_begins_with_another_s_checkpoint_saves_its_own(tmp_path: Path):
    fit(tmp_path / "one", Checkpoints())
    other = tmp_path / "one" / "checkpoints" / "step=00000010.ckpt"
    for run, path in (("one", other), ("two", tmp_path / "two" / "checkpoints" / "step=00000010.ckpt")):
        before, checkpoints = other.stat().st_mtime_ns, Checkpoints()
        first = First(checkpoints)
        fit(tmp_path / run, first, checkpoints, resume=other, max_steps=12)
        ((saved, damage, written),) = first.saved
        assert (saved, damage) == (path, None)
        assert (written == before) == (run == "one")  # there it is on the disk already


def test_checkpoints_that_no_trainer_knows_save_into_the_trainer_s_folder(tmp_path: Path, monkeypatch):
    """As when a callback alone holds it: not into the folder that one stands in, of which some would be removed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for step in (1, 2, 3):
        Path(f"step={step:08d}.ckpt").touch()
    first = First(Checkpoints(keep=1))
    fit(tmp_path / "run", first)
    assert first.saved[0][0] == tmp_path / "run" / "checkpoints" / "step=00000000.ckpt"
    assert sorted(os.listdir()) == [f"step={step:08d}.ckpt" for step in (1, 2, 3)]


def test_what_a_kill_left_is_cleaned_at_the_start(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    (folder / ".step=00000005.ckpt.node1.77.tmp").mkdir(parents=True)
    (folder / ".step=00000005.ckpt.node1.77.tmp" / "__0_0.distcp").write_text("half")
    (folder / ".step=00000004.ckpt.76.tmp").write_text("half")
    fit(tmp_path, Checkpoints())
    assert os.listdir(folder) == ["step=00000010.ckpt"]


class Scored(ToyModule):
    """Its validation gives what ``scores`` says, by step."""

    scores: ClassVar[dict[int, float]] = {2: 0.5, 4: 0.7, 6: 0.6, 8: float("nan"), 10: 0.8, 12: 0.75}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", self.scores[self.trainer.global_step], batch_size=1)


def fit_scored(folder: Path, best: Best, max_steps: int, resume: Path | None = None) -> None:
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[best, Checkpoints(every_n_steps=2, keep=9)],
        max_steps=max_steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    trainer.fit(Scored(), ToyData(), ckpt_path=resume, weights_only=True)


def best_of(folder: Path) -> int:
    path = folder / "checkpoints" / "best.ckpt"
    assert damage_of(path) is None
    return step_of(path)


def test_the_best_stays_also_over_a_resume(tmp_path: Path):
    fit_scored(tmp_path, Best(), 8)
    assert best_of(tmp_path) == 4
    again = Best()
    fit_scored(tmp_path, again, 12, tmp_path / "checkpoints" / "step=00000008.ckpt")
    assert best_of(tmp_path) == 10
    assert again.score == pytest.approx(0.8)
    fit_scored(tmp_path / "worst", Best(mode="min"), 8)
    assert best_of(tmp_path / "worst") == 2


def test_a_metric_that_no_validation_gives(tmp_path: Path):
    with pytest.raises(CheckpointError, match="monitor of Best is val/other, which no validation gave"):
        fit_scored(tmp_path, Best("val/other"), 4)
