"""One SLURM for all tests, on this machine; and a small run to train on it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from cluster import REQUIRED, CannotStart, Slurm, shared_slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Skipped where SLURM cannot be had, but never in continuous integration."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the one that the workers share
    try:
        with shared_slurm(base / "slurm") as running:
            yield running
    except CannotStart as error:
        if REQUIRED:
            pytest.fail(f"{error}; in CI the tests on SLURM must run")
        pytest.skip(f"{error}; MMSSL_SLURM=required makes this a failure")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_path: str, pair_shards: str) -> Path:
    """The folder to submit from, with tiny.yaml: 60 steps of a joint model, a checkpoint every 20, throttled."""
    from pairs import TINY
    from runs import SMALL

    monkeypatch.chdir(tmp_path)
    model = {
        "tokenizer": tokenizer_path,
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": TINY,
        "max_tokens": 12,
        **SMALL,
    }
    config = {
        "model": {"class_path": "mmssl.MMM", "init_args": model},
        "data": {"train": pair_shards, "val": pair_shards, "batch_size": 8, "num_workers": 0, "val_samples": 8},
        "trainer": {
            "max_steps": 60,
            "val_check_interval": 1000,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [{"class_path": "mmssl.SampleLedger"}, {"class_path": "throttle.Throttle"}],
        },
        "checkpoint": {"every_n_steps": 20},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path
