"""What `make` promises: exact versions without addresses, and one clear error where there is no Python to use."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_constraints_are_exact_versions_and_nothing_else():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_nothing_names_a_server():
    text = (ROOT / "Makefile").read_text() + (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?://|file:|--index|--find-links", text)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_without_a_python_make_says_what_to_do(tmp_path: Path):
    command = ["make", "-C", str(ROOT), "environment", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make: error: mmssl needs Python 3.11 or newer with the venv module; found: none." in done.stderr
    assert not (tmp_path / "venv").exists()
