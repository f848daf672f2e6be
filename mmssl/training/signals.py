"""SIGTERM, SIGUSR2 and Ctrl-C from the first moment of ``mmssl fit`` to its last.

A handler only sets a flag: what is done about it, :mod:`mmssl.training.preemption` and the ranks decide together.  One
case needs no decision: before the first step there is nothing to save, and a process that runs alone leaves at once.

Nothing here imports torch: the handlers are in force before that import, which takes seconds, begins.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a batch script requeues on it
EXIT_INTERRUPTED = 130  # what shells report after Ctrl-C
PREEMPTING = (signal.SIGTERM, signal.SIGUSR2)
START_SECONDS = 20.0  # how long a rank that is to leave before its first step waits for the others to agree


class NothingBegun(SystemExit):
    """A signal ended the run before its first step.  Uncaught, the process exits with ``code``."""

    def __init__(self, name: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.line = _nothing_begun(name)


class Signals:
    """What this process was told from outside.

    Attributes:
        received: the signals that came, in order.
        phase: "starting" until the ranks agreed to begin, then "running", and "over" when all is done but tidying up.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.phase = "starting"
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._wakeup_before = -1

    @property
    def installed(self) -> bool:
        return bool(self._before)

    @property
    def preempted(self) -> bool:
        return any(signum in PREEMPTING for signum in self.received)

    @property
    def interrupted(self) -> bool:
        return signal.SIGINT in self.received

    @property
    def name(self) -> str:
        """Of the signal that decides: one of a cluster's before Ctrl-C, because it must be answered with a requeue."""
        decisive = [signum for signum in self.received if signum in PREEMPTING] or self.received
        return signal.Signals(decisive[0]).name if decisive else "a signal to another rank"

    def install(self) -> None:
        """Put the handlers in place; again, if somebody took them away."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, *PREEMPTING):
            before = signal.signal(signum, self._handle)
            if before != self._handle:
                self._before.setdefault(signum, before)
        if self._wakeup is None:
            self._watch()

    def uninstall(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum, before in self._before.items():
            signal.signal(signum, before if before is not None else signal.SIG_DFL)
        self._before = {}
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            self._wakeup[1].close()  # ends the thread
            self._wakeup = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked worker.  Ctrl-C reaches the whole group; the parent decides when workers stop.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        again = signum in self.received
        self.received.append(signum)
        if signum == signal.SIGINT and (again or self.phase != "running"):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        name = signal.Signals(signum).name
        if self.phase == "starting" and _alone():
            raise NothingBegun(name)
        if len(self.received) == 1 and self.phase != "over":
            what = "saving after this step" if self.phase == "running" else "leaving when all ranks are there"
            more = "; Ctrl-C again stops at once, without saving" if signum == signal.SIGINT else ""
            # os.write: print may be in the middle of a line when the signal comes, and is not reentrant.
            os.write(2, f"\nmmssl: {name}: {what}{more}\n".encode())

    def _watch(self) -> None:
        """Notice signals in a thread as well: the main one may wait inside a collective, where no handler runs."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._wakeup = ours, theirs
        self._wakeup_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._after_fork)
        threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()

    def _after_fork(self) -> None:
        if self._wakeup is not None and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.set_wakeup_fd(-1)  # else a worker's signals would count as ours

    def _listen(self, inbox: socket.socket) -> None:
        with inbox:
            while numbers := inbox.recv(64):
                came = [number for number in numbers if number in PREEMPTING]
                if came and self.phase == "starting":
                    self._leave_in_time(came[0])

    def _leave_in_time(self, signum: int) -> None:
        """Others may never come to the agreement: rank 0 indexes for an hour, say, and we wait for it."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if self.phase != "starting" or self._wakeup is None:
                return
        os.write(2, f"mmssl: {_nothing_begun(signal.Signals(signum).name)}\n".encode())
        os._exit(EXIT_PREEMPTED)


def _nothing_begun(name: str) -> str:
    return f"{name} before the first step: nothing was begun, so nothing was saved and nothing is lost"


def _alone() -> bool:
    """Whether no other rank could wait for this one.  A local launcher sets these before it starts its children."""
    names = ("WORLD_SIZE", "SLURM_NTASKS")
    return all(os.environ.get(name, "1") in ("", "1") for name in names)


current = Signals()  # of this process; a run that begins puts a new one here


@contextmanager
def handled() -> Iterator[Signals]:
    """The handlers are in force inside; afterwards those that were there before."""
    global current
    current = Signals()
    current.install()
    leaving = False
    try:
        yield current
    except SystemExit as stop:
        leaving = stop.code == EXIT_PREEMPTED
        raise
    finally:
        current.uninstall()
        if leaving:
            keep_exit_code()


def keep_exit_code() -> None:
    """Let no further signal change the exit code of a process that srun started.

    srun ends all ranks with SIGTERM once one has left.  Those that are still tidying up have to leave with 75 too: srun
    returns the highest code of all, and a signal's would hide that the run is to be requeued.
    """
    if "SLURM_STEP_ID" in os.environ and threading.current_thread() is threading.main_thread():
        for signum in PREEMPTING:
            signal.signal(signum, signal.SIG_IGN)
