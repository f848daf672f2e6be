"""Checkpoints: whole or absent, whatever happens while one is written."""

import os
import random
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmssl.finetune.base import without_source
from mmssl.pretrained import whole
from mmssl.training.checkpoint import (
    AtomicCheckpointIO,
    CheckpointError,
    damage_of,
    latest_checkpoint,
    restore_rng_state,
    rng_state,
)


def content(step: int) -> dict:
    return {"global_step": step, "state_dict": {"w": torch.full((100_000,), float(step))}}


def save(folder: Path, step: int) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(step), path)
    return path


def test_round_trip(tmp_path: Path):
    path = save(tmp_path / "new" / "folder", 3)
    assert damage_of(path) is None
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], content(3)["state_dict"]["w"])
    assert os.listdir(path.parent) == [path.name]


def test_what_is_loaded_is_shared_by_the_ranks_of_a_machine(tmp_path: Path):
    """Mapped from the file; what is changed in it stays out of the file, which may go meanwhile."""
    path = save(tmp_path, 3)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    loaded["state_dict"]["w"][0] = 7.0
    assert damage_of(path) is None
    path.unlink()
    assert loaded["state_dict"]["w"].unique().tolist() == [3.0, 7.0]


def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path: Path):
    save(tmp_path, 0)
    rng = random.Random(0)
    interrupted = 0
    for trial in range(25):
        child = os.fork()
        if child == 0:  # save without end; never return into pytest
            try:
                step = 1 + trial * 1000
                while True:
                    save(tmp_path, step)
                    (tmp_path / f"step={step - 1:08d}.ckpt").unlink(missing_ok=True)
                    step += 1
            finally:
                os._exit(1)
        time.sleep(0.02 + 0.05 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += any(p.name.endswith(".tmp") for p in tmp_path.iterdir())
        # The newest by name is whole: there is nothing to fall back over.
        newest = max(tmp_path.glob("*.ckpt"))
        assert latest_checkpoint(tmp_path, say=lambda line: pytest.fail(line)) == newest
        loaded = AtomicCheckpointIO().load_checkpoint(newest)
        assert loaded["state_dict"]["w"].unique().tolist() == [loaded["global_step"]]
    assert interrupted > 0, "no kill came during a save; the test shows nothing"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damage_is_found_and_passed_over(tmp_path: Path, damage: str):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    data = bytearray(bad.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "empty":
        data = bytearray()
    else:
        data = bytearray(b"not a checkpoint at all")
    bad.write_bytes(data)
    said: list[str] = []
    assert latest_checkpoint(tmp_path, say=said.append) == good
    assert len(said) == 1
    assert str(bad) in said[0]
    with pytest.raises(CheckpointError, match="cannot load"):
        AtomicCheckpointIO().load_checkpoint(bad)


def test_damaged_ones_are_set_aside_when_asked(tmp_path: Path):
    save(tmp_path, 10)
    bad = save(tmp_path, 20)
    bad.write_bytes(b"")
    latest_checkpoint(tmp_path, say=lambda line: None, set_aside=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=00000010.ckpt", "step=00000020.ckpt.damaged"]


def test_no_whole_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        latest_checkpoint(tmp_path)
    save(tmp_path, 1).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        latest_checkpoint(tmp_path, say=lambda line: None)
    with pytest.raises(CheckpointError, match="No such file"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nope.ckpt")


def test_newest_is_by_step_also_under_other_names(tmp_path: Path):
    save(tmp_path, 900)
    AtomicCheckpointIO().save_checkpoint(content(1000), tmp_path / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(50), tmp_path / "epoch=0-step=50.ckpt")
    assert latest_checkpoint(tmp_path).name == "last.ckpt"


def test_only_the_one_that_is_taken_is_read_to_its_end(tmp_path: Path, monkeypatch):
    """Its tensors, that is: of best.ckpt the step alone is wanted, and other ranks leave all of that to rank 0."""
    newest, best = save(tmp_path, 20), tmp_path / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(10), best)
    read: list[str | None] = []
    real = zipfile.ZipFile.testzip

    def testzip(archive: zipfile.ZipFile) -> str | None:
        read.append(archive.filename)
        return real(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", testzip)
    assert latest_checkpoint(tmp_path, thorough=False) == newest
    assert whole.step_of(best) == 10
    assert without_source(str(best)) == {}
    assert read == []
    assert latest_checkpoint(tmp_path) == newest
    assert read == [str(newest)]


def test_what_stands_beside_the_tensors_is_checked_before_it_is_read(tmp_path: Path):
    best = tmp_path / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(10), best)
    best.write_bytes(best.read_bytes().replace(b"global_step", b"global_stop"))
    assert "damaged" in damage_of(best, thorough=False)
    assert whole.step_of(best) == -1


def test_a_checkpoint_that_another_rank_sets_aside_meanwhile(tmp_path: Path, monkeypatch):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    steps = whole.step_of

    def step_of(path: Path) -> int:
        bad.unlink(missing_ok=True)  # the other rank's rename, between the listing and the choice
        return steps(path)

    monkeypatch.setattr(whole, "step_of", step_of)
    assert latest_checkpoint(tmp_path, say=lambda line: None) == good


def test_full_disk_leaves_the_earlier_one(tmp_path: Path):
    """A file size limit in a child process stands for the full disk: both make a write fail half-way."""
    import resource

    path = save(tmp_path, 1)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            AtomicCheckpointIO().save_checkpoint(content(2), path)
        except CheckpointError as error:
            code = 0 if "cannot save" in str(error) and "\n" not in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save .*; earlier checkpoints are untouched"):
        save(blocked, 1)

    path = save(tmp_path, 1)
    before = path.read_bytes()

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, 1)
    assert path.read_bytes() == before


def test_content_that_could_not_be_loaded_is_refused_when_saved(tmp_path: Path):
    path = tmp_path / "step=1.ckpt"
    with pytest.raises(CheckpointError, match="neither a tensor nor plain Python"):
        AtomicCheckpointIO().save_checkpoint({"hyper_parameters": {"folder": Path("x")}}, path)
    assert list(tmp_path.iterdir()) == []


def test_rng_state_survives_a_checkpoint(tmp_path: Path):
    path = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"rng": rng_state()}, path)
    random.gauss(0, 1)
    expected = (random.random(), np.random.rand(), torch.rand(3))
    restore_rng_state(AtomicCheckpointIO().load_checkpoint(path)["rng"])
    random.gauss(0, 1)
    assert random.random() == expected[0]
    assert np.random.rand() == expected[1]
    assert torch.equal(torch.rand(3), expected[2])
