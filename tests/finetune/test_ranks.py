"""Two ranks train and measure as one process does, where the last batch is padded and a rank may have no sample."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import write_labelled

TESTS = Path(__file__).parents[1]


def run(out: Path, shard: str, devices: int, val_samples: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("ddp_classify.py")), str(out), shard]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(
        [*command, str(devices), str(val_samples)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("val_samples", [3, 13])
def test_two_ranks_equal_one_process(val_samples: int, tmp_path: Path) -> None:
    shard = write_labelled(tmp_path / "a.tar", 32)
    one, two = (run(tmp_path / f"{n}.pt", shard, n, val_samples) for n in (1, 2))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert one["metrics"]["val/accuracy"] * val_samples == pytest.approx(
        round(one["metrics"]["val/accuracy"] * val_samples)
    )  # padding would make it a part of 8 or 16
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, atol=1e-5, rtol=1e-4)
