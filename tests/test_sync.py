"""``mmssl sync`` brings the segments that were logged offline to W&B, in order, once."""

import json
import os
import socket
from pathlib import Path

import pytest
import wandb
from wandb_server import WandbServer

from mmssl.cli import main
from mmssl.training.loggers import Wandb


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WandbServer:
    with WandbServer() as server:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", server.keys[0])
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        wandb.teardown()  # it remembers the address of an earlier test's
        yield server
        wandb.teardown()


def log(folder: Path, steps: range) -> None:
    logger = Wandb(str(folder))
    for step in steps:
        logger.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    logger.finalize("success")


def test_segments_are_uploaded_once_in_their_order_under_one_group(
    tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    log(run, range(3))
    log(run, range(2, 5))
    assert "upload with: mmssl sync" in capfd.readouterr().out
    assert server.runs == {}
    assert main(["sync", str(run), "--dry_run"]) == 0
    assert capfd.readouterr().out.count("would upload") == 2
    assert server.runs == {}

    assert main(["sync", str(run)]) == 0
    said = capfd.readouterr().out
    assert "(1 of 2): uploaded" in said
    assert "(2 of 2): uploaded" in said
    first, second = server.runs.values()
    assert (first.group, first.display) == ("run", "run")
    assert (second.group, second.display) == ("run", "run-2")
    assert [row["trainer/global_step"] for row in first.history] == [1, 2, 3]
    assert [row["trainer/global_step"] for row in second.history] == [3, 4, 5]
    assert first.history[1]["train/loss"] == 0.5

    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing beside it, such as logs of wandb's
    server.asked.clear()
    assert main(["sync", str(run)]) == 0
    assert "nothing to upload" in capfd.readouterr().out
    assert server.asked == []


def test_what_is_being_written_is_left_for_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    from mmssl.cli.lock import locked

    for name in ("offline-run-20260101_000000-a", "offline-run-20260102_000000-b"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / f"run-{name[-1]}.wandb").write_bytes(b"")
    with locked(tmp_path):
        assert main(["sync", str(tmp_path), "--dry_run"]) == 0
    said = capfd.readouterr().out
    assert "20260102_000000-b is left for later" in said
    assert said.count("would upload") == 1
    assert main(["sync", str(tmp_path), "--dry_run"]) == 0
    assert capfd.readouterr().out.count("would upload") == 2


@pytest.mark.parametrize("problem", ["no run", "no key", "no server", "wrong key"])
def test_one_line_for_what_is_in_the_way(
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    problem: str,
):
    run = tmp_path / "run"
    expected = {"no run": "there is no run at", "no key": "no API key", "no server": "does not answer"}
    if problem != "no run":
        log(run, range(1))
    if problem == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
    if problem == "no server":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    if problem == "wrong key":
        monkeypatch.setenv("WANDB_API_KEY", "1" * 40)
    capfd.readouterr()
    assert main(["sync", str(run)]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("mmssl: error: ")
    assert expected.get(problem, "1 of 1 segments are not uploaded") in line
    assert list(run.glob("wandb/*/*.synced")) == []
    if problem == "wrong key":  # and nothing is lost: with the right one it goes
        assert line.endswith("user is not logged in")
        monkeypatch.setenv("WANDB_API_KEY", server.keys[0])
        assert main(["sync", str(run)]) == 0
        assert len(server.runs) == 1


def test_what_w_and_b_could_not_take_online_is_sent_again(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_MODE", "online")
    server.stream_status = 413
    log(tmp_path / "run", range(3))
    ((name, run),) = server.runs.items()
    assert run.history == []
    server.stream_status = None
    assert main(["sync", str(tmp_path / "run")]) == 0
    assert "nothing to upload" in capfd.readouterr().out
    assert main(["sync", str(tmp_path / "run"), "--online"]) == 0
    assert list(server.runs) == [name]
    assert [row["trainer/global_step"] for row in run.history] == [1, 2, 3]


def test_a_lock_of_which_nobody_knows_is_neither_taken_nor_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """From a login node the owner cannot be asked; what its lock says last is enough to leave the newest for later."""
    from mmssl.cli import lock

    (tmp_path / "wandb" / "offline-run-20260101_000000-a").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-20260101_000000-a" / "run-a.wandb").write_bytes(b"")
    path = tmp_path / "lock"
    path.write_text(json.dumps({**lock._me(), "host": "node7", "process": None, "job": None, "id": "another"}))
    content = path.read_text()

    def no_waiting(seconds: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr("time.sleep", no_waiting)
    assert main(["sync", str(tmp_path), "--dry_run"]) == 0
    assert "is left for later" in capfd.readouterr().out
    assert path.read_text() == content
    os.utime(path, (0, 0))  # no sign of life for long
    assert main(["sync", str(tmp_path), "--dry_run"]) == 0
    assert "would upload" in capfd.readouterr().out
    assert path.read_text() == content
