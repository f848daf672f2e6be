"""What a caption says, and how hard each of its words is to see: the one place for both rules.

A caption is ``<ink> <Unicode name> on <paper>[, <style>]``:

    white greek small letter omega with tonos on dark blue, bold serif

Every whole word of it (in the tokenizer's sense, punctuation included) has one of four kinds:

    easy       the ink's and the paper's colour
    middling   script or sort of sign (greek, arrow, braille), case (capital, small, of letters only) and style
               (regular, bold, italic, serif, sans, mono; in mathematical letters also script, fraktur, ...)
    hard       every other word of the name: which letter or sign it is
    other      function words and those that hardly carry anything (letter, with, and, sign), punctuation
"""

import unicodedata
from typing import NamedTuple

from mmssl.data.tokenizer import whole_words

MAX_NAME_WORDS = 12

# Far apart in sRGB; every drawn colour is jittered by up to JITTER per channel.
COLOURS = {
    "white": (243, 243, 243),
    "black": (14, 14, 14),
    "gray": (128, 128, 128),
    "red": (222, 30, 34),
    "orange": (250, 138, 16),
    "yellow": (250, 226, 42),
    "green": (30, 160, 58),
    "blue": (40, 100, 240),
    "dark blue": (16, 22, 104),
    "purple": (136, 36, 176),
    "pink": (250, 156, 196),
    "brown": (112, 64, 26),
}
JITTER = 12
MIN_CONTRAST = 2.0  # ratio of relative luminances (WCAG 2), so that the shape shows in every colour channel

# What the .cls integer counts; labels.json lists them in this order.
SCRIPTS = (
    *("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic", "lao", "coptic", "tifinagh", "nko"),
    *("ogham", "lisu", "canadian", "braille", "box", "modifier", "combining"),  # so far: the name's first word
    *("arrow", "mathematical", "number", "punctuation", "symbol", "other"),
)
_NAMED_FIRST = set(SCRIPTS[:18])

_SORT = {"syllabics", "drawings", "arrows", "digit", "numeral", "fraction", "ligature", "apl", "domino", "tile"}
_SORT |= {"hexagram", "tetragram", "integral", "arrow", "mathematical"} | _NAMED_FIRST
_CASE = {"capital", "small"}
_STYLE = {"regular", "bold", "italic", "serif", "sans", "mono"}
_MATH_STYLE = _STYLE | {"script", "fraktur", "double", "struck", "monospace", "black"}
_FUNCTION = {"letter", "with", "and", "of", "on", "for", "to", "or", "the", "in", "as", "by", "from"}
_FUNCTION |= {"sign", "symbol", "mark", "form", "pattern", "-"}


class Style(NamedTuple):
    """What a drawing shows of its font's style; None where fonts that differ in it draw the very same."""

    weight: str | None  # "regular", "bold"
    slant: str | None  # "upright", "italic"
    family: str | None  # "serif", "sans", "mono"

    def words(self) -> list[str]:
        said = [self.weight] if self.weight == "bold" or (self.weight and self.slant != "italic") else []
        said += ["italic"] if self.slant == "italic" else []
        return [word for word in [*said, self.family] if word]


def name_of(character: str) -> str | None:
    """The lower-case Unicode name, or None for what is not to be drawn (no name, control, private, space, long)."""
    if unicodedata.category(character)[0] in "CZ":
        return None
    name = unicodedata.name(character, "").lower()
    return name if 1 <= len(name.split()) <= MAX_NAME_WORDS else None


def script_of(character: str) -> str:
    """One of SCRIPTS, from the Unicode name and category."""
    words = unicodedata.name(character).lower().replace("-", " ").split()
    if words[0] in _NAMED_FIRST:
        return words[0]
    if {"arrow", "arrows", "harpoon"} & set(words):
        return "arrow"
    category = unicodedata.category(character)
    if words[0] == "mathematical" or category == "Sm":
        return "mathematical"
    return {"N": "number", "P": "punctuation", "S": "symbol"}.get(category[0], "other")


def case_of(character: str) -> str | None:
    """ "capital", "small", or None where there is no case."""
    return {"Lu": "capital", "Lt": "capital", "Ll": "small"}.get(unicodedata.category(character))


def states_own_style(name: str) -> bool:
    """Whether the name tells a style ("mathematical bold small a"), which the font's would contradict."""
    return name.startswith("mathematical ") and bool(_MATH_STYLE & set(whole_words(name)))


def compose(character: str, ink: str, paper: str, style: Style) -> tuple[str, list[tuple[str, str]]]:
    """The caption and its whole words in order, each with its kind."""
    name = name_of(character)
    assert name is not None
    said = [] if states_own_style(name) else style.words()
    caption = f"{ink} {name} on {paper}" + (f", {' '.join(said)}" if said else "")
    kinds = [(word, "easy") for word in whole_words(ink)]
    kinds += [(word, _kind(word, character, name)) for word in whole_words(name)]
    kinds += [("on", "other"), *((word, "easy") for word in whole_words(paper))]
    kinds += [(",", "other"), *((word, "middling") for word in said)] if said else []
    return caption, kinds


def _kind(word: str, character: str, name: str) -> str:
    if word in _FUNCTION:
        return "other"
    if word in _SORT:
        return "middling"
    if word in _CASE:
        is_letter = unicodedata.category(character)[0] == "L" or script_of(character) == "modifier"
        return "middling" if is_letter else "hard"
    return "middling" if states_own_style(name) and word in _MATH_STYLE else "hard"


def _luminance(rgb: tuple[int, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _papers() -> dict[str, list[str]]:
    found = {}
    for ink, rgb in COLOURS.items():
        darker = {paper: other for paper, other in COLOURS.items() if _luminance(other) < _luminance(rgb)}
        if papers := [paper for paper, other in darker.items() if _contrast(rgb, other) >= MIN_CONTRAST]:
            found[ink] = papers
    return found


#: For each ink the papers it stands out from.  The ink is the lighter of the two, as of chalk on a board: with light
#: and dark swapped at random a model must first learn that shape is not brightness, longer than the demo lasts.
PAPERS = _papers()
