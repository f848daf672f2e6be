"""Batches made from in-memory samples by an objective's own prepare."""

from collections.abc import Callable

import pairs
import pytest

from mmssl.draws import Draws
from mmssl.types import Batch


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    def make(module: object, n: int = 4, seed: int = 0, train: bool = True, valid: list[bool] | None = None) -> Batch:
        prepare = module.prepare(train=train)  # type: ignore[attr-defined]
        examples = [prepare.sample(pairs.sample(i), Draws(seed, i), 0) for i in range(n)]
        batch = prepare.collate(examples, valid)
        batch.keys = [f"memory/{i}" for i in range(n)]
        return batch

    return make


@pytest.fixture(scope="session")
def tiny() -> dict[str, object]:
    return dict(pairs.TINY)


@pytest.fixture(scope="session")
def make_caption() -> Callable[[int], str]:
    return pairs.caption
