"""``mmssl shards write``: what cannot be used, a kill in the middle, and mistakes of the user."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from written import picture, read, skipped

from mmssl.cli import main
from mmssl.data.tar import open_shard, scan


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- nothing vanishes silently


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "good.jpg").write_bytes(picture(0))
    (tmp_path / "cut.jpg").write_bytes(picture(1)[:-200])
    (tmp_path / "none.jpg").write_bytes(b"<html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    rows = [
        ("good.jpg", b"a", b"k0"),
        ("cut.jpg", b"b", b"k1"),
        ("none.jpg", b"c", b"k2"),
        ("empty.jpg", b"d", b"k3"),
        ("absent.jpg", b"e", b"k4"),
        ("https://example.org/x.jpg", b"f", b"k5"),
        ("good.jpg", b"\xff\xfe", b"k6"),
        ("", b"h", b"k7"),
        ("good.jpg", b"i", b"k0"),
        ("good.jpg", b"j", b""),
        (".", b"k", b"k9"),
        ("/dev/zero", b"l", b"k10"),
    ]
    Path("t.tsv").write_bytes(
        b"path\tcaption\tid\n" + b"".join(b"%s\t%s\t%s\n" % (p.encode(), t, k) for p, t, k in rows) + b"good.jpg\tx\n"
    )
    options = ["--image", "path", "--text", "caption", "--key", "id", "--jobs", "2"]
    assert main(["shards", "write", "t.tsv", "--out", "out", *options]) == 1
    assert list(read("out")) == ["k0"]
    named = {line["source"]: line["reason"] for line in skipped("out")}
    assert named == {
        "t.tsv: row 2": "truncated",
        "t.tsv: row 3": "not_an_image",
        "t.tsv: row 4": "empty_image",
        "t.tsv: row 5": "not_found",
        "t.tsv: row 6": "url",
        "t.tsv: row 7": "not_utf8",
        "t.tsv: row 8": "no_image",
        "t.tsv: row 9": "duplicate_key",
        "t.tsv: row 10": "no_key",
        "t.tsv: row 11": "cannot_be_read",
        "t.tsv: row 12": "cannot_be_read",
        "t.tsv: row 13": "wrong_columns",
    }
    said = capsys.readouterr().err
    assert "skipped 12: " in said
    assert "1 x truncated" in said
    assert "use img2dataset" in said


def test_what_cannot_be_used_of_a_folder_and_of_json_lines(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in {
        "a.jpg": picture(0), "a.png": picture(1, format="PNG"), "b.jpg": picture(2), "b.json": b"{",
        "c.jpg": picture(3), "c.txt": b"\xff", "d.txt": b"no picture", "e.xml": b"",
        "f.jpg": picture(4), "f.json": b"[1]",
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "circle").symlink_to(".")
    assert main(["shards", "write", "source", "--out", "out", "--jobs", "1"]) == 1
    assert read("out") == {"a": {"jpg": picture(0)}}
    assert {Path(line["source"]).name: line["reason"] for line in skipped("out")} == {
        "a.png": "duplicate_key",
        "b.jpg": "not_json",
        "c.jpg": "not_utf8",
        "d.txt": "no_image",
        "e.xml": "unknown_kind",
        "f.jpg": "not_json",
        "gone.jpg": "not_found",
    }
    lines = [b'{"t": "good"}', b"{", b"[1]", b'{"t": "\xff"}', b'{"t": ""}', b'{"u": 1}', b'{"t": [1]}']
    Path("rows.jsonl").write_bytes(
        b"\n".join([*lines, b'{"t": "\\ud800"}', b"[" * 100_000, b'{"t": "a\\u0000b"}', b"9" * 5000])
    )
    assert main(["shards", "write", "rows.jsonl", "--text", "t", "--out", "out2", "--jobs", "1"]) == 1
    assert [members["txt"] for members in read("out2").values()] == [b"good"]
    assert [line["reason"] for line in skipped("out2")] == [
        "not_json", "not_json", "not_utf8", "no_text", "no_text", "no_text", "not_utf8", "not_json",
        "nul_in_text", "not_json",
    ]  # fmt: skip


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """Whole shards or none under a final name; no process stays behind; the next try says what is there."""
    (tmp_path / "source").mkdir()
    for i in range(400):
        (tmp_path / "source" / f"{i:03d}.jpg").write_bytes(picture(i % 9, (300, 300)))
    command = ["shards", "write", "source", "--out", "out", "--short_side", "64", "--jobs", "2"]
    command += ["--samples_per_shard", "60"]
    process = subprocess.Popen([sys.executable, "-m", "mmssl", *command], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not Path("out/train-000001.tar.partial").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        session = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(pid) == process.pid]
        assert len(session) >= 4  # itself, the fork server, two workers
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    final = sorted(path.name for path in Path("out").glob("*.tar"))
    assert final[0] == "train-000000.tar"
    assert Path("out/train-000001.tar.partial").exists() or len(final) > 1
    for name in final:
        descriptor = open_shard(f"out/{name}")
        assert len(scan(descriptor, name)[0]) == 60
        os.close(descriptor)
    deadline = time.monotonic() + 20
    while any(_session(pid) == process.pid for pid in session):
        assert time.monotonic() < deadline, "processes stay behind"
        time.sleep(0.05)
    assert main(command) == 2
    shutil.rmtree("out")
    assert main(command) == 0
    assert len(read("out")) == 400


def _session(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[3])


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nope"], "source nope: not found"),
        (["https://example.org/a.csv"], "URLs are not fetched"),
        (["old.tar"], "old.tar: it is a shard already"),
        (["thing.xyz"], "thing.xyz: its kind is unknown; give folders, .txt, or tables (csv,"),
        (["bare"], "bare: holds no image, no .txt and no table"),
        (["t.csv"], "which column holds what? Its columns are a, b; name the picture's by the option image"),
        (["t.csv", "--text", "c"], "t.csv: has no column 'c' (for text); its columns are a, b"),
        (["t.csv", "--text", "a", "--label", "x"], "has no column 'x' (for label)"),
        (["r.jsonl", "--image", "x"], "r.jsonl: has no column 'x' (for image); its columns are t"),
        (["empty.csv", "--text", "a"], "its columns are unknown, for it is empty"),
        (["bad.parquet", "--text", "a"], "bad.parquet: is no whole Parquet file"),
        (["doc.txt", "--text", "a"], "--text names a table's column, and no source is a table"),
        (["doc.txt", "--labels", "folder"], "--labels folder needs a folder of images"),
        (["t.csv", "--text", "a", "--per_line"], "--per_line is for .txt files"),
        (["doc.txt", "doc.txt"], "a source is named twice"),
        (["doc.txt", "--max_words", "0"], "max_words is 0"),
        (["doc.txt", "--short_side", "0"], "short_side is 0"),
        (["doc.txt", "--quality", "99"], "quality is 99"),
        (["doc.txt", "--samples_per_shard", "0"], "samples_per_shard is 0"),
        (["doc.txt", "--shard_mb", "0"], "shard_mb must be above 0"),
        (["doc.txt", "--val_part", "1"], "val_part is 1.0"),
        (["doc.txt", "--jobs", "0"], "jobs is 0"),
        (["doc.txt", "--labels", "x"], "labels"),
        (["doc.txt", "--nope"], "--nope"),
        (["blank.txt"], "nothing was written: there is no sample that can be used; out/skipped.jsonl says why"),
        ([], "sources"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], expected: str, capsys) -> None:
    for name, content in {
        "old.tar": "", "thing.xyz": "", "t.csv": "a,b\n1,2\n", "r.jsonl": '{"t": 1}\n', "empty.csv": "",
        "blank.txt": " ", "bad.parquet": "PAR1", "doc.txt": "text",
    }.items():  # fmt: skip
        Path(name).write_text(content)
    Path("bare").mkdir()
    assert main(["shards", "write", *arguments, "--out", "out"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert expected in lines[-1]
    assert lines[-1].startswith("mmssl: error: ")
    assert len(lines) == (2 if arguments == ["blank.txt"] else 1)
    assert not list(Path().glob("out/*.tar*"))


def test_a_folder_with_shards_is_left_alone(capsys) -> None:
    Path("doc.txt").write_text("text")
    Path("out").mkdir()
    Path("out/other.tar").write_text("somebody's")
    assert main(["shards", "write", "doc.txt", "--out", "out"]) == 2
    assert "out holds 1 shards already (such as other.tar); give another --out" in capsys.readouterr().err
    Path("out/other.tar").rename("out/train-000003.tar.partial")
    assert main(["shards", "write", "doc.txt", "--out", "out"]) == 2
    assert "train-000003.tar.partial: shards are being written there, or were until" in capsys.readouterr().err
    assert main(["shards", "write", "doc.txt", "--out", "doc.txt"]) == 2
    assert "doc.txt is a file" in capsys.readouterr().err


def test_a_damaged_table_stops_the_run(capsys) -> None:
    table = pyarrow.table({"a": [f"text number {i} {'x' * 50}" for i in range(2000)]})
    pyarrow.parquet.write_table(table, "t.parquet", row_group_size=500, compression="none", use_dictionary=False)
    data = bytearray(Path("t.parquet").read_bytes())
    at = data.index(b"text number 900 ") - 100
    data[at - 30_000 : at] = bytes(30_000)
    Path("t.parquet").write_bytes(data)
    assert main(["shards", "write", "t.parquet", "--text", "a", "--out", "out", "--jobs", "1"]) == 2
    assert "source t.parquet: damaged behind row " in capsys.readouterr().err
    assert not list(Path().glob("out/*"))


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"]}), "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["shards", "write", "t.parquet", "--text", "a", "--out", "out"]) == 2
    assert "pip install 'mmssl[parquet]'" in capsys.readouterr().err
