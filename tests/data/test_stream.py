import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from toy_stream import ToyImage, ToyText, number, same, write_shards
from toy_stream import number as number_of_key
from webdataset import TarWriter

from mmssl.data.budget import Budget, TooManyBadSamples
from mmssl.data.loader import Loader, default_workers
from mmssl.data.order import Order
from mmssl.data.shards import ShardSet
from mmssl.data.stream import EvalSet, Source, TrainStream
from mmssl.data.tar import ShardError
from mmssl.draws import Draws
from mmssl.types import Batch, Sample


def stream(pattern: str | list[str], **options: object) -> TrainStream:
    arguments = {"seed": 7, "batch_size": 8, "lanes": 8, **options}
    prepare = arguments.pop("prepare", ToyText())
    return TrainStream([Source("train", ShardSet(pattern))], prepare, **arguments)  # type: ignore[arg-type]


def take(loader: Iterable[Batch], batches: int) -> list[Batch]:
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, batches))
    finally:
        iterator.close()  # type: ignore[attr-defined]


def with_bad(folder: Path, samples: int, bad: set[int], text: bytes = b"bad") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with TarWriter(str(folder / f"{shard}.tar")) as writer:
            for i in range(shard * samples // 2, (shard + 1) * samples // 2):
                writer.write({"__key__": f"{i:06d}", "txt": text if i in bad else f"text {i}".encode()})
    return str(folder / "{0..1}.tar")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("pictures"), 50, pictures=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("texts"), 100)


def test_a_batch(pictures: str) -> None:
    batch = stream(pictures, prepare=ToyImage()).batch(3)
    assert batch.index == 3
    assert batch.size == 8
    assert batch.image is not None
    assert batch.image.pixels.shape == (8, 3, 16, 16)
    assert batch.valid is None
    assert batch.notes == {}
    assert all(key.startswith("0000") and ".tar/" in key for key in batch.keys)


def test_every_epoch_holds_every_sample_once(texts: str) -> None:
    data = stream(texts)
    keys = [key for i in range(25) for key in data.batch(i).keys]
    assert sorted(map(number, keys[:100])) == list(range(100))
    assert sorted(map(number, keys[100:])) == list(range(100))
    assert keys[:100] != keys[100:]


def test_draws_change_with_epoch_and_seed_but_not_with_ranks(texts: str) -> None:
    def hidden(data: list[TrainStream], first: int) -> dict[int, int]:
        found = {}
        for part, index in itertools.product(data, range(first, first + 25)):
            batch = part.batch(index)
            assert batch.text is not None
            starts = batch.text.cu_seqlens[:-1]
            found.update(zip(map(number, batch.keys), (batch.text.hidden - starts).tolist(), strict=True))
        return found

    one = hidden([stream(texts, batch_size=4, lanes=4)], 0)
    assert hidden([stream(texts, batch_size=4, lanes=4, rank=r, world=4) for r in range(4)], 0) == one
    assert hidden([stream(texts, batch_size=4, lanes=4)], 25) != one
    assert hidden([stream(texts, batch_size=4, lanes=4, seed=8)], 0) != one


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_workers_share_global_batches_without_overlap(pictures: str, world: int) -> None:
    whole = stream(pictures, prepare=ToyImage())
    for i in [0, 5, 6, 7]:
        parts = [stream(pictures, prepare=ToyImage(), rank=rank, world=world).batch(i) for rank in range(world)]
        keys = [key for part in parts for key in part.keys]
        expected = whole.batch(i)
        assert sorted(keys) == sorted(expected.keys)
        assert expected.image is not None
        pixels = dict(zip(expected.keys, expected.image.pixels, strict=True))
        if len(set(keys)) == len(keys):  # a batch over an epoch's end may hold a sample in two views
            for part in parts:
                assert part.image is not None
                assert all(torch.equal(p, pixels[k]) for k, p in zip(part.keys, part.image.pixels, strict=True))


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (3, "fork"), (3, "spawn")])
def test_any_number_of_workers_gives_the_same_batches_from_any_start(
    pictures: str, workers: int, method: str | None
) -> None:
    reference = stream(pictures, prepare=ToyImage())
    # 50 samples, 8 a batch: the epoch ends inside batch 6.
    loader = Loader(
        stream(pictures, prepare=ToyImage()),
        workers=workers,
        start_method=method,
        first=lambda: 4,  # type: ignore[arg-type]
    )
    got = take(loader, 5)
    assert [batch.index for batch in got] == [4, 5, 6, 7, 8]
    assert all(same(batch, reference.batch(batch.index)) for batch in got)


