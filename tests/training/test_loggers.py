"""Numbers reach the CSV file whatever happens to W&B, and W&B never stops anything."""

import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mmssl.training.loggers import MetricsFile, Wandb
from mmssl.training.reach import has_key


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_file_merges_steps_and_grows_columns(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    log = MetricsFile(path)
    for step in range(3):
        log.log_metrics({"a": step}, step)
        log.save()
        log.log_metrics({"b": 10 * step}, step)
        log.save()
    log.log_metrics({"c": 1.5}, 3)
    log.finalize("success")
    rows = rows_of(path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["b"] for row in rows] == ["0", "10", "20", ""]
    assert rows[3]["c"] == "1.5"


def test_metrics_file_goes_on_after_a_restart(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    log = MetricsFile(path)
    for step in (4, 9, 14):
        log.log_metrics({"a": step}, step)
        log.save()
    log = MetricsFile(path)  # resumed from step 8: the rows at 9 and 14 are of a past that did not happen
    log.log_metrics({"a": -9}, 9)
    log.save()
    assert [(row["step"], row["a"]) for row in rows_of(path)] == [("5", "4"), ("10", "-9")]


def test_metrics_file_that_cannot_be_written_only_warns(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    log = MetricsFile(tmp_path / "file" / "metrics.csv")
    for step in range(3):
        log.log_metrics({"a": 1}, step)
        log.save()
    assert capsys.readouterr().err.count("training goes on without it") == 1


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def segments(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "wandb/segments.json").read_text())


@pytest.mark.usefixtures("no_account")
def test_without_a_key_it_is_offline_and_each_start_a_segment(tmp_path: Path, capsys):
    folder = tmp_path / "runs" / "name"
    for start in range(2):
        log = Wandb(str(folder))
        assert log.experiment.settings.mode == "offline"
        assert log.experiment.group == "name"
        assert log.experiment.name == ("name" if start == 0 else "name-2")
        log.log_metrics({"a": 1.0}, step=start)
        log.finalize("success")
    assert "no API key" in capsys.readouterr().out
    assert len({segment["id"] for segment in segments(folder)}) == 2
    assert len(list((folder / "wandb").glob("offline-run-*/*.wandb"))) == 2


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What W&B is asked for: mode, and the seconds that it may try to connect (it would take 90)."""
    import wandb

    real, calls = wandb.init, list[tuple[str, float]]()

    def init(**kwargs: Any) -> Any:
        calls.append((kwargs["mode"], kwargs["settings"].init_timeout))
        return real(**kwargs)

    monkeypatch.setattr(wandb, "init", init)
    return calls


@pytest.mark.usefixtures("no_account")
def test_with_a_key_and_no_network_w_and_b_is_not_asked_to_connect(tmp_path: Path, monkeypatch, capsys, begun):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    log = Wandb(str(tmp_path / "run"))
    log.log_metrics({"a": 1.0}, step=0)
    log.finalize("success")
    assert [mode for mode, _ in begun] == ["offline"]
    assert "does not answer" in capsys.readouterr().out
    assert segments(tmp_path / "run")[0]["mode"] == "offline"


@pytest.mark.usefixtures("no_account")
def test_a_server_that_answers_nonsense_costs_as_long_as_it_may(tmp_path: Path, monkeypatch, begun):
    """It accepts connections, so the quick look succeeds, and then says nothing that W&B understands."""
    import http.server
    import threading

    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        log = Wandb(str(tmp_path / "run"), connect_seconds=3)
        log.log_metrics({"a": 1.0}, step=0)
        log.finalize("success")
        assert begun == [("online", 3.0), ("offline", 3.0)]
        assert segments(tmp_path / "run")[0]["mode"] == "offline"
    finally:
        server.shutdown()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch, capfd):
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *args: object) -> None:
            return

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    log = Wandb(str(tmp_path / "run"))
    for step in range(3):
        log.log_metrics({"a": 1.0}, step=step)
    log.finalize("success")
    said = capfd.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "W&B is off for this run ([Errno 28] No space left on device)" in said.err


def test_mode_is_respected(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = Wandb(str(tmp_path / "run"))
    log.log_metrics({"a": 1.0}, step=0)
    log.log_image("pictures", [])
    log.finalize("success")
    assert not (tmp_path / "run" / "wandb").exists()


def test_whatever_wandb_raises_it_is_switched_off_once(tmp_path: Path, monkeypatch, capsys):
    import wandb

    def broken(**kwargs: object) -> None:
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(wandb, "init", broken)
    log = Wandb(str(tmp_path / "run"))
    for step in range(3):
        log.log_metrics({"a": 1.0}, step=step)
        log.log_hyperparams({"a": 1})
    log.log_image("pictures", [])
    log.finalize("failed")
    assert capsys.readouterr().err.count("W&B is off for this run (the service is gone)") == 1


def test_a_run_that_breaks_later_is_switched_off(tmp_path: Path, monkeypatch, capsys):
    log = Wandb(str(tmp_path / "run"))
    run = log.experiment

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run), "log", broken)
    log.log_metrics({"a": 1.0}, step=0)
    log.log_metrics({"a": 1.0}, step=1)
    assert capsys.readouterr().err.count("No space left on device") == 1
    run.finish()


def test_the_id_belongs_to_the_folder(tmp_path: Path):
    (tmp_path / "wandb").mkdir()
    first, second = Wandb(str(tmp_path)), Wandb(str(tmp_path))
    assert first._run_id() == second._run_id()


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b"[{", b"{}", b"\xff"])
def test_what_a_killed_start_left_half_written_counts_as_absent(tmp_path: Path, monkeypatch, capsys, content: bytes):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "segments.json").write_bytes(content)
    log = Wandb(str(folder))
    log.log_metrics({"a": 1.0}, step=0)
    log.finalize("success")
    said = capsys.readouterr().err
    assert "is off" not in said
    assert said.count("segments.json cannot be read") == 1
    assert [segment["mode"] for segment in segments(folder)] == ["offline"]
    if content not in (b"[{", b"{}"):
        (folder / "wandb" / "id").write_bytes(content)
        found = log._run_id()
        assert len(found) == 8
        assert Wandb(str(folder))._run_id() == found
        assert capsys.readouterr().err.count("id cannot be read") == 1


def test_a_start_that_is_killed_in_mid_write_leaves_what_was_there(tmp_path: Path, monkeypatch):
    """What stands in segments.json and id is whole at any moment: nothing is written to them in place."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    written = []
    write = Path.write_text

    def spied(path: Path, *args: object, **kwargs: object) -> int:
        written.append(path.name)
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", spied)
    log = Wandb(str(tmp_path))
    log.log_metrics({"a": 1.0}, step=0)
    log.finalize("success")
    assert len(log._run_id()) == 8
    assert len(segments(tmp_path)) == 1
    assert len(written) >= 2
    assert not {"segments.json", "id"} & set(written)
    assert sorted(path.name for path in (tmp_path / "wandb").glob("*.tmp")) == []


@pytest.mark.usefixtures("no_account")
def test_a_key_is_found_where_wandb_keeps_it(tmp_path: Path, monkeypatch):
    server = "https://api.wandb.ai"
    assert not has_key(server)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_key(server)
    assert not has_key("https://wandb.example.org")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key("https://wandb.example.org")
