"""Short lines for a person, from a run that goes on."""

import sys

from mmssl.pretrained.whole import first_line

__all__ = ["first_line", "warn"]


def warn(line: str) -> None:
    print(f"mmssl: warning: {line}", file=sys.stderr, flush=True)
