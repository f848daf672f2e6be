"""The cache of remote pieces: whole or absent, fetched once a node, within its limit."""

import errno
import multiprocessing
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest

from mmssl.data import cache as cache_module
from mmssl.data.cache import Cache


def stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(".mmssl"))


def gigabytes(size: int) -> float:
    return size / 1e9


def filled(cache: Cache, name: str, size: int = 1000) -> bytes:
    return cache.get(name, size, lambda: name[:1].encode() * size).pread(size, 0)


def forget_process_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(cache_module, "_registry", {})


def test_a_piece_is_fetched_once_and_then_read(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    for _ in range(3):
        assert filled(cache, "a") == b"a" * 1000
        assert cache.get("a", 1000, lambda: pytest.fail("fetched again")).pread(10, 995) == b"a" * 5
    assert (cache.fetches, cache.fetched_bytes) == (1, 1000)
    assert cache.has("a")
    assert not cache.has("b")


def test_a_stored_piece_of_another_size_is_not_believed(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    filled(cache, "a")
    stored(tmp_path)[0].write_bytes(b"half")
    assert filled(cache, "a") == b"a" * 1000
    assert cache.fetches == 2


def test_threads_share_a_fetch(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    begun = []

    def fetch() -> bytes:
        begun.append(1)
        time.sleep(0.2)
        return b"x" * 10

    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(cache.get("x", 10, fetch).pread(10, 0))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == [1]
    assert results == [b"x" * 10] * 5


def test_an_error_reaches_everybody_and_is_not_remembered(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))

    def fail() -> bytes:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            cache.get("a", 1000, fail)
    assert filled(cache, "a") == b"a" * 1000


# ---- limits


def test_the_limit_holds_and_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), gigabytes(5000))
    (tmp_path / "precious.txt").write_text("not ours")
    held = cache.get("a", 1000, lambda: b"a" * 1000)
    for name in "bcde":
        filled(cache, name)
        time.sleep(0.01)
    assert len(stored(tmp_path)) == 5
    filled(cache, "b")  # used again: it stays
    time.sleep(0.01)
    filled(cache, "f")
    assert cache.has("b")
    assert cache.has("f")
    assert not cache.has("a")
    assert not cache.has("c")
    assert held.pread(1000, 0) == b"a" * 1000  # deleted, but still open here
    for number in range(200):
        filled(cache, f"{number}")
        assert sum(path.stat().st_size for path in stored(tmp_path)) <= 5000
    assert (tmp_path / "precious.txt").read_text() == "not ours"


def test_a_folder_that_is_done_with_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        cache = Cache(str(tmp_path / f"{number}"))
        filled(cache, "a")
        cache.close()
    assert len(os.listdir("/proc/self/fd")) == before
    filled(cache, "a")  # begins anew
    assert cache.fetches == 1
    cache.close()
    cache.close()


def test_what_lies_in_the_folder_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        filled(Cache(str(tmp_path)), f"{number}")
    (tmp_path / "lock").unlink()
    forget_process_state(monkeypatch)
    filled(Cache(str(tmp_path), gigabytes(3000)), "new")
    assert sum(path.stat().st_size for path in stored(tmp_path)) <= 3000


def test_a_piece_above_the_limit_is_read_and_said(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), gigabytes(500))
    with pytest.warns(UserWarning, match=r"limit .* is less than one piece .*raise cache_limit_gb"):
        assert filled(cache, "a") == b"a" * 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert filled(cache, "b") == b"b" * 1000  # said once
    assert stored(tmp_path) == []
    with pytest.raises(ValueError, match="cache_limit_gb is 0"):
        Cache(str(tmp_path), 0)


# ---- a folder that cannot be used


def test_without_a_folder_reading_goes_on_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"Not a directory; going on without a cache.*MMSSL_CACHE"):
        assert not cache.usable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert filled(cache, "a") == b"a" * 1000
        assert filled(cache, "a") == b"a" * 1000
    assert cache.fetches == 1  # held in memory


