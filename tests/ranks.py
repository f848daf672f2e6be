"""Real runs on real ranks, with callbacks from disturb.py, for the tests of what clusters do to them."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from forks import ends, fork
from lightning.pytorch.utilities import rank_zero_only
from pairs import TINY

from mmssl.cli import main

TESTS = Path(__file__).parent
_PORTS = itertools.count()  # of this process


def tiny_config(tokenizer: str, shards: str, steps: int) -> dict[str, Any]:
    """MLM on 64 pairs, 8 a batch, every step logged; no validation."""
    return {
        "model": {
            "class_path": "mmssl.MLM",
            "init_args": {"tokenizer": tokenizer, "backbone_options": TINY, "max_tokens": 32, "warmup_steps": 2},
        },
        "data": {"train": shards, "batch_size": 8, "lanes": 4, "num_workers": 1},
        "trainer": {"max_steps": steps, "log_every_n_steps": 1, "accelerator": "cpu", "logger": False},
    }


def fit(
    folder: Path,
    config: dict[str, Any],
    *args: str,
    callbacks: list[Any],
    ranks: int = 2,
    launched: bool = False,
    seconds: float = 120,
) -> tuple[list[int], str]:
    """Run ``mmssl fit`` with these callbacks, each (class, arguments); returns exit codes by rank and what was said.

    The ranks are forks, which start at once, or with ``launched`` one new process that starts the others itself; its
    exit code is then the only one.
    """
    named = [{"class_path": name, "init_args": arguments} for name, arguments in callbacks]
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], "callbacks": named}}))
    command = ["fit", "--config", str(path), *args, "--run", str(folder), "--trainer.devices", str(ranks)]
    if ranks > 1 and "--config" not in args:
        command += ["--trainer.strategy", "ddp"]
    with open(f"{folder}.log", "wb") as log:
        if launched:
            environment = {**os.environ, "PYTHONPATH": str(TESTS)}
            whole = [sys.executable, "-m", "mmssl", *command]
            pids = [subprocess.Popen(whole, stdout=log, stderr=log, env=environment, start_new_session=True).pid]
        else:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            pids = [fork(partial(_rank, rank, ranks, address, command, log.fileno())) for rank in range(ranks)]
    try:
        codes = ends(pids, seconds)
    finally:
        for pid in pids:  # and their workers
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    return codes, Path(f"{folder}.log").read_text()


def _free_port() -> int:
    """Where nobody listens, and nobody will: below what the system gives out, and other tests count from elsewhere."""
    while True:
        port = 10_000 + (37 * os.getpid() + next(_PORTS)) % 20_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _rank(rank: int, ranks: int, address: dict[str, str], command: list[str], log: int) -> None:
    """In a fork: be this rank of a run whose ranks something else started, as torchrun does."""
    os.setpgid(0, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if ranks > 1:
        os.environ |= {**address, "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
        rank_zero_only.rank = rank  # type: ignore[attr-defined]  # read from the environment at import
    code = main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
