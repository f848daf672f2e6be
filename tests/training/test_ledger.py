"""The ledger, and with it the order of samples on real ranks: killed, and gone on with on another number of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pairs import TINY

from mmssl.data.lines import append_line
from mmssl.training.callbacks.ledger import LedgerError, read_ledger

STEPS = 40


@pytest.fixture
def config(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> Path:
    """64 pairs, 8 a batch: an epoch is 8 batches, and one optimizer step takes two."""
    content: dict[str, Any] = {
        "model": {
            "class_path": "mmssl.MLM",
            "init_args": {"tokenizer": tokenizer_path, "backbone_options": TINY, "max_tokens": 32, "warmup_steps": 2},
        },
        "data": {"train": pair_shards, "batch_size": 8, "lanes": 4, "num_workers": 1},
        "trainer": {
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [{"class_path": "mmssl.SampleLedger"}],
        },
        "checkpoint": {"every_n_steps": 5},
    }
    path = tmp_path / "ledger.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@contextmanager
def fit(folder: Path, *args: str, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mmssl", "fit", "--run", str(folder), *args, "--trainer.devices", str(ranks)]
    with open(f"{folder}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finished(folder: Path, *args: str, ranks: int) -> dict[int, list[list[str]]]:
    with fit(folder, *args, ranks=ranks) as process:
        assert process.wait(timeout=400) == 0, Path(f"{folder}.log").read_text()[-3000:]
    return read_ledger(folder)


@pytest.mark.timeout(600)
def test_killed_on_two_ranks_and_gone_on_with_on_four(tmp_path: Path, config: Path) -> None:
    """Every global batch holds the samples of an uninterrupted run on one rank: nothing is repeated or left out."""
    whole = finished(tmp_path / "whole", "--config", str(config), ranks=1)
    assert list(whole) == list(range(1, STEPS + 1))
    assert all(len(batches) == 2 and all(len(keys) == 8 for keys in batches) for batches in whole.values())
    broken = tmp_path / "broken"
    with fit(broken, "--config", str(config), "--trainer.strategy", "ddp", ranks=2) as process:
        ledger, deadline = broken / "ledger" / "rank-00001.jsonl", time.monotonic() + 200
        while not ledger.exists() or '"step": 12' not in ledger.read_text():
            assert process.poll() is None, Path(f"{broken}.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)  # both ranks and their workers, wherever they are
    stopped = max(read_ledger(broken))
    assert 10 < stopped < STEPS
    assert finished(broken, "--resume", ranks=4) == whole
    starts = [line for line in map(json.loads, ledger.read_text().splitlines()) if "start" in line]
    assert [line["world"] for line in starts] == [2, 4]
    assert starts[1]["start"] <= stopped  # so steps were done again, and the ledger counts them once


def write(folder: Path, rank: int, *entries: Any, tail: str = "") -> None:
    (folder / "ledger").mkdir(exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "ledger" / f"rank-{rank:05d}.jsonl").write_text(lines + tail)


def start(name: str, at: int, world: int) -> dict[str, Any]:
    return {"start": at, "world": world, "id": name}


def line(step: int, *keys: str) -> dict[str, Any]:
    return {"step": step, "batch": step - 1, "keys": list(keys)}


def test_reading(tmp_path: Path) -> None:
    """Two ranks stop at step 3, one begins it; from the checkpoint of step 1 one rank goes on."""
    write(tmp_path, 0, start("a", 0, 2), line(1, "d"), line(2, "x"), line(3, "y"), start("b", 1, 1), line(2, "c", "b"))
    write(tmp_path, 1, start("a", 0, 2), line(1, "a"), line(2, "z"), tail='{"step": 3, "ba')
    assert read_ledger(tmp_path) == {1: [["a", "d"]], 2: [["b", "c"]]}
    write(tmp_path, 0, start("a", 0, 2), line(1, "d"), line(2, "x"), line(3, "y"))
    assert read_ledger(tmp_path) == {1: [["a", "d"]], 2: [["x", "z"]]}  # rank 1 never began step 3


def test_a_line_that_a_kill_cut_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path, 0, start("a", 0, 1), line(1, "d"), tail='{"step": 2, "ba')
    append_line(tmp_path / "ledger" / "rank-00000.jsonl", start("b", 1, 1), fresh=True)
    append_line(tmp_path / "ledger" / "rank-00000.jsonl", line(2, "c"))
    assert read_ledger(tmp_path) == {1: [["d"]], 2: [["c"]]}


def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match="No space left"):
        append_line("/dev/full", start("a", 0, 1))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger in"):
        read_ledger(tmp_path)
    write(tmp_path, 0, start("a", 0, 1), tail='{"st\n{"step": 1, "batch": 0, "keys": []}\n')
    with pytest.raises(LedgerError, match=r"rank-00000\.jsonl, line 2: is damaged"):
        read_ledger(tmp_path)
