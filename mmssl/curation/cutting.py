"""Cutting long documents into pieces, at the ends of sentences where there are some, and never within a word."""

import re

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
# A word is a run without blanks; where writing has no blanks, every Chinese or Japanese character counts as one, with
# the punctuation that follows it.
_WORD = re.compile(rf"[{_CJK}][^\w\s]*|[^\s{_CJK}]+")
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]」』]*$")


def count_words(text: str) -> int:
    """Number of words: runs without blanks, and single Chinese or Japanese characters."""
    return sum(1 for _ in _WORD.finditer(text))


def cut_text(text: str, max_words: int) -> list[str]:
    """Pieces of at most ``max_words`` words that make up the text; blanks where it is cut are dropped.

    A piece ends with a sentence or a paragraph if one ends in its second half, else behind any word.

    Raises:
        ValueError: for ``max_words`` below 1.
    """
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}; give the largest number of words of a piece, at least 1")
    words = list(_WORD.finditer(text))
    pieces, first = [], 0
    while len(words) - first > max_words:
        last = first + max_words  # the word that begins the next piece
        for stop in range(last, first + max_words // 2, -1):
            between = text[words[stop - 1].end() : words[stop].start()]
            if _SENTENCE_END.search(words[stop - 1].group()[-20:]) or between.count("\n") > 1:
                last = stop
                break
        pieces.append(text[words[first].start() : words[last - 1].end()])
        first = last
    if first < len(words):
        pieces.append(text[words[first].start() : words[-1].end()])
    return pieces
