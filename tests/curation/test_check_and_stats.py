"""``mmssl shards index``, ``check`` and ``stats`` on real shards, good and bad."""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written import picture

from mmssl.cli import main
from mmssl.cli.progress import printable, size, table
from mmssl.cli.shards import _tick
from mmssl.curation.compare import check_shards
from mmssl.curation.inspect import BAD, NOTES, Depth, Finding, ShardReport, check_shard
from mmssl.curation.statistics import places, quantiles
from mmssl.data.shards import ShardSet

Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tar(path: str, members: Members) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pairs(first: int, stop: int) -> Members:
    return [
        member
        for i in range(first, stop)
        for member in ((f"{i:04d}.jpg", picture(i)), (f"{i:04d}.txt", b"text %d" % i))
    ]


def damage(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[512 * 5 + 3] ^= 0x11 if data[512 * 5 + 3] else 0x41
    header = next(at for at in range(512, len(data), 512) if data[at + 257 : at + 262] == b"ustar")
    data[header + 1] ^= 0x41
    Path(path).write_bytes(data)


# ---- index


def test_index_says_what_was_done(capsys) -> None:
    for i in range(4):
        tar(f"s{i}.tar", pairs(10 * i, 10 * i + 5))
    assert main(["shards", "index", "s{0..2}.tar", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "s1.tar: 5 samples" in said
    assert "3 indexes: 0 were up to date, 3 made anew; 3 lie beside their shard, 0 in the cache folder\n" in said
    os.utime("s1.tar", (1, 1))
    os.mkdir("s3.tar.idx")  # in the way
    assert main(["shards", "index", "s*.tar"]) == 0
    said = capsys.readouterr().out
    assert "4 indexes: 2 were up to date, 2 made anew; 3 lie beside their shard, 1 in the cache folder\n" in said
    assert f"20 samples in 4 shards, fingerprint {ShardSet('s*.tar').fingerprint.split()[0]}\n" in said
    assert len(list(Path("cache/mmssl/index").iterdir())) == 1
    assert main(["shards", "index", "s*.tar"]) == 0
    assert (
        "4 were up to date, 0 made anew; 3 lie beside their shard, 1 in the cache folder\n" in capsys.readouterr().out
    )


def test_index_where_nothing_can_be_stored(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    tar("s.tar", pairs(0, 5))
    os.mkdir("s.tar.idx")
    Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    assert main(["shards", "index", "s.tar"]) == 0
    assert "1 made anew; 0 lie beside their shard, 0 in the cache folder, 1 could not be" in capsys.readouterr().out


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_index_names_every_damaged_shard_and_keeps_the_good_ones(jobs: str, capsys) -> None:
    for i in range(6):
        tar(f"s{i}.tar", pairs(10 * i, 10 * i + 5))
    damage("s1.tar")
    Path("s4.tar").write_bytes(Path("s4.tar").read_bytes()[:3000])
    tar("s5.tar", [])
    assert main(["shards", "index", *(f"s{i}.tar" for i in range(7)), "--jobs", jobs]) == 2
    said = capsys.readouterr()
    errors = said.err.strip().splitlines()
    assert [f"s{i}.tar" in error for i, error in zip((1, 4, 5, 6), errors, strict=False)] == [True] * 4
    assert errors[4] == "mmssl: error: 4 of 7 shards cannot be used; they are named above"
    assert sorted(path.name for path in Path().glob("*.idx")) == ["s0.tar.idx", "s2.tar.idx", "s3.tar.idx"]
    assert "3 indexes: 0 were up to date, 3 made anew" in said.out


# ---- check


def bad_shards() -> dict[tuple[str, str], Counter[str]]:
    """Shards with one of each fault; returns what is to be found, by shard and key."""
    tar("good.tar", pairs(0, 40))
    large = io.BytesIO()
    Image.new("L", (5000, 4100)).save(large, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 4000)).save(bomb, "PNG")
    faults: dict[str, Members] = {
        "cut": [("jpg", picture(50)[:-300]), ("txt", b"x")],
        "html": [("jpg", b"<html>"), ("txt", b"x")],
        "zero": [("jpg", b""), ("txt", b"x")],
        "bomb": [("png", bomb.getvalue()), ("txt", b"x")],
        "large": [("png", large.getvalue()), ("txt", b"x")],
        "tiny": [("jpg", picture(51, (300, 20))), ("txt", b"x")],
        "latin": [("jpg", picture(52)), ("txt", b"caf\xe9")],
        "blank": [("jpg", picture(53)), ("txt", b" \n")],
        "nojson": [("jpg", picture(54)), ("txt", b"x"), ("json", b"{'a': 1}")],
        "zeros": [("jpg", picture(63)), ("txt", b"a\0\0b")],
        "essay": [("jpg", picture(64)), ("txt", b"word " * 30_000)],
        "meta": [("jpg", picture(55)), ("txt", b"x"), ("json", b'{"url": "u"}')],
        "fields": [("jpg", picture(56)), ("json", b'{"caption": "in json"}')],
        "nocaption": [("jpg", picture(57)), ("txt", b"x"), ("json", b'{"caption": null}')],
        "alone": [("jpg", picture(58))],
        "words": [("txt", b"only text")],
        "v1": [("cls", b"3")],
        "0007": [("jpg", picture(59)), ("txt", b"x")],  # as in good.tar
    }
    apart = [("apart.jpg", picture(60))] + [
        (f"{key}.{name}", data) for key, fault in faults.items() for name, data in fault
    ]
    apart += [("apart.txt", b"x"), ("twice.jpg", picture(61)), ("twice.txt", b"x"), ("twice.jpg", picture(3))]
    tar("bad.tar", [*apart, ("photo.v2.jpg", picture(62)), ("noextension", b""), ("__meta.json", b"")])
    expected = {
        "cut": ["truncated"], "html": ["not_an_image"], "zero": ["empty_image"], "bomb": ["too_large"],
        "large": ["large_image"], "tiny": ["small_image"], "latin": ["not_utf8"], "blank": ["no_text"],
        "nojson": ["not_json"], "zeros": ["nul_in_text"], "essay": ["long_text"],
        "alone": ["no_text"], "words": ["no_image"],
        "v1": ["nothing_to_train_on", "no_image", "no_text"], "0007": ["duplicate_key"],
        "twice": ["duplicate_key", "no_text"], "photo": ["nothing_to_train_on", "no_image", "no_text"],
        "apart": ["not_adjacent"], "": ["unknown_extension", "not_in_samples", "not_in_samples"],
    }  # fmt: skip
    return {("bad.tar", key): Counter(problems) for key, problems in expected.items()}


def findings(path: str) -> dict[tuple[str, str], Counter[str]]:
    found: dict[tuple[str, str], Counter[str]] = {}
    for line in Path(path).read_text().splitlines():
        finding = json.loads(line)
        found.setdefault((finding["shard"], finding["key"]), Counter())[finding["problem"]] += 1
        assert finding["bad"] == (finding["problem"] in BAD)
        assert finding["problem"] in BAD | NOTES
    return found


def test_check_finds_every_fault(capsys) -> None:
    expected = bad_shards()
    assert main(["shards", "check", "good.tar", "--out", "none.jsonl", "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "all is well" in said
    assert "none.jsonl is empty: nothing was found" in said
    assert Path("none.jsonl").read_text() == ""
    assert main(["shards", "check", "good.tar", "bad.tar", "--out", "found.jsonl", "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert findings("found.jsonl") == expected
    assert "all findings: found.jsonl" in said
    assert "read 2 shards, 62 samples" in said
    assert "1  truncated            images cut short" in said
    assert "truncated: bad.tar cut: " in said
    assert "duplicate_key: bad.tar 0007: as sample 7 of good.tar" in said
    assert "no_text: bad.tar alone: has image; 93.55 % of all samples have text" in said
    assert (
        f"{sum(n for problems in expected.values() for problem, n in problems.items() if problem in BAD)} find" in said
    )

    assert main(["shards", "check", "good.tar", "bad.tar", "--out", "again.jsonl", "--jobs", "2"]) == 1
    assert Path("again.jsonl").read_bytes() == Path("found.jsonl").read_bytes()

    assert main(["shards", "check", "*.tar", "--no_images", "--out", "quick.jsonl", "--jobs", "1"]) == 1
    images = {"truncated", "not_an_image", "empty_image", "too_large", "large_image", "small_image"}
    quick = {
        place: rest
        for place, problems in expected.items()
        if (rest := Counter({problem: n for problem, n in problems.items() if problem not in images}))
    }
    found = {(shard, key): problems for (shard, key), problems in findings("quick.jsonl").items() if shard == "bad.tar"}
    quick.pop(("bad.tar", "0007"))  # bad.tar now comes first, so it is good.tar that has the duplicate
    assert found == quick


def test_check_compares_contents(capsys) -> None:
    bad_shards()
    assert main(["shards", "check", "good.tar", "bad.tar", "--duplicates", "--out", "found.jsonl", "--jobs", "1"]) == 1
    found = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    [one] = [finding for finding in found if finding["problem"] == "duplicate_content"]
    assert (one["shard"], one["key"], one["detail"]) == ("bad.tar", "twice", "as sample 3 of good.tar")
    tar("texts.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("c.txt", b"1"), ("d.txt", b"1"), ("e.txt", b"2")])
    assert main(["shards", "check", "texts.tar", "--duplicates", "--out", "found.jsonl"]) == 0  # only notes
    found = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert [(finding["key"], finding["detail"]) for finding in found] == [
        ("c", "as sample 0 of texts.tar"),
        ("d", "as sample 0 of texts.tar"),
        ("e", "as sample 1 of texts.tar"),
    ]


def test_check_reads_the_tar_anew_and_goes_on_after_an_unusable_shard(capsys) -> None:
    for i in range(3):
        tar(f"s{i}.tar", pairs(10 * i, 10 * i + 5))
    assert main(["shards", "index", "s*.tar"]) == 0
    stat = os.stat("s1.tar")
    damage("s1.tar")  # as a failing disk does it: neither size nor time change, and the stored index still fits
    os.utime("s1.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    tar("empty.tar", [])
    capsys.readouterr()
    assert main(["shards", "check", "s0.tar", "s1.tar", "empty.tar", "gone.tar", "s2.tar", "--out", "found.jsonl"]) == 2
    said = capsys.readouterr()
    assert "shard s1.tar: damaged at byte" in said.err
    assert "shard empty.tar: holds no sample" in said.err
    assert "shard gone.tar: " in said.err
    assert said.err.strip().splitlines()[-1].endswith("3 of 5 shards cannot be used; they are named above")
    assert "s2.tar: 5 samples, nothing bad" in said.out
    assert [place[0] for place in findings("found.jsonl")] == ["s1.tar", "empty.tar", "gone.tar"]


def test_names_with_signs_of_patterns_are_checked() -> None:
    names = ["br{1}.tar", "a[0].tar", "b{1..2}.tar"]
    for name in names:
        tar(name, pairs(0, 3))
    reports = [check_shard(Depth(), name) for name in names]
    assert [(report.usable, report.samples) for report in reports] == [(True, 3)] * 3


def test_an_index_that_does_not_fit_its_tar_is_told(capsys) -> None:
    tar("s.tar", [("a.txt", b"x" * 600), ("b.txt", b"y" * 100), ("c.txt", b"z")])
    assert main(["shards", "index", "s.tar"]) == 0
    stat = os.stat("s.tar")
    tar("s.tar", [("a.txt", b"x" * 100), ("b.txt", b"y" * 600), ("c.txt", b"z")])
    os.utime("s.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat("s.tar").st_size == stat.st_size
    assert main(["shards", "check", "s.tar"]) == 2
    assert "s.tar: its index s.tar.idx lists other members than it has; delete the index" in capsys.readouterr().err


def test_many_duplicates_over_many_shards() -> None:
    """Against a dictionary: every sample but the first of its key is named, with the place of the first."""
    rng = np.random.default_rng(0)
    first: dict[str, tuple[str, int]] = {}
    expected, paths = [], []
    for shard in range(7):
        path = tar(f"d{shard}.tar", [(f"{key}.txt", b"t") for key in dict.fromkeys(rng.integers(0, 60, 30).tolist())])
        paths.append(path)
        shards = ShardSet(path)
        for place in range(len(shards)):
            key = shards.read(place).key
            if key in first:
                expected.append(Finding(path, key, "duplicate_key", "as sample {1} of {0}".format(*first[key])))
            first.setdefault(key, (path, place))
    found: list[Finding] = []
    seen: list[ShardReport] = []
    check_shards(paths, Depth(), 1, found.append, seen.append)
    assert found == expected
    assert [report.path for report in seen] == paths


# ---- stats


def test_stats_are_right(tokenizer_path: str, capsys) -> None:
    rng = np.random.default_rng(1)
    members: Members = []
    widths, heights, texts = [], [], []
    for i in range(60):
        width, height = map(int, rng.integers(100, 400, 2))
        words = ["a", "red", "square", "with", "blue", "paper"][: 1 + i % 6] * (200 if i == 5 else 1)
        widths.append(width)
        heights.append(height)
        texts.append(" ".join(words))
        format = "PNG" if i % 3 == 0 else "JPEG"
        members.append((f"{i}.{'png' if i % 3 == 0 else 'jpg'}", picture(i, (width, height), format)))
        members.append((f"{i}.txt", texts[-1].encode()))
    members += [("x.jpg", b"none"), ("x.txt", b"\xff"), ("folderless", b"")]
    tar("a.tar", members[:40])
    tar("b.tar", members[40:])
    assert main(["shards", "stats", "a.tar", "b.tar", "--json", "--tokenizer", tokenizer_path, "--samples", "0"]) == 0
    figures = json.loads(capsys.readouterr().out)
    sizes = [len(data) for name, data in members if name.endswith(".png")]
    assert figures["members"]["png"] == {"count": 20, "bytes": sum(sizes)}
    assert figures["members"]["txt"]["count"] == 61
    assert (figures["shards"], figures["samples"], figures["samples_read"]) == (2, 61, 61)
    assert figures["bytes"] == os.path.getsize("a.tar") + os.path.getsize("b.tar")
    assert figures["members_in_no_sample"] == {"no extension": 1}
    assert figures["bad"] == {"unreadable_image": 1, "not_utf8": 1}
    images = figures["images"]
    assert images["width"] == quantiles(widths)
    assert (images["height"]["min"], images["height"]["max"]) == (min(heights), max(heights))
    assert images["formats"] == {"JPEG": 40, "PNG": 20}
    small = [min(w, h) < 224 for w, h in zip(widths, heights, strict=True)]
    assert images["share_below_224"] == pytest.approx(np.mean(small))
    assert figures["texts"]["words"] == quantiles([len(text.split()) for text in texts])
    assert figures["texts"]["characters"]["max"] == max(map(len, texts))
    assert figures["texts"]["share_duplicated"] == pytest.approx(1 - len(set(texts)) / 60)
    tokens = figures["tokens"]
    assert tokens["share_of_texts_above_512"] == pytest.approx(1 / 60)
    assert tokens["per_text"]["max"] >= 1200
    assert tokens["share_unknown"] == 0

    assert main(["shards", "stats", "a.tar", "b.tar", "--tokenizer", tokenizer_path, "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 shards, 61 samples" in said
    assert "from 61 samples, all there are" in said
    assert "JPEG 66.7 %, PNG 33.3 %" in said
    assert main(["shards", "stats", "a.tar", "b.tar", "--samples", "10"]) == 0
    assert "from 10 samples, spread evenly (--samples 0 reads all)" in capsys.readouterr().out


def test_the_sample_is_even_and_random() -> None:
    for total, wanted in ((1000, 10), (1001, 300), (7, 6), (10**9, 1000)):
        chosen = places(total, wanted)
        assert len(set(chosen.tolist())) == wanted
        assert np.abs(chosen - (np.arange(wanted) + 0.5) * total / wanted).max() <= total / wanted / 2 + 1
        assert chosen.min() >= 0
        assert chosen.max() < total
    inside = (places(10**9, 1000) % 10**6) / 10**6
    assert abs(inside.mean() - 0.5) < 0.05
    assert inside.std() == pytest.approx(12**-0.5, abs=0.03)
    assert places(5, 0).tolist() == places(5, 9).tolist() == [0, 1, 2, 3, 4]


# ---- mistakes, and what is shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["index", "nope*.tar"], "no shard matches 'nope*.tar'"),
        (["index"], "shards"),
        (["index", "a.tar", "--jobs", "0"], "jobs is 0; give the number of processes, at least 1"),
        (["check", "a.tar", "--jobs", "-1"], "jobs is -1"),
        (["check", "a.tar", "--out", "no/such/folder.jsonl"], "no/such/folder.jsonl cannot be written"),
        (["check", "a.tar", "a.tar"], "is named twice"),
        (["check", "a.tar", "--imagess"], "--imagess"),
        (["stats", "a.tar", "--samples", "-1"], "samples is -1; give how many"),
        (["stats", "gone.tar"], "gone.tar"),
        (["stats", "a.tar", "--tokenizer", "none.json"], "tokenizer none.json: cannot be read"),
        (["stats", "a.tar", "--samples", "many"], "samples: expected int, got 'many'"),
        (["pipe", "a.tar"], "mmssl shards needs one of: index, check, write, stats"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], expected: str, capsys) -> None:
    tar("a.tar", pairs(0, 2))
    assert main(["shards", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mmssl: error: ")
    assert expected in line


@pytest.mark.parametrize("command", ["index", "check", "write", "stats"])
def test_help(command: str, capsys) -> None:
    assert main(["shards", command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: mmssl shards {command}" in said
    assert "--jobs JOBS" in said


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tar("a.tar", pairs(0, 2))
    assert main(["shards", "check", "a.tar", "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "a.tar: 2 samples, nothing bad" in said.out
    assert said.err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["shards", "check", "a.tar", "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "a.tar: 2 samples" not in said.out
    assert "checking: 100%" in said.err


def test_figures_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 123_456, 5e9, 7e15)] == [
        "0 B", "999 B", "1.0 kB", "123.5 kB", "5.0 GB", "7000.0 TB",
    ]  # fmt: skip
    assert printable("a\x1b[31m\udc80é\n") == "a\\x1b[31m\\udc80é\n"
    assert table([["a", "1"], ["bb", "22"]], "lr") == "a    1\nbb  22"


def test_an_index_of_the_same_tick_is_not_called_new(tmp_path: Path) -> None:
    """The file system's clock moves in steps of milliseconds, and an index may be as young as the command."""
    for number in range(20):
        young = tmp_path / f"{number}.idx"
        young.touch()
        begun = tmp_path / f"{number}.clock"
        begun.touch()
        assert _tick(str(begun)) > young.stat().st_mtime_ns
