"""What saving costs in memory: the bounds that docs/checkpoints.md states."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_checkpoint.py"

# In multiples of the checkpoint, over what the process had; imports and buffers are some 20 MB of these 240.
BOUNDS = {
    ("one file, at once", 0): 0.2,
    ("one file, in the background (first)", 0): 1.2,
    ("one file, in the background (later)", 0): 0.2,
    ("two ranks, sharded, at once", 0): 0.2,
    ("two ranks, sharded, in the background (first)", 1): 0.7,
    ("two ranks, sharded, in the background (later)", 1): 0.2,
    ("two ranks, FSDP with checkpoint: full", 0): 1.3,
    ("mmssl consolidate", 0): 1.3,
}


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_on_top_stays_within_what_is_stated(tmp_path: Path):
    said = subprocess.run(
        [sys.executable, str(TOOL), "240", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    pattern = re.compile(r"^(.+?) +rank (\d): .* memory +([\d.-]+) x$", re.MULTILINE)
    found = {(name, int(rank)): float(times) for name, rank, times in pattern.findall(said)}
    assert found.keys() >= BOUNDS.keys(), said
    assert {what: found[what] for what, bound in BOUNDS.items() if found[what] > bound} == {}, said
