"""Which tokens of a text are hidden, and what stands in their place.

Axes: n tokens of one text, special tokens included; m of them hidden.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from mmssl.draws import Draws

TextStrategy = Literal["random", "whole_word", "span"]
Ids = NDArray[np.int64]


class HiddenTokens(NamedTuple):
    """``input_ids`` [n] after corruption, ``hidden`` [m] ascending positions, ``labels`` [m] what stood there."""

    input_ids: Ids
    hidden: Ids
    labels: Ids


def check_text_strategy(strategy: str) -> None:
    if strategy not in get_args(TextStrategy):
        raise ValueError(f"text masking {strategy!r} is unknown; use one of {', '.join(get_args(TextStrategy))}")


def choose_tokens(word_ids: Ids, draws: Draws, ratio: float, strategy: TextStrategy = "random") -> Ids:
    """Positions to hide among the tokens with ``word_ids`` >= 0 (special tokens have -1 and are never hidden).

    With M such tokens the budget is max(1, floor(ratio * M)).

    - random: exactly the budget, uniformly without replacement (Devlin et al. 2019, section 3.1).
    - whole_word: words in random order, each taken whole if it still fits; the first is taken in any case
      (the whole-word variant of the BERT repository).
    - span: runs of words whose length is geometric with p = 0.2, at most 10 (SpanBERT, Joshi et al. 2020), each
      word taken whole while it fits.

    Returns ascending positions; empty when the text has no ordinary token.
    """
    candidates = np.flatnonzero(word_ids >= 0)
    if len(candidates) == 0:
        return candidates
    # 1e-9: 0.3 * 10 must give 3 although 0.3 is stored a little below.
    budget = max(1, int(ratio * len(candidates) + 1e-9))
    if strategy == "random":
        return np.sort(candidates[draws.permutation(len(candidates))[:budget]])

    # Words are runs of equal id; a run ends where the id changes.
    starts = np.flatnonzero(np.diff(word_ids[candidates], prepend=-1))
    words = np.split(candidates, starts[1:])
    taken: list[int] = []
    seen = np.zeros(len(words), bool)

    def take(word: int) -> None:
        seen[word] = True
        if not taken or len(taken) + len(words[word]) <= budget:
            taken.extend(words[word])

    if strategy == "whole_word":
        for word in draws.permutation(len(words)):
            take(int(word))
            if len(taken) >= budget:
                break
    else:
        for first in draws.permutation(len(words)):
            # Inverse of the geometric distribution's cumulative function, 1 - 0.8^k, cut at ten words.
            length = min(10, 1 + int(np.log1p(-draws.one()) / np.log(0.8)))
            for word in range(int(first), min(int(first) + length, len(words))):
                if not seen[word]:
                    take(word)
            if len(taken) >= budget:
                break
    return np.sort(np.array(taken, np.int64))


def hide_tokens(
    ids: Ids,
    word_ids: Ids,
    draws: Draws,
    *,
    ratio: float,
    strategy: TextStrategy = "random",
    mask_id: int,
    replacements: Ids,
    keep: float = 0.1,
    swap: float = 0.1,
) -> HiddenTokens:
    """BERT's corruption: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        ids: [n] token ids.  word_ids: [n] word of each token, -1 for special tokens.
        ratio: part of the ordinary tokens to hide, in (0, 1].
        replacements: ids that a random token is drawn from, uniformly (the vocabulary without special tokens).
        keep, swap: parts that stay and that become a random token.
    """
    hidden = choose_tokens(word_ids, draws, ratio, strategy)
    labels = ids[hidden].astype(np.int64)
    fate = draws.uniform(len(hidden))
    random_ids = replacements[draws.integers(len(replacements), len(hidden))]
    input_ids = ids.astype(np.int64)
    input_ids[hidden] = np.where(fate < keep, labels, np.where(fate < keep + swap, random_ids, mask_id))
    return HiddenTokens(input_ids, hidden, labels)
