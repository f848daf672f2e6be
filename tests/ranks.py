"""Real runs on real ranks, with callbacks from disturb.py, for the tests of what clusters do to them."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pairs import TINY

TESTS = Path(__file__).parent


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
    folder: Path, config: dict[str, Any], *args: str, callbacks: list[Any], ranks: int = 2, seconds: float = 180
) -> tuple[int, str]:
    """Run ``mmssl fit`` with these callbacks, each (class, arguments); returns its exit code and what was said."""
    named = [{"class_path": name, "init_args": arguments} for name, arguments in callbacks]
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], "callbacks": named}}))
    command = [sys.executable, "-m", "mmssl", "fit", "--config", str(path), *args, "--run", str(folder)]
    command += ["--trainer.devices", str(ranks)]
    if ranks > 1 and "--config" not in args:
        command += ["--trainer.strategy", "ddp"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with open(f"{folder}.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        code = process.wait(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, Path(f"{folder}.log").read_text()
