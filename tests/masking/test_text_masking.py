"""Hidden tokens by statistics: counts, the 80/10/10 split, uniformity, whole words."""

import numpy as np
import pytest

from mmssl.draws import Draws
from mmssl.masking.text import choose_tokens, hide_tokens

MASK, VOCAB = 4, 1000
ORDINARY = np.arange(5, VOCAB)


def text(words: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A text of words with the given lengths between two special tokens."""
    word_ids = np.concatenate([[-1], np.repeat(np.arange(len(words)), words), [-1]])
    ids = np.where(word_ids < 0, 2, 5 + np.arange(len(word_ids)) % (VOCAB - 5))
    return ids, word_ids


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 100])
def test_exactly_the_floor_is_hidden(ratio: float, length: int) -> None:
    _, word_ids = text([1] * length)
    exact = {(0.15, 100): 15, (0.3, 10): 3, (0.3, 100): 30, (0.5, 7): 3, (0.5, 10): 5}
    for seed in range(20):
        n = len(choose_tokens(word_ids, Draws(seed), ratio))
        assert n == max(1, int(np.floor(round(ratio * length, 9))))
        assert n == exact.get((ratio, length), n)


@pytest.mark.parametrize("strategy", ["random", "whole_word", "span"])
def test_special_tokens_are_never_hidden(strategy: str) -> None:
    _, word_ids = text([1, 3, 2, 1])
    for seed in range(500):
        assert (word_ids[choose_tokens(word_ids, Draws(seed), 0.5, strategy)] >= 0).all()


def test_no_ordinary_token_hides_nothing() -> None:
    assert len(choose_tokens(np.array([-1, -1]), Draws(0), 0.3)) == 0


@pytest.mark.parametrize("strategy", ["random", "whole_word", "span"])
def test_every_position_is_equally_likely(strategy: str) -> None:
    _, word_ids = text([1] * 20)
    hits = np.zeros(22)
    trials = 20_000
    for seed in range(trials):
        hits[choose_tokens(word_ids, Draws(seed), 0.3, strategy)] += 1
    expected = hits.sum() / 20
    # A span cannot begin before the text, so its edges are hidden a little less; the others are uniform.
    inner = hits[1:-1] if strategy != "span" else hits[10:-1]
    deviation = (inner - expected) / np.sqrt(trials * 0.3 * 0.7)
    assert np.abs(deviation).max() < (5 if strategy != "span" else 40)
    if strategy == "random":
        assert hits.sum() == trials * 6


@pytest.mark.parametrize("strategy", ["whole_word", "span"])
def test_whole_words_stay_whole_and_in_budget(strategy: str) -> None:
    _, word_ids = text([1, 4, 2, 1, 3, 1, 2, 5, 1])
    sizes = np.bincount(word_ids[word_ids >= 0])
    for seed in range(1000):
        hidden = choose_tokens(word_ids, Draws(seed), 0.3, strategy)
        words, parts = np.unique(word_ids[hidden], return_counts=True)
        assert (sizes[words] == parts).all()
        assert len(hidden) <= 6 or len(words) == 1


def test_spans_are_longer_than_chance() -> None:
    _, word_ids = text([1] * 100)

    def runs(strategy: str) -> float:
        count = sum(
            1 + int((np.diff(choose_tokens(word_ids, Draws(seed), 0.15, strategy)) > 1).sum()) for seed in range(300)
        )
        return 15 * 300 / count

    assert runs("span") > 2 * runs("random")


def test_eighty_ten_ten() -> None:
    ids, word_ids = text([1] * 100)
    masked = kept = swapped = 0
    swaps = []
    for seed in range(1000):
        out = hide_tokens(ids, word_ids, Draws(seed), ratio=0.3, mask_id=MASK, replacements=ORDINARY)
        assert (out.labels == ids[out.hidden]).all()
        untouched = np.setdiff1d(np.arange(len(ids)), out.hidden)
        assert (out.input_ids[untouched] == ids[untouched]).all()
        now = out.input_ids[out.hidden]
        masked += int((now == MASK).sum())
        kept += int((now == out.labels).sum())
        swaps.append(now[(now != MASK) & (now != out.labels)])
    total = 1000 * 30
    swapped = sum(map(len, swaps))
    sigma = np.sqrt(total * 0.1 * 0.9)
    assert abs(masked - 0.8 * total) < 5 * sigma * 1.5
    assert abs(kept - 0.1 * total) < 5 * sigma
    assert abs(swapped - 0.1 * total) < 5 * sigma
    # The random tokens are spread evenly over the ordinary vocabulary: tenths of it, five sigma.
    tenths = np.histogram(np.concatenate(swaps), bins=10, range=(5, VOCAB))[0]
    assert np.abs(tenths - swapped / 10).max() < 5 * np.sqrt(swapped / 10)


def test_draws_depend_on_the_key_alone() -> None:
    ids, word_ids = text([1, 2, 3] * 10)
    first, again, other = (
        hide_tokens(ids, word_ids, Draws(1, 2, seed), ratio=0.3, mask_id=MASK, replacements=ORDINARY)
        for seed in (3, 3, 4)
    )
    assert (first.input_ids == again.input_ids).all()
    assert (first.input_ids != other.input_ids).any()
