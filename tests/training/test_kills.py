"""Kills with SIGKILL while checkpoints are written: the newest whole one always loads, and no rank is left waiting."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import ends, fork, start
from stand_in import StandIn

from mmssl.pretrained.whole import latest_checkpoint, read_checkpoint, step_of
from mmssl.training.in_place import remove
from mmssl.training.saving import Saver

KILLS = 30
MEASURED = 5  # every so many kills


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """$TMPDIR on another file system, from which a rename would be a copy; nothing may pass through it."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no second file system at /dev/shm")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    left = os.listdir(folder)
    shutil.rmtree(folder)
    assert left == []


def saves(folder: Path, first: int, background: bool, name: str, rank: int = 0, world: int = 1) -> None:
    """Save without end, one step after another; a background save is overtaken by the next steps of training."""
    trainer = StandIn(rank, world)
    saver = Saver(trainer)
    for step in range(first + 1, first + 1000):
        trainer.step = step
        trainer.weight.fill_(float(step))
        older = folder / f"step={step - 1:08d}.ckpt"
        saver.save(folder / (name or f"step={step:08d}.ckpt"), background, after=lambda old=older: remove(old))
        trainer.weight.fill_(-1.0)  # what is written must be a copy


def newest_is_whole(folder: Path) -> int:
    """All that has a name is whole and of one step: nothing to fall back over.  The newest step, 0 for none."""
    steps = [0]
    for path in folder.glob("*.ckpt"):
        content = read_checkpoint(path)
        assert content["state_dict"]["w"].unique().tolist() == [content["global_step"]]
        steps.append(content["global_step"])
    if len(steps) > 1:
        assert step_of(latest_checkpoint(folder, say=lambda line: pytest.fail(line))) == max(steps)
    return max(steps)


def wait_for(folder: Path, is_there: Callable[[Path], bool]) -> float:
    """Seconds until there is a file for which it holds."""
    begun = time.monotonic()
    while not any(is_there(path) for path in folder.iterdir()):
        assert time.monotonic() < begun + 30, "no save begins"
        time.sleep(0.001)
    return time.monotonic() - begun


def mark(path: Path) -> tuple[str, int]:
    """Tells a file or folder from what stood under its name before."""
    try:
        return path.name, path.stat().st_ino
    except FileNotFoundError:  # a temporary one that is renamed or removed at this moment
        return path.name, 0


def kill_often(folder: Path, begin: Callable[[int, bool, str], list[int]]) -> None:
    """Kill savers at random moments of their first or second save, each kind in turn: at once and in the background,
    under a new name each and under one that stands there already.
    """
    rng = random.Random(0)
    step, interrupted, grown, seconds = 0, 0, 0, 0.0
    few = True
    for kill in range(2 * KILLS):
        if kill >= KILLS + KILLS // MEASURED and not few:
            break
        measured = kill % MEASURED == 0  # how long does one take here and now?  Machines slow down.
        before = {mark(path) for path in folder.iterdir()}
        children = begin(step, kill % 2 == 1, "best.ckpt" if kill % 4 > 1 else "")
        wait_for(folder, lambda path: path.name.endswith(".tmp"))
        if measured:
            seconds = wait_for(folder, lambda path, old=before: path.name.endswith(".ckpt") and mark(path) not in old)
        else:
            time.sleep(rng.random() * 2 * seconds)
        victims = children if kill % 3 else [rng.choice(children)]
        for child in victims:
            os.kill(child, signal.SIGKILL)
        codes = ends(children, seconds=30)
        assert {-9} <= set(codes) <= {-9, 1}, codes  # who lost a rank ends by itself, with an error
        after = newest_is_whole(folder)
        assert after >= step
        if not measured:
            interrupted += any(path.name.endswith(".tmp") for path in folder.iterdir())
            grown += after > step
        few = interrupted <= KILLS // 4 or grown <= KILLS // 6
        step = after
        for leftover in folder.glob(".*.tmp"):  # as the next start does
            remove(leftover)
    assert not few, f"{interrupted} kills came during a save, {grown} behind one; the test shows little"


def test_thirty_kills_of_a_single_file_s_save(tmp_path: Path, elsewhere: Path):
    def begin(step: int, background: bool, name: str) -> list[int]:
        return [fork(lambda: saves(tmp_path, step, background, name))]

    kill_often(tmp_path, begin)


def test_thirty_kills_of_a_sharded_save(tmp_path: Path, elsewhere: Path):
    """Of two ranks, all are killed or one."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()

    def begin(step: int, background: bool, name: str) -> list[int]:
        return start(2, tmp_path / "meet", lambda rank: saves(folder, step, background, name, rank, 2))

    kill_often(folder, begin)
