"""``mmssl shards index``, ``check`` and ``stats`` over HTTP say what they say of the same shards on disk."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import FileServer
from toy_stream import write_shards

from mmssl.cli import main


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MMSSL_REMOTE_TIMEOUT", "10")
    monkeypatch.setenv("MMSSL_REMOTE_ATTEMPTS", "2")
    write_shards(tmp_path / "store", 40, pictures=True)
    with FileServer(tmp_path / "store") as running:
        yield running


def damage(server: FileServer, name: str, what: bytes) -> None:
    path = server.folder / name
    data = bytearray(path.read_bytes())
    data[data.index(what)] ^= 0x41
    path.write_bytes(data)


def test_index(server: FileServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{server.url}/{{00000..00002}}.tar"
    assert main(["shards", "index", url]) == 0
    first = capsys.readouterr().out
    assert "3 indexes: 0 were up to date, 3 made anew; 0 lie beside their shard, 3 in the cache folder" in first
    assert main(["shards", "index", url]) == 0
    again = capsys.readouterr().out
    assert "3 were up to date, 0 made anew" in again
    assert main(["shards", "index", str(server.folder)]) == 0
    assert again.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]  # totals and fingerprint
    for path in server.folder.glob("*.idx"):  # HTTP's times have seconds: an index of this second would be believed
        path.unlink()
    damage(server, "00001.tar", b"ustar")
    assert main(["shards", "index", url, f"{server.url}/none.tar"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "00001.tar" in errors[0]
    assert "none.tar" in errors[1]
    assert "2 of 4 shards cannot be used" in errors[2]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_check(server: FileServer, jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{server.url}/{{00000..00002}}.tar"
    damage(server, "00002.tar", b"\xff\xd8\xff")  # a picture's first byte
    reports = []
    for shards in (url, str(server.folder / "{00000..00002}.tar")):
        assert main(["shards", "check", shards, "--out", "/dev/null", "--jobs", jobs]) == 1
        said = capsys.readouterr().out
        assert "read 3 shards, 40 samples" in said
        reports.append(said.replace(server.url, "").replace(str(server.folder), ""))
    assert reports[0] == reports[1]
    assert not list((tmp_path / "cache").glob("**/*"))  # what training has cached is not pushed out
    assert not list(tmp_path.glob("mmssl-check-*"))


def test_stats(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for shards in (f"{server.url}/{{00000..00002}}.tar", str(server.folder / "{00000..00002}.tar")):
        assert main(["shards", "stats", shards, "--json", "--jobs", "1"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1]
    assert figures[0]["texts"]["count"] == 40
    assert not os.path.exists(tmp_path / "cache")
    assert not list(tmp_path.glob("mmssl-stats-*"))
