"""The labels of plain files, as words in folders' names and tables, become what a .cls holds.

A label is a list of words: one for ``class``, any number for ``multilabel`` and ``regression``.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mmssl.curation.sources import in_order
from mmssl.finetune.targets import Kind

_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?")  # pandas writes 3 as 3.0 where a column has gaps
_MOST_WORDS = 0.01  # among the numbers of a regression; those that are left are bad samples


@dataclass(frozen=True)
class Numbering:
    """What a label becomes.

    Args:
        kind: of the target; None where no module has one.
        names: of the classes, by number; None where labels are numbers already.
        whose: who says so, for messages.
        none_of_them: what a label without words becomes; None for no label.
    """

    kind: Kind | None
    names: list[str] | None
    whose: str
    none_of_them: str | None = None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names or [])}

    def text(self, words: list[str]) -> str | None:
        """A label as a .cls holds it; None for no label, or one with words that have no number."""
        if not words:
            return self.none_of_them
        if self.names is None:
            return " ".join(words if self.kind == "regression" else map(_whole, words))
        numbers = [self._number(word) for word in words]
        return None if None in numbers else " ".join(map(str, numbers))

    def check(self, what: str, said: Counter[str]) -> None:
        """Raises ValueError if ``what`` has words without a number; of a regression, too many that are none."""
        if self.kind == "regression":
            wrong = {word: count for word, count in said.items() if not _is_number(word)}
            if sum(wrong.values()) > _MOST_WORDS * said.total():
                raise ValueError(
                    f"{what}: {sum(wrong.values())} of {said.total()} labels are no numbers ({_shown(wrong)}), but "
                    "target is regression; correct them"
                )
        elif self.names is None:
            self._check_numbers(what, said)
        elif unknown := [word for word in said if self._number(word) is None]:
            known = f"{_shown(self.names)}{', ...' if len(self.names) > 5 else ''}"
            raise ValueError(
                f"{what}: the labels {_shown(in_order(unknown))} are not among the {len(self.names)} of {self.whose} "
                f"({known}); correct them"
            )

    def _check_numbers(self, what: str, said: Counter[str]) -> None:
        if words := [word for word in said if not _is_number(word)]:
            raise ValueError(
                f"{what}: the labels {_shown(sorted(words))} are not among the numbers of {self.whose}; correct them"
            )
        if self.kind is not None and (parts := [word for word in said if not _WHOLE.fullmatch(word)]):
            raise ValueError(
                f"{what}: the labels {_shown(sorted(parts))} are not whole numbers; set model.target to regression, "
                "name all in data.classes if they are classes' names, or correct them"
            )

    def note(self, said: Counter[str]) -> str:
        """What a person is told of labels that are left out; "" if there is none."""
        wrong = [word for word in said if not _is_number(word)] if self.kind == "regression" else []
        return f"; labels that are no numbers, and will be bad samples: {_shown(wrong)}" if wrong else ""

    def _number(self, word: str) -> int | None:
        return self._numbers.get(word, self._numbers.get(_whole(word)))


def words_of(label: str, kind: Kind | None) -> list[str]:
    """The words of a table's cell: those between spaces and commas where a label may be several."""
    if kind in ("multilabel", "regression"):
        return label.replace(",", " ").split()
    return [stripped] if (stripped := label.strip()) else []


def named(what: str, said: Counter[str], kind: Kind | None, folders: bool) -> list[str] | None:
    """The names of the classes, in order, from all words that ``what`` has; None where they are numbers, or none.

    Args:
        folders: the words are folders' names, which are names even where they look like numbers.

    Raises:
        ValueError: for numbers with words between them.
    """
    if kind == "regression" or not said:
        return None
    words = [word for word in said if not _is_number(word)]
    if folders or len(words) == len(said):
        return in_order(said)
    if words:
        numbers, are = len(said) - len(words), "is" if len(words) == 1 else "are"
        raise ValueError(
            f"{what}: {numbers} of {len(said)} different labels are numbers, but {_shown(sorted(words))} {are} not; "
            "correct them, or name all in data.classes if they are names"
        )
    return None


def span(said: Iterable[str]) -> list[int] | None:
    """The smallest and the largest of labels that are whole numbers; None if one is not, or there is none."""
    numbers = [int(found[1]) if (found := _WHOLE.fullmatch(word)) else None for word in said]
    whole = [number for number in numbers if number is not None]
    return [min(whole), max(whole)] if whole and len(whole) == len(numbers) else None


def _whole(word: str) -> str:
    """3.0 as 3; all else as it is."""
    return found[1] if (found := _WHOLE.fullmatch(word)) else word


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _shown(words: Iterable[str]) -> str:
    return ", ".join(map(repr, list(words)[:5]))
