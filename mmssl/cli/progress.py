"""Progress of commands that take long: a bar on a terminal, plain lines elsewhere; and figures for people."""

import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar on a terminal; elsewhere, such as in a batch job's log, the lines given to :meth:`step`."""

    def __init__(self, total: int | None, doing: str, unit: str) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: Any = tqdm(total=total, desc=doing, unit=f" {unit}", disable=not self._terminal, smoothing=0.1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._bar.close()

    def step(self, line: str = "", by: int = 1) -> None:
        """One thing more is done; the line is for where there is no bar."""
        self._bar.update(by)
        if line and not self._terminal:
            print(printable(line), flush=True)

    def trouble(self, line: str) -> None:
        """A line to standard error, wherever that goes."""
        with tqdm.external_write_mode(file=sys.stderr):
            print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text that any terminal takes: names in shards may hold bytes that are no characters."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def number(n: float) -> str:
    """1234567 as 1,234,567."""
    return f"{n:,.0f}"


def size(n: float) -> str:
    """A number of bytes as 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            break
        n /= 1000
    return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def table(rows: list[list[str]], right: str = "") -> str:
    """Rows in columns; ``right`` holds an "r" for each column that is set flush right, and "l" for the others."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = right.ljust(len(widths), "l")
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    )
