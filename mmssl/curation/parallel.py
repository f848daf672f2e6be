"""One function over many items in several processes, with the results in the order of the items.

The processes are made by a fork server, so that they inherit no threads and no open files; they end when the process
that started them ends, however it ends, and leave Ctrl-C to it.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mmssl.data.processors import processors

Item = TypeVar("Item")
Result = TypeVar("Result")

_shared: Any = None


def check_jobs(jobs: int | None) -> int:
    """The number of processes; None means one for every processor.  Raises ValueError for less than 1."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; give the number of processes, at least 1")
    return jobs or processors()


def ordered_map(
    function: Callable[[Any, Item], Result], shared: Any, items: Iterable[Item], jobs: int
) -> Iterator[Result]:
    """``function(shared, item)`` for every item, in order.

    At most three items for each process are under way, so neither items nor results pile up in memory.

    Args:
        function: a function of a module (it is pickled by name).
        shared: sent once to every process.
        items: read as they are needed, in the calling process.
        jobs: number of processes; 1 means this one.

    Raises:
        ChildProcessError: if a process is killed, most often for want of memory.
    """
    if jobs == 1:
        for item in items:
            yield function(shared, item)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])  # imports are paid once, not in every process
    _start_server()
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(shared,))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            with _main_hidden():  # processes are made by submit
                waiting.append(pool.submit(_call, function, item))
            if len(waiting) >= 3 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of {jobs} processes was killed, most often for want of memory; give a smaller number of --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Processes that are made meanwhile do not run the program's main module: nothing here needs it, and a script
    without ``if __name__ == "__main__"`` would do its work again in each of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_server() -> None:
    """Start the fork server deaf to Ctrl-C, which would meet it in the middle of its imports."""
    if threading.current_thread() is not threading.main_thread():  # only there signals can be set
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    # The pool's own processes wait for ever on their queue when the parent is killed.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_shared, item)
