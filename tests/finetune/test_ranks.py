"""Two ranks train and measure as one process does, where the last batch is padded and a rank may have no sample."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_classify import CASES
from labelled import write_labelled

TESTS = Path(__file__).parents[1]
Found = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> tuple[Found, Found]:
    """What every case came to in one process, and on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    shard = write_labelled(folder / "a.tar", 32)
    script = Path(__file__).with_name("ddp_classify.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    found = []
    for devices in (1, 2):
        out = folder / f"{devices}.pt"
        command = [sys.executable, str(script), str(out), shard, tokenizer_path, str(devices)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(out, weights_only=True))
    return found[0], found[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_equal_one_process(case: tuple[str, int], one_and_two: tuple[Found, Found]) -> None:
    kind, samples = case
    one, two = (found[case] for found in one_and_two)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
    measured = {"class": "accuracy", "multilabel": "mAP", "regression": "r2", "retrieval": "recall/image_to_text@5"}
    assert f"val/{measured.get(kind, 'accuracy')}" in one["metrics"]
    if kind == "class":  # padding would make it a part of 8 or 16
        hits = one["metrics"]["val/accuracy"] * samples
        assert hits == pytest.approx(round(hits), abs=1e-4)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, atol=1e-5, rtol=1e-4)