@pytest.mark.parametrize("number", [0, 1, 12_375_000, 10**12])
def test_any_batch_reads_its_own_samples_alone(texts: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on in epoch 999,999 costs what the first batch costs: as many reads, no walk through the order."""
    read: list[int] = []
    original = ShardSet.read
    monkeypatch.setattr(ShardSet, "read", lambda self, index, alone=False: read.append(index) or original(self, index))
    data, calls = stream(texts), Counter[str]()
    window = Order._window
    monkeypatch.setattr(Order, "_window", lambda *args: calls.update(["window"]) or window(*args))
    batch = data.batch(number)
    assert sorted(read) == sorted(number_of_key(key) for key in batch.keys)
    assert calls["window"] == data.orders[0].lanes  # one a lane: none is passed through on the way


def test_pickled_streams_agree(texts: str) -> None:
    data = stream(texts)
    assert same(pickle.loads(pickle.dumps(data)).batch(11), data.batch(11))  # noqa: S301


def test_windows_sum_the_counts_of_an_optimizer_step(texts: str) -> None:
    got = take(Loader(stream(texts), workers=0, accumulate=lambda: 3), 6)
    for start in (0, 3):
        total = sum(batch.counts["text"] for batch in got[start : start + 3])
        assert all(batch.window == {"text": total} for batch in got[start : start + 3])


# ---- mixtures


def test_mixture_of_sources(tmp_path: Path) -> None:
    sizes = {"a": 30, "b": 50}
    sources = [
        Source(name, ShardSet(write_shards(tmp_path / name, size, prefix=name)), weight)
        for (name, size), weight in zip(sizes.items(), (3.0, 1.0), strict=True)
    ]
    data = TrainStream(sources, ToyText(), seed=0, batch_size=4, lanes=4)
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for i in range(100):
        batch = data.batch(i)
        names = {key.rpartition("/")[2][0] for key in batch.keys}
        assert len(names) == 1
        seen[names.pop()] += [number(key) for key in batch.keys]
    assert {name: len(values) for name, values in seen.items()} == {"a": 300, "b": 100}
    for name, size in sizes.items():  # every source has its own epochs
        for start in range(0, len(seen[name]) - size + 1, size):
            assert sorted(seen[name][start : start + size]) == list(range(size))


# ---- bad samples


def test_bad_samples_are_replaced_counted_and_named(tmp_path: Path) -> None:
    bad = {3, 40, 77}
    pattern = with_bad(tmp_path, 100, bad)
    listed = tmp_path / "bad.jsonl"
    data = stream(pattern, bad_samples=str(listed))
    batches = [data.batch(i) for i in range(25)]
    assert sum(batch.notes.get("bad/toy", 0) for batch in batches) == 6
    keys = [number(key) for batch in batches for key in batch.keys]
    assert not bad & set(keys)
    assert len(keys) == 200
    assert Counter(keys[:100]).total() - len(set(keys[:100])) == 3  # three substitutes
    again = stream(pattern)
    assert all(same(batch, again.batch(batch.index)) for batch in reversed(batches))
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {(line["shard"], line["key"], line["reason"], line["epoch"]) for line in lines} == {
        (str(tmp_path / f"{i // 50}.tar"), f"{i:06d}", "toy", epoch) for i in bad for epoch in (0, 1)
    }


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_over_the_budget_the_worst_shards_are_named(tmp_path: Path, workers: int) -> None:
    """At the same batch, however many workers there are."""
    pattern = with_bad(tmp_path, 100, {i for i in range(50) if i % 2})
    batches = iter(Loader(stream(pattern), workers=workers, budget=Budget(0.01, "bad.jsonl")))
    message = (
        r"15 of 55 samples .*budget of 1\.00% .*; worst shards: .*0\.tar: 15 x toy; all are listed in bad\.jsonl\."
    )
    with pytest.raises(TooManyBadSamples, match=message):
        take(batches, 1000)


def test_budgets_are_parts_of_all_samples(tmp_path: Path) -> None:
    pattern = with_bad(tmp_path, 100, {1})
    assert len(take(Loader(stream(pattern), workers=0, budget=Budget(1.0)), 200)) == 200
    assert len(take(Loader(stream(pattern), workers=0, budget=Budget(0.011)), 200)) == 200  # 16 of 1600 are allowed
    with pytest.raises(TooManyBadSamples, match="10 of"):
        take(Loader(stream(pattern), workers=0, budget=Budget(0.0099)), 200)
    with pytest.raises(TooManyBadSamples, match="1 of"):
        take(Loader(stream(pattern), workers=0, budget=Budget(0.0)), 200)


def test_every_validation_is_counted_by_itself(tmp_path: Path) -> None:
    """One bad sample of 64 is met in every pass: it is still one."""
    data = EvalSet(ShardSet(with_bad(tmp_path, 64, {1})), ToyText(), seed=0, batch_size=8)
    loader = Loader(data, workers=0, budget=Budget(0.01))
    for _ in range(12):
        assert len(list(loader)) == 8
        assert (loader.budget.seen, loader.budget.bad.total()) == (64, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_list_of_bad_samples_is_told(tmp_path: Path) -> None:
    data = stream(with_bad(tmp_path, 100, {3}), bad_samples="/dev/full")
    with pytest.raises(ShardError, match="cannot name a bad sample in /dev/full: No space left on device; free space"):
        take(Loader(data, workers=1), 13)


def test_ranks_agree_about_the_budget() -> None:
    """No rank stops alone: 30 bad of 1,000 at one of four ranks are less than 1 % of all."""
    mine = [(1000, 30, [(("a.tar", "toy"), 30)]), *[(1000, 0, [])] * 3]
    budget = Budget(0.01, alone=False)
    budget.count(Batch(index=0, keys=["k"] * 1000, bad=[("a.tar", "toy")] * 30))
    budget.check(lambda own: [own, *mine[1:]])
    with pytest.raises(TooManyBadSamples, match=r"60 of 4060 .*worst shards: a\.tar: 60 x toy"):
        budget.check(lambda own: [own, mine[0], *mine[2:]])


def test_nothing_usable_stops_at_once(tmp_path: Path) -> None:
    data = stream(with_bad(tmp_path, 100, set(range(100))))
    with pytest.raises(TooManyBadSamples, match="16 samples in a row cannot be used"):
        data.batch(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_arrive_as_one_line(tmp_path: Path, workers: int) -> None:
    loader = Loader(stream(with_bad(tmp_path, 100, set(range(100)))), workers=workers)
    with pytest.raises(TooManyBadSamples, match=r"16 samples in a row .*worst shards") as caught:
        take(loader, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_during_the_run_stops_it(tmp_path: Path, workers: int) -> None:
    data = stream(write_shards(tmp_path, 20, shards=1))
    write_shards(tmp_path, 24, shards=1)
    with pytest.raises(ShardError, match="changed since it was indexed"):
        take(Loader(data, workers=workers), 1)


class Faulty(ToyText):
    def sample(self, sample: Sample, draws: Draws, index: int) -> tuple[bytes, int]:
        raise ZeroDivisionError("a fault of the program")


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_of_the_program_are_not_taken_for_bad_samples(texts: str, workers: int) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        take(Loader(stream(texts, prepare=Faulty()), workers=workers), 1)
    assert "while preparing sample" in str(caught.value) + str(getattr(caught.value, "__notes__", ""))


# ---- evaluation


@pytest.mark.parametrize(
    ("samples", "limit", "count"), [(100, None, 100), (100, 37, 37), (100, 1000, 100), (3, None, 3)]
)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_sample_once(
    tmp_path: Path, samples: int, limit: int | None, count: int, world: int
) -> None:
    shards = ShardSet(write_shards(tmp_path, samples))
    seen, sizes = [], []
    for rank in range(world):
        data = EvalSet(shards, ToyText(), seed=0, batch_size=8, limit=limit, rank=rank, world=world)
        batches = [b for b in data if isinstance(b, Batch)]
        assert len(batches) == len(data)
        sizes.append([batch.size for batch in batches])
        for batch in batches:
            assert batch.valid is not None
            assert batch.text is not None
            assert len(batch.text.hidden) == batch.valid.sum()
            seen += [number(key) for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]
    assert all(part == sizes[0] == [8 // world] * len(sizes[0]) for part in sizes)
    assert sorted(seen) == [i * samples // count for i in range(count)]


def test_evaluation_repeats_itself_whatever_the_workers(pictures: str) -> None:
    def make(workers: int) -> Loader:
        return Loader(EvalSet(ShardSet(pictures), ToyImage(), seed=3, batch_size=8), workers=workers)

    alone, helped = make(0), make(3)
    first = list(alone)
    assert len(first) == len(alone) == 7
    for other in (list(alone), list(helped), list(helped)):  # the second pass with the same workers
        assert all(same(a, b) for a, b in zip(first, other, strict=True))
    helped.close()


def test_a_bad_sample_has_no_weight_in_evaluation(tmp_path: Path) -> None:
    data = EvalSet(
        ShardSet(with_bad(tmp_path, 20, {4})), ToyText(), seed=0, batch_size=4, bad_samples=str(tmp_path / "b.jsonl")
    )
    for _ in range(2):
        batches = [b for b in data if isinstance(b, Batch)]
        assert [b.valid.sum().item() for b in batches if b.valid is not None] == [4, 3, 4, 4, 4]
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 1


def test_refusals(texts: str) -> None:
    with pytest.raises(ValueError, match=r"8 lanes .* to 3 ranks; run on 1, 2, 4, 8"):
        stream(texts, world=3)
    with pytest.raises(ValueError, match="budget is 2"):
        Budget(2.0)
    with pytest.raises(ValueError, match="val_batch_size is 6"):
        EvalSet(ShardSet(texts), ToyText(), seed=0, batch_size=6, world=4)
    with pytest.raises(ValueError, match="val_samples is 0"):
        EvalSet(ShardSet(texts), ToyText(), seed=0, batch_size=8, limit=0)


# ---- processes


class Signals(ToyText):
    """Reports from inside a worker."""

    def sample(self, sample: Sample, draws: Draws, index: int) -> tuple[bytes, int]:
        numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        ignored = all(signal.getsignal(s) == signal.SIG_IGN for s in numbers)
        free = signal.pthread_sigmask(signal.SIG_BLOCK, []) <= {signal.SIGTERM}
        return f"{os.getpid()} {int(ignored and free)} {torch.get_num_threads()}".encode(), 0


def reports(batch: Batch) -> list[str]:
    assert batch.text is not None
    return bytes(batch.text.input_ids[: batch.text.cu_seqlens[1]].tolist()).decode().split()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_do_not_inherit_handlers_and_survive_a_foreign_term(texts: str, method: str) -> None:
    called = []
    old = {s: signal.signal(s, lambda *_: called.append(1)) for s in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        loader = Loader(stream(texts, prepare=Signals()), workers=1, start_method=method)  # type: ignore[arg-type]
        batches = iter(loader)
        pid, fine, threads = reports(next(batches))
        assert int(pid) != os.getpid()
        assert (fine, threads) == ("1", "1")
        for s in ("INT", "USR1", "USR2", "TERM", "TERM"):
            subprocess.run(["kill", f"-{s}", pid], check=True)  # from another process, as a cluster does
        assert [reports(next(batches))[0] for _ in range(20)] == [pid] * 20
        assert not called
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
        batches.close()  # type: ignore[attr-defined]
        with pytest.raises(ProcessLookupError):  # ended and collected: no zombie
            os.kill(int(pid), 0)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


class Term(ToyText):
    """Reports whether a TERM would end the worker at once."""

    def sample(self, sample: Sample, draws: Draws, index: int) -> tuple[bytes, int]:
        free = signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return str(int(free and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)).encode(), 0


def test_without_sigwaitinfo_a_term_ends_a_worker(texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "sigwaitinfo")  # macOS has none
    monkeypatch.setattr(threading, "excepthook", lambda _: os._exit(1))  # no thread dies in the worker
    loader = Loader(stream(texts, prepare=Term()), workers=1, start_method="fork")
    assert all(reports(batch) == ["1"] for batch in take(loader, 3))


class Noted(ToyText):
    """Writes down which batches the workers have begun."""

    def sample(self, sample: Sample, draws: Draws, index: int) -> tuple[bytes, int]:
        Path(os.environ["NOTED"], str(index)).touch()
        return super().sample(sample, draws, index)


def test_the_next_window_is_prepared_while_one_is_trained(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTED", str(tmp_path))
    loader = Loader(stream(texts, prepare=Noted()), workers=2, prefetch=1, start_method="fork", accumulate=lambda: 5)
    batches = iter(loader)
    next(batches)
    until = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 11 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    begun = {int(path.name) for path in tmp_path.iterdir()}
    batches.close()  # type: ignore[attr-defined]
    assert begun == set(range(11))  # this window, the next, and one to share them out evenly; no more


def test_a_failing_run_ends_its_workers_at_once(tmp_path: Path) -> None:
    """The loader is still held by a traceback when Python exits: multiprocessing ends the workers with one TERM."""
    pattern = write_shards(tmp_path, 40)
    script = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from test_stream import Loader, stream
batches = iter(Loader(stream({pattern!r}), workers=2))
next(batches)
1 / 0
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "ZeroDivisionError" in ended.stderr
    assert ended.returncode == 1


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert [default_workers(n) for n in (1, 2, 4, 8, 16)] == [8, 7, 3, 1, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    assert default_workers(4) == 8


def test_data_never_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = b"cposix\nsystem\n(S'touch canary'\ntR."
    buffer = io.BytesIO()
    torch.save([1], buffer)
    with TarWriter("evil.tar") as writer:
        for i in range(8):
            sample = {"__key__": f"{i:06d}", "txt": b"x", "pkl": evil, "pickle": evil, "pyd": evil}
            writer.write({**sample, "pth": buffer.getvalue()})
    assert ShardSet("evil.tar").read(0).members["pkl"] == evil
    stream("evil.tar").batch(0)
    assert not (tmp_path / "canary").exists()
