"""A run that stands still says where, on every rank, and ends: instead of holding its GPUs in silence."""

import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

EXIT_HANG = 1


class HangWatch:
    """Ends the process when nothing has been heard of its training for a while, with the stacks of all threads.

    A thread looks at the time of the last :meth:`beat`.  Where it cannot run, because a call holds the interpreter's
    lock, faulthandler's timer does the same from C: the thread winds it up again and again, so a step costs nothing.

    Args:
        path: the file that gets the stacks.
        seconds: how long there may be silence.
        rank: who says so.
    """

    def __init__(self, path: Path, seconds: float, rank: int) -> None:
        self.path, self.seconds, self.rank = path, seconds, rank
        # Ranks notice one after the other; the first must not end the others before they have written theirs.
        self._pause = min(10.0, seconds / 2)
        self._due = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._fd = -1

    def start(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError:  # a full disk or another's folder; the stacks are worth more than their place
            self._fd = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)
        self.beat(3)
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
        self._thread.start()

    def beat(self, times: float = 1.0) -> None:
        """The run lives; the next beat may take ``times`` as long as usual."""
        self._due = time.monotonic() + times * self.seconds

    def stop(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()  # it must not wind up the timer again, with a file that is closed
        faulthandler.cancel_dump_traceback_later()
        if self._fd >= 0:
            os.close(self._fd)
            if self.path.is_file() and self.path.stat().st_size == 0:
                self.path.unlink(missing_ok=True)
            with suppress(OSError):  # another rank's stacks are there
                self.path.parent.rmdir()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 10)):
            left = self._due - time.monotonic()
            if left > 0:
                faulthandler.dump_traceback_later(left + 2 * self._pause + 1, exit=True, file=self._fd)
            else:
                self._end()

    def _end(self) -> None:
        due, head = self._due, f"rank {self.rank} on {socket.gethostname()}"
        where = self.path if self.path.is_file() else "above"
        os.write(self._fd, f"{time.strftime('%F %T')} {head}, process {os.getpid()}:\n".encode())
        faulthandler.dump_traceback(file=self._fd, all_threads=True)
        said = f"mmssl: {head}: nothing has moved for {self.seconds / 60:.3g} minutes; its stacks: {where}"
        os.write(2, f"{said}; the run ends here\n".encode())
        stopped = self._stop.wait(self._pause)
        if self._due == due and not stopped:
            os._exit(EXIT_HANG)
        os.write(2, f"mmssl: {head}: it moves again, and the run goes on\n".encode())
