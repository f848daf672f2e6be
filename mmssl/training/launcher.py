"""The ranks that ``mmssl fit`` starts on this machine itself: they live and end together, with one exit code.

Lightning's launcher kills rank 0 with SIGKILL as soon as another rank has ended with any code but 0: the exit code that
the ranks agreed on, and what rank 0 had to say, would be lost.  It also leaves them behind where rank 0 is killed.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from mmssl.training import signals
from mmssl.training.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED

AGREED = (0, EXIT_PREEMPTED, EXIT_INTERRUPTED)
_MARK = "MMSSL_LAUNCHER"  # in a child's environment: the process that started it
_LEAVING_SECONDS = 30.0  # how long ranks that leave together may differ: one has its logs to finish
_FAILING_SECONDS = 5.0  # how long a rank may take to see by itself that another has failed, and say so


def supervise(trainer: pl.Trainer) -> None:
    """Let a Trainer that starts its own processes start them with :class:`Launcher`."""
    theirs = trainer.strategy.launcher
    if type(theirs) is _SubprocessScriptLauncher:
        trainer.strategy._launcher = Launcher(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)


def own_signals_only(trainer: pl.Trainer) -> None:
    """Take Lightning's own handling of SIGTERM out of a Trainer that is about to fit.

    Its handler holds a broadcast, which hangs wherever the other ranks are not in theirs, and every batch begins with
    another one that waits for the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, and ends them all when one fails."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        if self.cluster_environment.creates_processes_externally:
            self._check_meeting_place()
            if os.environ.get(_MARK) == str(os.getppid()):
                threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
            return super().launch(function, *args, trainer=trainer, **kwargs)
        self._over = False
        self._patience = _FAILING_SECONDS
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        os.environ[_MARK] = str(os.getpid())
        self._call_children_scripts()
        atexit.register(self._end_children)  # not before this process has said why it ends
        threading.Thread(target=self._watch, name="children", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            self._over = True
            if isinstance(error, SystemExit) and error.code in AGREED:
                self._patience = _LEAVING_SECONDS
            raise
        self._over, self._patience = True, _LEAVING_SECONDS
        return result

    def _check_meeting_place(self) -> None:
        """Ranks that others start meet where those say; Lightning would wait half an hour at a port of its own."""
        ranks = self.num_processes * self.num_nodes
        by_hand = isinstance(self.cluster_environment, LightningEnvironment)
        if by_hand and ranks > 1 and not os.environ.get("MASTER_PORT"):
            raise ValueError(
                f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set in the environment, so something else is to start the "
                f"{ranks} ranks, but MASTER_PORT, where they meet, is not; unset LOCAL_RANK (and NODE_RANK) to have "
                "mmssl start them, or start them with torchrun or srun"
            )

    def _watch(self) -> None:
        """End all ranks if one of the others fails.  A thread: this one may be waiting for just that rank."""
        while not self._over:
            time.sleep(0.3)
            ended = [(rank, code) for rank, code in self._codes() if code]
            if not ended:
                continue
            rank, code = ended[0]
            if code in AGREED:
                # Either all of them leave now, or this one left alone, before its first step; then we are to leave too.
                self._wait(lambda: self._over, _FAILING_SECONDS)
                if not self._over and code == EXIT_PREEMPTED:
                    self.kill(signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGTERM)
                self._wait(lambda: self._over, _LEAVING_SECONDS)
            else:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                os.write(2, f"mmssl: rank {rank} {how}; the other ranks of this machine are ended\n".encode())
                self._wait(lambda: self._over, _FAILING_SECONDS)
            if not self._over:
                self.kill(signal.SIGKILL)
                with suppress(OSError, ValueError):
                    sys.stdout.flush()
                os._exit(code if code > 0 else 128 - code)

    def _codes(self) -> list[tuple[int, int | None]]:
        return [(rank, process.poll()) for rank, process in enumerate(self.procs, start=1)]

    def _end_children(self) -> None:
        """Wait a while for the other ranks, then end those that remain."""
        if not self._wait(lambda: all(code is not None for _, code in self._codes()), self._patience):
            self.kill(signal.SIGKILL)
        for process in self.procs:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)

    @staticmethod
    def _wait(until: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def _end_with(parent: int) -> None:
    """A rank whose rank 0 was killed would wait for it in a collective, and hold its GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(EXIT_PREEMPTED if signals.current.preempted else 1)
