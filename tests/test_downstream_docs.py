"""What the README and docs/downstream.md tell a person to type runs as it stands there."""

import io
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from pairs import COLOURS, picture
from PIL import Image as PILImage

from mmssl.cli import main

ROOT = Path(__file__).parents[1]


def blocks(page: str, heading: str | None = None) -> list[str]:
    """The Python of a page, or of one section of it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading is not None:
        text = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def home(joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with runs/demo, as after ``make demo``."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(joint_run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(count: int = 8) -> list[PILImage.Image]:
    return [PILImage.open(io.BytesIO(picture(i, 40))) for i in range(count)]


def test_the_readme(home: Path):
    encode, tune = blocks("README.md", "Use the backbone")
    names: dict[str, Any] = {"pictures": opened()}
    exec(encode, names)
    assert names["image"].pooled.shape == (8, 48)
    assert names["pair"].tokens.shape[0] == 2

    lines = [line for line in tune.splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 10, "the README promises ten lines"
    torch.manual_seed(0)
    losses: list[float] = []

    class Loader:
        """Eight pictures and their colours, thirty times; notes the loss of the round before."""

        def __iter__(self) -> Any:
            for _ in range(30):
                yield opened(), torch.arange(8) % 4
                losses.append(float(names["loss"]))

    names = {"loader": Loader(), "classes": 4}
    exec(tune, names)
    assert losses[-1] < 0.5 * losses[0], "it does not learn"
    assert all(p.grad is None for n, p in names["backbone"].named_parameters() if ".text." in n)


PAGE = """
import pathlib, torch
from PIL import Image
pictures = [Image.new("RGB", (40, 50), colour) for colour in ("red", "green", "blue")]
texts = ["a red square", "a green square with grey paper under it", "blue"]
for block in pathlib.Path("blocks").read_text().split("# ---"):
    exec(block)
assert content.shape[1] == 48
assert larger.patch_embed.grid_size == (12, 12)
assert classifier(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
assert torch.allclose(summary, backbone.encode_pair(pictures, texts).pooled, atol=1e-6)
assert torch.equal(again.encode_text(texts).pooled, backbone.encode_text(texts).pooled)
wanted = backbone.encode_pair(pictures, texts)
assert torch.allclose(torch.tensor(pooled), wanted.pooled, atol=1e-5)
assert torch.allclose(torch.tensor(tokens), wanted.tokens, atol=1e-5)
grain = Image.effect_noise((301, 97), 90).convert("RGB")
assert abs(square(grain).astype(int) - backbone.pixels(grain)[0].numpy()).max() <= 1
inputs = {name: torch.from_numpy(rows) for name, rows in words.items()}
assert torch.allclose(graph(pixels=torch.from_numpy(pixels), **inputs)[0], wanted.tokens, atol=1e-6)
"""


def test_the_page(home: Path, onnx_export: Path):
    """In a process of its own, as a reader's."""
    shutil.copytree(onnx_export, "exports/demo")
    Path("blocks").write_text("# ---".join(blocks("docs/downstream.md")))
    subprocess.run([sys.executable, "-c", PAGE], check=True)


def test_the_tutorial(home: Path, capsys: pytest.CaptureFixture[str]):
    """docs/finetune_plain.py as it stands, on a small run and sheets of paper: it learns their colours."""
    assert main(["export", "runs/demo", "--out", "exports/demo"]) == 0
    (home / "data/demo").mkdir(parents=True)
    for name, count in {"train": 60, "val": 20}.items():
        with webdataset.TarWriter(f"data/demo/pairs-{name}-000000.tar") as writer:
            for i in range(count):
                sheet = PILImage.new("RGB", (40 + i, 40), list(COLOURS.values())[i % 4])
                writer.write({"__key__": f"{i:06d}", "jpg": sheet, "txt": f"{list(COLOURS)[i % 4]} paper, number {i}"})
    names = runpy.run_path(str(ROOT / "docs/finetune_plain.py"))
    assert names["classes"] == ["blue", "green", "grey", "red"]
    assert names["fine_tuned"] > 0.9
    assert "60 pictures to train on, 20 to test" in capsys.readouterr().out


def test_the_tutorial_is_cells():
    """Every cell begins as the editors that know the percent format expect it, and those of text are text alone."""
    cells = (ROOT / "docs/finetune_plain.py").read_text().split("# %%")
    assert cells[0] == ""
    texts = [cell.removeprefix(" [markdown]\n") for cell in cells if cell.startswith(" [markdown]\n")]
    assert len(texts) >= 8
    assert all(line.startswith("#") for text in texts for line in text.strip().splitlines())
    for cell in cells[1:]:
        if not cell.startswith(" [markdown]"):
            assert cell.startswith("\n")
            compile(cell, "cell", "exec")
