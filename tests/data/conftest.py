"""The loader's halves of real objectives, for the tests of odd samples."""

import pytest
from odd import DECODER
from pairs import TINY

import mmssl
from mmssl.types import Prepare


@pytest.fixture(scope="session")
def prepares(tokenizer_path: str) -> dict[str, Prepare]:
    """The loader's halves of three real, tiny objectives."""
    pairs = mmssl.MMM(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=32, **DECODER)  # type: ignore[arg-type]
    images = mmssl.MAE("vit_tiny_patch16_224", TINY, flip=False, **DECODER)  # type: ignore[arg-type]
    texts = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=32)
    return {"pairs": pairs.prepare(True), "images": images.prepare(True), "texts": texts.prepare(True)}
