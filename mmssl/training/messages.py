"""Short lines for a person, from a run that goes on."""

import sys


def warn(line: str) -> None:
    print(f"mmssl: warning: {line}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