def test_on_a_full_disk_old_pieces_give_way_then_it_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(str(tmp_path))
    for number in range(10):
        filled(cache, f"{number}")
    real, room = os.write, 4

    def write(fd: int, data: bytes) -> int:
        if len(stored(tmp_path)) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    room = 9
    assert filled(cache, "a") == b"a" * 1000
    assert cache.has("a")
    assert cache.usable
    room = -1
    with pytest.warns(UserWarning, match="No space left on device; going on without a cache"):
        assert filled(cache, "b") == b"b" * 1000
    assert not cache.usable
    assert not any(path.name.startswith(".tmp") for path in tmp_path.iterdir())
    monkeypatch.setattr(cache_module, "_WITHOUT", 0.0)
    monkeypatch.setattr(os, "write", real)
    cache._shared().broken_until = 0.0  # a minute later
    filled(cache, "c")
    assert cache.has("c")


def test_the_default_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMSSL_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = Cache()
    assert cache.folder == str(tmp_path / f"mmssl-cache-{os.getuid()}")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    Path(cache.folder).mkdir(0o700)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert not cache.usable
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "mine"))
    assert Cache().folder == str(tmp_path / "mine")
    assert Cache(str(tmp_path / "given")).folder == str(tmp_path / "given")


def test_the_default_folder_is_not_a_link_and_nobody_else_may_write_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMSSL_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Path(Cache().folder)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="is no folder"):
        assert not Cache().usable
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    forget_process_state(monkeypatch)
    with pytest.warns(UserWarning, match="others may write to it"):
        assert not Cache().usable
    folder.chmod(0o700)
    (folder / "lock").symlink_to(tmp_path / "precious")
    forget_process_state(monkeypatch)
    with pytest.warns(UserWarning, match="going on without a cache"):
        assert not Cache().usable
    assert not (tmp_path / "precious").exists()


# ---- several processes


def _killed_while_writing(folder: str, ready: str) -> None:
    def hang(fd: int) -> None:
        Path(ready).touch()
        time.sleep(100)

    os.fsync = hang
    Cache(folder).get("a", 1 << 20, lambda: b"a" * (1 << 20))


def _killed_while_fetching(folder: str, ready: str) -> None:
    def hang() -> bytes:
        Path(ready).touch()
        time.sleep(100)
        return b""

    Cache(folder).get("a", 1 << 20, hang)


@pytest.mark.parametrize("victim", [_killed_while_writing, _killed_while_fetching])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_killed_process_leaves_nothing_that_is_believed(tmp_path: Path, victim: object, method: str) -> None:
    folder, ready = tmp_path / "cache", tmp_path / "ready"
    context = multiprocessing.get_context(method)
    process = context.Process(target=victim, args=(str(folder), str(ready)))  # type: ignore[attr-defined]
    process.start()
    while not ready.exists():
        time.sleep(0.01)
    temporary = [path for path in folder.iterdir() if path.name.startswith(".tmp")]
    assert len(temporary) == (victim is _killed_while_writing)
    cache = Cache(str(folder))
    assert cache.usable
    assert all(path.exists() for path in temporary), "its writer lives"
    assert not cache.has("a")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert filled(cache, "a", 1 << 20) == b"a" * (1 << 20)
    later = multiprocessing.get_context("spawn").Process(target=_use, args=(str(folder),))  # a new process tidies up
    later.start()
    later.join()
    assert later.exitcode == 0
    assert not any(path.exists() for path in temporary)
    assert len(stored(folder)) == 1


def _use(folder: str) -> None:
    assert Cache(folder).usable


def _fetch_many(folder: str, log: str, first: int) -> None:
    cache = Cache(folder)

    def fetch(number: int) -> bytes:
        with open(log, "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.01)
        return bytes([number]) * 5000

    for i in range(40):
        number = (i + first) % 40
        piece = cache.get(f"{number}", 5000, lambda number=number: fetch(number))
        assert piece.pread(5000, 0) == bytes([number]) * 5000


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_fetch_every_piece_once(tmp_path: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    arguments = [(str(tmp_path / "cache"), str(tmp_path / "log"), first) for first in (0, 0, 3, 20)]
    processes = [context.Process(target=_fetch_many, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(40))


def _fill(folder: str, first: int) -> None:
    cache = Cache(folder, gigabytes(20_000))
    for number in range(first, first + 60):
        assert filled(cache, f"{number}") == f"{number}"[:1].encode() * 1000


def test_processes_keep_the_limit_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(str(tmp_path / "c"), first)) for first in (0, 100, 200)]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        if (tmp_path / "c").exists():
            sizes = []
            for path in stored(tmp_path / "c"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            largest = max(largest, sum(sizes))
    assert [process.exitcode for process in processes] == [0] * 3
    assert 10_000 < largest <= 23_000  # one that is about to be written may stand for each process
