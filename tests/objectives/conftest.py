"""A small tokenizer, in-memory samples and batches for the objectives."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl.data.tokenizer import train_tokenizer
from mmssl.draws import Draws
from mmssl.types import Batch, Sample

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "grey": (130, 130, 130)}
TINY = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 2, "num_heads": 3}}


def caption(i: int) -> str:
    names = list(COLOURS)
    return f"a {names[i % 4]} square with {names[(i * 7 + i // 4) % 4]} paper under it, number {i % 10}"


def sample(i: int, size: int = 32) -> Sample:
    names = list(COLOURS)
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = COLOURS[names[(i * 7 + i // 4) % 4]]
    pixels[size // 4 : size // 2 + i % 10, size // 4 : 3 * size // 4] = COLOURS[names[i % 4]]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return Sample(f"{i:06d}", "memory.tar", {"png": data.getvalue(), "txt": caption(i).encode()})


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([caption(i) for i in range(100)], vocab_size=120, path=path)
    return str(path)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    def make(module: object, n: int = 4, seed: int = 0, train: bool = True, valid: list[bool] | None = None) -> Batch:
        prepare = module.prepare(train=train)  # type: ignore[attr-defined]
        examples = [prepare.sample(sample(i), Draws(seed, i), 0) for i in range(n)]
        batch = prepare.collate(examples, valid)
        batch.keys = [f"memory/{i}" for i in range(n)]
        return batch

    return make


@pytest.fixture(scope="session")
def tiny() -> dict[str, object]:
    return dict(TINY)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def make_caption() -> Callable[[int], str]:
    return caption
