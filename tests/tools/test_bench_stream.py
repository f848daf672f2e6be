"""The benchmark of the stream runs to its end and prints its tables; how fast is no test's business."""

import re
import subprocess
import sys
from pathlib import Path

import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))


def test_it_runs_and_prints_its_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "bench_stream.py"), "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tables = {}
    for part in re.split(r"^\*\*", done.stdout, flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("**")
        tables[title] = [line.split("|")[1].strip() for line in rest.splitlines() if line.startswith("|")][2:]
    ways = ["webdataset, PIL, torchvision", "mmssl", "mmssl, normalised on the host"]
    assert tables == {
        "Photographs, crop 0.9 to 1 (open_clip), in one process": [*ways, "bare loop"],
        "Photographs, crop 0.2 to 1 (MAE), in one process": [*ways, "bare loop"],
        "The demo's pictures (48 to 48 pixels), in one process": [*ways, "bare loop"],
        "Photographs, crop 0.2 to 1 (MAE), 1 worker": ways,
        "Text, decoded only, in one process": ["webdataset", "mmssl"],
        "320 texts of 20 bytes in few and in many shards, 64 lanes, in one process": [
            "mmssl, 4 shards",
            "mmssl, 16 shards",
        ],
        "Memory of a worker over 64 samples": ["4", "16", "32", "48", "64"],
    }


def test_both_sides_normalise_alike() -> None:
    from bench_data import rivals
    from torchvision.transforms import Normalize

    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    expected = Normalize(rivals.MEAN, rivals.STD)(pixels.float() / 255)
    torch.testing.assert_close(rivals.normalise(pixels), expected, atol=1e-6, rtol=1e-6)


def test_photographs_are_the_same_every_time_and_as_large_as_photographs() -> None:
    from bench_data.photos import photograph

    made = [photograph(seed) for seed in range(4)]
    assert made[0] == photograph(0)
    assert all(25_000 < len(data) < 80_000 for data in made)
