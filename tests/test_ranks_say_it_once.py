"""What a run on two ranks prints: every line once."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pairs import TINY
from runs import SMALL

from mmssl.pretrained.whole import latest_checkpoint


def start(folder: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "mmssl", "fit", "--config", "two.yaml", "--run", "runs/a", *options]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "WANDB"))}
    environment |= {"HOME": str(folder), "NETRC": "netrc"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if line.strip()]


@pytest.mark.timeout(700)  # four starts of torch and Lightning, on a machine that does other things
def test_two_ranks_say_everything_once(tmp_path: Path, pair_shards: str, image_run: Path):
    """A first start from an earlier run's weights, then a second over a damaged checkpoint with another rate."""
    model = {"backbone": "vit_tiny_patch16_224", "backbone_options": TINY, "init_from": str(image_run), **SMALL}
    trainer = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    config = {
        "model": {"class_path": "mmssl.MAE", "init_args": model},
        "data": {"train": pair_shards, "val": pair_shards, "batch_size": 8, "num_workers": 0, "val_samples": 8},
        "trainer": {**trainer, "accelerator": "cpu", "devices": 2, "strategy": "ddp"},
        "checkpoint": {"every_n_steps": 2, "keep": 9},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    first = start(tmp_path)
    assert sum("started from" in line for line in first) == 1
    assert sum("W&B is offline" in line for line in first) == 1
    assert sum("training MAE" in line for line in first) == 1
    assert [line for line, times in Counter(first).items() if times > 1] == []
    assert not any("warn" in line.lower() for line in first), first

    newest = latest_checkpoint(tmp_path / "runs/a")
    newest.write_bytes(newest.read_bytes()[:-1000])
    second = start(tmp_path, "--resume", "--model.lr=0.001", "--trainer.max_steps=6")
    assert sum("falling back" in line for line in second) == 1
    assert sum("changed from step 2 on" in line for line in second) == 2
    assert sum("from step 2 to step 6" in line for line in second) == 1
    assert [line for line, times in Counter(second).items() if times > 1] == []
