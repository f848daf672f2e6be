"""How many files this process may hold open for shards, over all sets of shards together.

Half of what the system allows (``ulimit -n``); the other half is for everybody else in the process.  When that is
reached, the soft limit is first raised towards the hard one, and then whoever holds the most gives back what it used
the longest time ago.  Where the system refuses all the same, because others hold many files, half of ours are given
back and it is asked again.
"""

import errno
import resource
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar, runtime_checkable

_MOST = 8192  # to which the soft limit is raised
_Made = TypeVar("_Made")


@runtime_checkable
class Holder(Protocol):
    """Something that holds files open only to be quicker."""

    def held(self) -> int:
        """Number of descriptors."""
        ...

    def give_back(self) -> None:
        """Let go of what was unused the longest.  May come from any thread."""
        ...


_holders: "list[weakref.ref[Holder]]" = []


def register(holder: Holder) -> None:
    """Let a holder take part for as long as it lives."""
    _holders[:] = [known for known in _holders if known() is not None] + [weakref.ref(holder)]


def make_room() -> None:
    """To be called before another file is opened that is to be held."""
    held = [(holder.held(), holder) for holder in _living()]
    total = sum(number for number, _ in held)
    if total >= allowed() and total >= _raised():
        max(held, key=lambda one: one[0])[1].give_back()


def opened(open_one: Callable[[], _Made]) -> _Made:
    """What ``open_one`` returns; where no descriptor is left, files are given back and it is called again.

    Raises:
        OSError: what ``open_one`` raises, with the remedy in words if there are too many open files.
    """
    try:
        return open_one()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    _raised()
    for holder in _living():
        for _ in range(-(-holder.held() // 2)):
            holder.give_back()
    try:
        return open_one()
    except OSError as error:
        if error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise OSError(
                errno.EMFILE, f"Too many open files (this process may have {limit}; raise ulimit -n)"
            ) from None
        raise


def allowed() -> int:
    """Descriptors that may be held for shards."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, min(_MOST if limit == resource.RLIM_INFINITY else limit, _MOST) // 2)


def _raised() -> int:
    """What is allowed after the soft limit was raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # systems that allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return allowed()


def _living() -> list[Holder]:
    return [holder for known in list(_holders) if (holder := known()) is not None]
