import contextlib
import io
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_stream import write_shards
from webdataset import TarWriter

from mmssl.data import index as index_module
from mmssl.data import shards as shards_module
from mmssl.data.index import index_shard, split_name
from mmssl.data.patterns import expand
from mmssl.data.shards import ShardSet
from mmssl.data.tar import LocalReader, ShardError, open_shard, scan


def tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> str:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


# ---- naming shards

# Protocols of fsspec that run something, or that wrap other files.
WRAPPERS = ["reference", "dask", "git", "github", "jupyter", "simplecache", "filecache", "blockcache", "cached", "zip"]
WRAPPERS += ["tar", "libarchive", "generic", "dir", "data", "local", "Reference", "async_wrapper", "wandb", "python"]


def test_expand(tmp_path: Path) -> None:
    for name in ["a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "c.txt"]:
        (tmp_path / name).touch()
    here = str(tmp_path)
    assert expand(f"{here}/a-{{08..10}}.tar") == [f"{here}/a-{n}.tar" for n in ("08", "09", "10")]
    assert expand(f"{here}/*.tar") == [f"{here}/{n}.tar" for n in ("a-08", "a-09", "a-10", "b")]
    assert expand([f"{here}/{{b,a-10}}.tar"]) == [f"{here}/b.tar", f"{here}/a-10.tar"]
    assert expand(here) == expand(f"{here}/*.tar")
    assert expand(f"file://{here}/b.tar") == [f"{here}/b.tar"]
    assert len(expand(f"{here}/{{x,y}}-{{0..4}}.tar")) == 10


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing-*.tar", r"no shard matches 'nothing-\*.tar'"),
        (".", r"folder '.' holds no .tar; name a folder of shards \(mmssl shards write makes them"),
        ([], "no shards are named"),
        (["a.tar", "./a.tar"], "named twice"),
        ("pipe:touch canary", "pipe: would run a command"),
        ("PIPE:touch canary", "pipe: would run a command"),
        ("http://127.0.0.1/*.tar", "an HTTP server cannot list files"),
        ("https://127.0.0.1/shards/", "an HTTP server cannot list files"),
        ("simplecache::s3://bucket/a.tar", "chained URLs"),
        ("file:///a.tar::pipe:touch canary", "chained URLs"),
        *[(f"{scheme}://x/a.tar", f"unknown scheme {scheme.lower()}:") for scheme in WRAPPERS],
        ("gopher://a.tar", "unknown scheme gopher:"),
        ("a-{3..1}.tar", "does not count upwards"),
        ("a-{1..9.tar", "braces do not match"),
    ],
)
def test_expand_refuses(
    pattern: str | list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        expand(pattern)
    assert not (tmp_path / "canary").exists()


# ---- reading


def test_reads_what_webdataset_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = [
        {"__key__": f"{i:09d}", "jpg": rng.bytes(int(rng.integers(0, 3000))), "txt": f"{i}".encode(), "json": b"{}"}
        for i in range(50)
    ]
    for shard in range(2):
        with TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for sample in written[shard * 25 : shard * 25 + 25]:
                writer.write(sample)
    shards = ShardSet(str(tmp_path / "{0..1}.tar"))
    assert len(shards) == 50
    assert shards.extensions == {"jpg": 50, "txt": 50, "json": 50}
    for copy in [shards, pickle.loads(pickle.dumps(shards)), ShardSet(str(tmp_path))]:  # noqa: S301
        for i in [49, 0, 25, 24, 7]:
            sample = copy.read(i)
            assert sample.key == written[i]["__key__"]
            assert sample.shard == str(tmp_path / f"{i // 25}.tar")
            assert sample.members == {k: v for k, v in written[i].items() if k != "__key__"}
    with pytest.raises(IndexError):
        shards.read(50)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(tmp_path: Path, format: int) -> None:
    folder = "f" * 90
    members = [(f"{folder}/{'g' * 60}/{i}.txt", bytes([i]) * i * 300) for i in range(5)]
    if format != tarfile.USTAR_FORMAT:
        members += [(f"{'n' * 300}.txt", b"long"), ("schöne-ü.txt", b"utf-8")]
    shards = ShardSet(tar(tmp_path / "a.tar", members, format))
    assert [shards.read(i).key + ".txt" for i in range(len(shards))] == [name for name, _ in members]
    assert [shards.read(i).members["txt"] for i in range(len(shards))] == [content for _, content in members]


def test_names_are_split_as_webdataset_splits_them() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ["a.jpg", "a.b.jpg", "x/y.z/a.seg.PNG", "a", "x.y/a", "a.", "000/000.txt"]:
        base, extension = base_plus_ext(name)
        assert split_name(name) == (None if not extension else (base, extension.lower()))
    assert split_name("./a.jpg") == ("a", "jpg")


def test_every_odd_member_has_a_defined_outcome(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), type, link
            archive.addfile(info, io.BytesIO(content))

        add("folder", type=tarfile.DIRTYPE)
        add("a.txt", b"first a")
        add("b.txt", b"b")
        add("a.JPG", b"joins, though not adjacent")
        add("a.txt", b"second a")  # has a txt already: a new sample
        add("__meta__.json", b"no")
        add(".hidden.txt", b"no")
        add("x/._b.txt", b"no")
        add("../escape.txt", b"no")
        add("README", b"no")
        add("link.txt", type=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.txt", type=tarfile.LNKTYPE, link="a.txt")
        add("device.txt", type=tarfile.CHRTYPE)
        add("c.pkl", b"cos\nsystem\n(S'touch canary'\ntR.")
    shards = ShardSet(str(path))
    read = [shards.read(i) for i in range(len(shards))]
    assert [(s.key, dict(s.members)) for s in read] == [
        ("a", {"txt": b"first a", "jpg": b"joins, though not adjacent"}),
        ("b", {"txt": b"b"}),
        ("a", {"txt": b"second a"}),
        ("c", {"pkl": b"cos\nsystem\n(S'touch canary'\ntR."}),
    ]
    skipped = {"folder": 1, "hidden": 4, "no extension": 1, "link": 1, "hard link": 1, "device": 1}
    assert shards.skipped == skipped


# ---- damage


def test_bad_shards_give_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "zero.tar").touch()
    (tmp_path / "text.tar").write_bytes(b"this is not a tar " * 100)
    (tmp_path / "zip.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    tar(tmp_path / "none.tar", [])
    tar(tmp_path / "readme.tar", [("README", b"x")])
    good = tar(tmp_path / "good.tar", [("a.txt", b"x")])
    joined = Path(good).read_bytes() * 2
    (tmp_path / "joined.tar").write_bytes(joined)
    for name, message in {
        "missing": "not found",
        "zero": "is empty",
        "text": "is not a tar",
        "zip": "compressed .gzip.*unpack",
        "none": "holds no sample",
        "readme": "holds no sample .found: 1 x no extension",
        "joined": "behind the end mark at byte 1024",
    }.items():
        with pytest.raises(ShardError, match=message) as caught:
            ShardSet(str(tmp_path / f"{name}.tar"))
        assert f"{name}.tar" in str(caught.value)
        assert "\n" not in str(caught.value)
    folder = tmp_path / "folder.tar"
    folder.mkdir()
    with pytest.raises(ShardError, match=r"folder\.tar"):
        index_shard(str(folder))


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    tar(path, [(f"{'x' * 60}{i}.txt", bytes(range(200)) * (i + 1)) for i in range(4)], tarfile.PAX_FORMAT)
    data = path.read_bytes()
    end = 512 * max(i for i in range(len(data) // 512) if any(data[512 * i : 512 * i + 512])) + 512
    cut = tmp_path / "cut.tar"
    for length in sorted({*range(0, end + 512, 512), *range(100, end, 512), *range(511, end, 1023)}):
        cut.write_bytes(data[:length])
        if length >= end + 512:  # only the padding behind the end mark is gone
            assert len(_scan(cut)) == 4
            continue
        with pytest.raises(ShardError, match=r"cut off at byte|is empty"):
            _scan(cut)


def test_every_damaged_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    tar(path, [(f"{i}.txt", b"y" * 100 * i) for i in range(5)], tarfile.GNU_FORMAT)
    data = path.read_bytes()
    headers = [member.offset - 512 for member in _scan(path)]
    damaged = tmp_path / "damaged.tar"
    rng = np.random.default_rng(0)
    for header in headers:
        for place in [0, 1, 124, 134, 148, 156, *rng.integers(157, 512, 10).tolist()]:
            bytes_ = bytearray(data)
            bytes_[header + place] ^= 0x41
            damaged.write_bytes(bytes_)
            with pytest.raises(ShardError, match=r"damaged at byte|is not a tar"):
                _scan(damaged)
        zeroed = data[:header] + bytes(512) + data[header + 512 :]
        damaged.write_bytes(zeroed)
        with pytest.raises(ShardError, match="behind the end mark"):
            _scan(damaged)


def test_random_damage_never_shortens_in_silence(tmp_path: Path) -> None:
    """Whatever changes in the file: either it is refused, or all samples are still found (content was hit)."""
    path = tmp_path / "whole.tar"
    tar(path, [(f"{'n' * 120}{i}.txt", b"z" * 700) for i in range(4)], tarfile.PAX_FORMAT)
    data = path.read_bytes()
    sizes = [(m.offset, m.size) for m in _scan(path)]
    mutant = tmp_path / "mutant.tar"
    rng = np.random.default_rng(1)
    for _ in range(400):
        bytes_ = bytearray(data)
        at = int(rng.integers(0, len(data)))
        length = int(rng.choice([1, 4, 100, 600]))
        bytes_[at : at + length] = rng.bytes(len(bytes_[at : at + length]))
        mutant.write_bytes(bytes_[: int(rng.integers(1, len(data)))] if rng.random() < 0.2 else bytes_)
        try:
            found = _scan(mutant)
        except ShardError:
            continue
        assert [(m.offset, m.size) for m in found] == sizes


def many(path: Path, format: int) -> bytes:
    """So many small members that headers are checked in runs, with times that need an extended header under pax."""
    with tarfile.open(path, "w", format=format) as archive:
        for i in range(1500):
            info = tarfile.TarInfo(f"{i:06d}.txt")
            info.size, info.mtime = i % 1100, 1_700_000_000.25 + i
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return path.read_bytes()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_runs_of_plain_headers_are_what_tarfile_finds(tmp_path: Path, format: int) -> None:
    many(tmp_path / "a.tar", format)
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [tuple(member) for member in _scan(tmp_path / "a.tar")] == expected


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_damage_inside_a_run_of_plain_headers_is_found(tmp_path: Path, format: int) -> None:
    data = many(tmp_path / "a.tar", format)
    members = _scan(tmp_path / "a.tar")
    rng = np.random.default_rng(2)
    damaged = tmp_path / "damaged.tar"
    # Where the slow way begins, where it gives way to the quick one, inside of and between the quick one's runs.
    for number in [0, 1, 2, 5, 6, 700, 1023, 1024, 1025, 1499]:
        for extended in [0, 1024] if format == tarfile.PAX_FORMAT else [0]:
            header = members[number].offset - 512 - extended
            for place in [0, 50, 124, 134, 148, 153, 156, 345, *rng.integers(0, 512, 3).tolist()]:
                bytes_ = bytearray(data)
                bytes_[header + place] ^= 0x01
                damaged.write_bytes(bytes_)
                with pytest.raises(ShardError, match=rf"damaged at byte {header}: |is not a tar"):
                    _scan(damaged)
            damaged.write_bytes(data[:header] + bytes(512) + data[header + 512 :])
            with pytest.raises(ShardError, match=r"behind the end mark|followed by no member|zeros from byte"):
                _scan(damaged)
            damaged.write_bytes(data[: header + 300])
            with pytest.raises(ShardError, match=r"cut off at byte|is empty"):
                _scan(damaged)
    if format == tarfile.PAX_FORMAT:  # a record that does not say its own length
        at = members[900].offset - 1024
        damaged.write_bytes(data[:at] + b"9" + data[at + 1 :])
        with pytest.raises(ShardError, match=rf"damaged at byte {at - 512}"):
            _scan(damaged)


def test_reading_ahead_is_bounded_where_no_header_is_plain(tmp_path: Path) -> None:
    """Names with a prefix in turn with plain ones: what is read twice stays little."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(3000):
            info = tarfile.TarInfo(f"{i:06d}.txt" if i % 2 else f"{'n' * 90}/{'m' * 50}{i}.txt")
            info.size = 2000
            archive.addfile(info, io.BytesIO(bytes(2000)))

    class Counting(LocalReader):
        read = 0

        def pread(self, length: int, offset: int) -> bytes:
            Counting.read += length
            return super().pread(length, offset)

    fd = open_shard(str(path))
    assert len(scan(Counting(fd), str(path))[0]) == 3000
    os.close(fd)
    assert Counting.read < 3 * path.stat().st_size


def _scan(path: Path) -> list:
    fd = open_shard(str(path))
    try:
        return scan(fd, str(path))[0]
    finally:
        os.close(fd)


# ---- the stored index


def test_index_is_stored_beside_and_trusted_until_the_tar_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    first = index_shard(path)
    assert first.file == path + ".idx"
    scans = []
    monkeypatch.setattr(index_module, "scan", lambda *arguments: scans.append(1) or scan(*arguments))
    assert index_shard(path).digest == first.digest
    assert not scans
    Path(path + ".idx").write_bytes(Path(path + ".idx").read_bytes()[:-3])  # half a file is not believed
    assert index_shard(path).digest == first.digest
    assert len(scans) == 1
    tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("c.txt", b"3")])
    assert index_shard(path).samples == 3
    assert len(scans) == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".idx-")] == []


def test_without_a_right_to_write_the_index_goes_to_the_cache_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    real = index_module.tempfile.mkstemp
    refused = {str(tmp_path)}

    def mkstemp(prefix: str, dir: str) -> tuple[int, str]:
        if dir in refused:
            raise PermissionError(13, "Permission denied")
        return real(prefix=prefix, dir=dir)

    cache = tmp_path.parent / (tmp_path.name + "-cache")
    monkeypatch.setattr(index_module.tempfile, "mkstemp", mkstemp)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    index = index_shard(path)
    assert str(index.file).startswith(str(cache))
    assert index_shard(path) == index
    Path(str(index.file)).unlink()
    refused.add(str(cache / "mmssl" / "index"))
    shards = ShardSet(path)
    assert shards.shards[0].file is None
    assert pickle.loads(pickle.dumps(shards)).read(1).members == {"txt": b"2"}  # noqa: S301


def killed(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_the_indexing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = expand(write_shards(tmp_path, 12))
    monkeypatch.setattr(index_module, "_index_local", killed)
    with pytest.raises(ShardError, match=r"00000\.tar and 2 more: one of 2 processes was killed, .* --jobs 1$"):
        index_module.index_shards(paths, jobs=2)


def test_a_shard_that_changes_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("a.txt", b"1")])
    shards = ShardSet(path)
    tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    with pytest.raises(ShardError, match=r"a\.tar: changed since it was indexed"):
        shards.read(0)


def test_damaged_index_body_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("a.txt", b"1")])
    shards = ShardSet(path)
    stored = bytearray(Path(path + ".idx").read_bytes())
    stored[-1] ^= 1
    Path(path + ".idx").write_bytes(stored)
    with pytest.raises(ShardError, match=r"its index .* cannot be read .*delete it"):
        shards.read(0)


def test_fingerprint(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "a", 12)
    one = ShardSet(pattern).fingerprint
    assert "12 samples in 3 shards" in one
    assert ShardSet(write_shards(tmp_path / "b", 12)).fingerprint == one  # another folder, same shards
    assert ShardSet(list(reversed(expand(pattern)))).fingerprint != one
    assert ShardSet(expand(pattern)[:2]).fingerprint != one
    assert ShardSet(write_shards(tmp_path / "c", 12, prefix="x")).fingerprint != one


def test_a_program_ends_in_silence(tmp_path: Path) -> None:
    """Shards may still be open when Python has begun to empty its modules."""
    script = f"from mmssl.data import shards\nshards.kept = shards.ShardSet({write_shards(tmp_path, 4)!r})\n"
    script += "shards.kept.read(0)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmssl.data.descriptors._MOST", 16)  # of which half are for shards, two for each
    one, other = (ShardSet(write_shards(tmp_path / name, 20, shards=10)) for name in "ab")
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(20), *range(19, -1, -1)]:
        for shards in (one, other):
            assert shards.read(i).members["txt"] == f"text {i}".encode()
            assert len(os.listdir("/proc/self/fd")) - before <= 8
    assert one.held() + other.held() == 8
    del one, other, shards
    assert len(os.listdir("/proc/self/fd")) == before


def _read_with_few_files(folder: str, sets: int, taken: int, limit: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(taken)]
    shards = [ShardSet(f"{folder}/{number}") for number in range(sets)]
    for i in [*range(120), *range(119, -1, -1)]:
        for each in shards:
            assert each.read(i).members["txt"] == f"text {i}".encode()
    assert len(others) == taken


@pytest.mark.parametrize(
    ("taken", "limit"),
    [
        (0, (96, 96)),  # less than the 240 shards of all sets need: half of it is held
        (70, (96, 96)),  # others hold so many that the system refuses before that
        (0, (64, 1024)),  # the soft limit is raised
    ],
)
def test_sets_of_many_shards_share_few_files(tmp_path: Path, taken: int, limit: tuple[int, int]) -> None:
    for number in range(4):
        write_shards(tmp_path / f"{number}", 120, shards=60)
    process = multiprocessing.get_context("spawn").Process(
        target=_read_with_few_files, args=(str(tmp_path), 4, taken, limit)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def test_no_file_left_at_all_is_told_with_the_remedy(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, 4, shards=2))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resource, "setrlimit", lambda *arguments: None)  # as where the hard limit is as low
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            with pytest.raises(ShardError, match=r"00000\.tar: Too many open files .*raise ulimit -n"):
                shards.read(0)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert shards.read(0).members == {"txt": b"text 0"}


def test_an_index_is_looked_through_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that was closed for others is opened again without that, unless one of its files was replaced."""
    sums, headers = [], []
    real_crc, real_check = index_module.zlib.crc32, shards_module._check_some

    class Counting:
        @staticmethod
        def crc32(data: bytes) -> int:
            sums.append(len(data))
            return real_crc(data)

    monkeypatch.setattr("mmssl.data.descriptors._MOST", 16)
    shards = ShardSet(write_shards(tmp_path, 40, shards=20))
    monkeypatch.setattr(index_module, "zlib", Counting)
    monkeypatch.setattr(shards_module, "_check_some", lambda *args: headers.append(1) or real_check(*args))
    for _ in range(3):
        for i in range(40):
            assert shards.read(i).members["txt"] == f"text {i}".encode()
    assert len(sums) == len(headers) == 20
    stored = tmp_path / "00000.tar.idx"
    damaged = bytearray(stored.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "new").write_bytes(damaged)
    os.replace(tmp_path / "new", stored)
    with pytest.raises(ShardError, match=r"its index .* cannot be read .*delete it"):
        shards.read(0)


def test_an_index_in_memory_is_used_where_it_is(tmp_path: Path) -> None:
    """Read again and again, without a copy of its bytes for each time."""
    shards = ShardSet(write_shards(tmp_path, 40, shards=20))
    shards.shards[:] = [
        replace(index, file=None, body=Path(str(index.file)).read_bytes()[index.body_start :])
        for index in shards.shards
    ]
    assert shards.read(21).members["txt"] == b"text 21"
    assert shards._open[10].keys.obj is shards.shards[10].body  # type: ignore[union-attr]
