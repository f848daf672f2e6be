"""The loader between a stream and Lightning: workers, their signals, accumulation windows, clear errors."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

import torch
from torch.utils.data import DataLoader

from mmssl.data.budget import Budget
from mmssl.data.processors import processors
from mmssl.data.stream import EvalSet, TrainStream
from mmssl.types import Batch

StartMethod = Literal["fork", "spawn", "forkserver"]
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def default_workers(processes: int) -> int:
    """Workers for each of ``processes`` training processes of a node: its share of the cores less one, 1 to 8.

    SLURM binds every task to its own cores; elsewhere the processes share what the system allows them.
    """
    return max(1, min(8, _cores(processes) - 1))


def leave_cores(workers: int, processes: int) -> None:
    """Training on a CPU: let torch compute with the cores that the loader's workers leave.

    OpenMP's threads wait for each other by spinning.  With as many of them as cores, a loader that wants one of the
    cores stops the whole step again and again: seen to take ten times as long.  OMP_NUM_THREADS, if set, has the
    last word.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), _cores(processes) - workers)))


def tell_of_many_workers(workers: int, processes: int) -> None:
    """Say so where more workers were asked for than there are cores.

    They are started all the same: those that wait for a store need no core.
    """
    cores = max(1, _cores(processes))
    if workers > cores:
        print(
            f"mmssl: data.num_workers is {workers}, and each process has {cores} core{'s' if cores > 1 else ''}; null "
            f"takes {default_workers(processes)}, and more than there are cores help only with shards in a store",
            flush=True,
        )


def _cores(processes: int) -> int:
    """Cores for each of ``processes`` training processes of this node."""
    cores = processors()
    return cores if "SLURM_CPUS_PER_TASK" in os.environ else cores // max(1, processes)


def start_worker(worker: int) -> None:
    """Undo what a worker inherited: one that ran the main process's handlers would save and requeue on its own.

    A cluster sends its signals to all processes of a job, but the main process needs its batches until it has
    saved.  So a worker ignores them all, but for a TERM that comes from the main process itself.  Where the system
    does not tell who sent a signal (macOS has no sigwaitinfo, and no such clusters), every TERM ends it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # only the thread below takes it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS - {signal.SIGTERM})
        threading.Thread(target=_await_term, name="await-term", daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(1)


def _await_term() -> None:
    main = multiprocessing.parent_process()
    while main is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == main.pid:
            os._exit(128 + signal.SIGTERM)


class Loader:
    """Iterates a stream through worker processes.

    Not a DataLoader but holding one: Lightning rebuilds DataLoaders with samplers of its own in some modes.
    Every ``iter`` of a training loader begins at the batch that ``first`` names, with new workers.

    Args:
        data: what to iterate.
        workers: number of processes; 0 does the work in this one.
        prefetch: batches that every worker prepares ahead; more where the workers together would not reach
            ``accumulate``, so that the next window is made while one is trained (up to two windows are in memory).
        start_method: how processes start; None takes the system's default.
        pin_memory: for copies to a GPU.
        first: number of the batch to begin with (training only).
        accumulate: number of batches of one optimizer step; ``Batch.window`` sums their counts.
        budget: counts the bad samples of every batch as it is handed out; None allows any number.
    """

    def __init__(
        self,
        data: TrainStream | EvalSet,
        *,
        workers: int,
        prefetch: int = 2,
        start_method: StartMethod | None = None,
        pin_memory: bool = False,
        first: Callable[[], int] | None = None,
        accumulate: Callable[[], int] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.budget = budget or Budget(1.0)
        self.data, self.first, self.accumulate, self.prefetch = data, first, accumulate, prefetch
        self._loader = DataLoader(
            data,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context=start_method if workers else None,
            pin_memory=pin_memory,
            # Training never ends and so never begins again, but for a changed first batch, which needs new workers.
            persistent_workers=workers > 0 and isinstance(data, EvalSet),
            worker_init_fn=start_worker,
        )

    def __len__(self) -> int:
        if isinstance(self.data, EvalSet):
            return len(self.data)
        raise TypeError("the training stream has no end")

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.data, EvalSet):
            self.budget.begin()
        batches = self._batches()
        while window := list(islice(batches, self.accumulate() if self.accumulate else 1)):
            counts: Counter[str] = Counter()
            for batch in window:
                counts.update(batch.counts)
            for batch in window:
                batch.window = dict(counts)
                self.budget.count(batch)
                yield batch

    def _batches(self) -> Iterator[Batch]:
        if isinstance(self.data, TrainStream) and self.first is not None:
            self.data.start_batch = self.first()
        workers = self._loader.num_workers
        if workers and self.accumulate:
            self._loader.prefetch_factor = max(self.prefetch, -(-self.accumulate() // workers))
        # Workers begin with these signals blocked, until start_worker has replaced the inherited handlers.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if workers else None
        try:
            iterator = iter(self._loader)
        finally:
            if blocked is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            for batch in iterator:
                if not isinstance(batch, Batch):
                    raise batch
                yield batch
        finally:
            del iterator  # ends the workers now, not when the traceback is forgotten

    def close(self) -> None:
        """End the workers that wait for another pass."""
        self._loader._iterator = None
