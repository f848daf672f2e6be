"""Ranks as forks of the test's own process: they start in a moment, where two new interpreters take seconds."""

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def fork(function: Callable[[], object]) -> int:
    """Run ``function`` in a child; its process id.  The child never comes back into pytest."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function()
        code = 0
    except BaseException:  # noqa: BLE001  # whatever it is, this process ends here
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start(world: int, meet: Path, function: Callable[[int], object]) -> list[int]:
    """Fork ``world`` ranks that meet in the file ``meet`` and call ``function(rank)``; their process ids."""

    def rank_of(rank: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
            function(rank)
            dist.destroy_process_group()

        return run

    meet.unlink(missing_ok=True)
    return [fork(rank_of(rank)) for rank in range(world)]


def ends(children: list[int], seconds: float = 60) -> list[int]:
    """The exit codes of children (of signals: negative); one that still runs after ``seconds`` is killed and fails."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in set(children) - codes.keys():
                os.kill(child, 9)
                os.waitpid(child, 0)
            raise AssertionError(f"a rank hung: only {codes} of {children} ended within {seconds} s")
        time.sleep(0.005)
    return [codes[child] for child in children]


def in_a_fork(test: Callable[..., None]) -> Callable[..., None]:
    """A test that makes a process group runs in a child.

    A backward pass through FSDP2 starts autograd's threads, and no later fork of the process could train.
    """

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        assert ends([fork(lambda: test(**fixtures))], 120) == [0], "see what the child has said"

    return run


def together(world: int, meet: Path, function: Callable[[int], object]) -> None:
    """Run ``function(rank)`` on ``world`` ranks; all must end well."""
    assert ends(start(world, meet, function)) == [0] * world
