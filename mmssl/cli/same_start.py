"""Where a ``fit`` begins, on all of its ranks: anew, from which checkpoint, or not at all, because it is finished.

Every rank looks into the run's folder before the ranks can talk, and a network file system may show one of them an old
listing.  A rank that then begins anew, or leaves, beside others that go on would keep them waiting in a collective.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl

from mmssl.training.together import hear_all, raise_first

WAIT_SECONDS = 60.0  # before a rank says that it waits for others
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_alone() -> bool:
    """Whether no other rank was started beside this process; one that starts ranks itself has not done it yet."""
    return not os.environ.keys() & set(_RANK_VARIABLES)


def say_finished(folder: Path, step: int) -> None:
    print(f"mmssl: {folder} is at step {step} already; it is finished", flush=True)


def agree_first(trainer: pl.Trainer, folder: Path, checkpoint: str | None, finished: bool) -> None:
    """Let the ranks compare where each would begin as soon as they can talk, before they do anything else together.

    Args:
        trainer: that is about to fit.
        folder: the run's.
        checkpoint: which this rank found; rank 0's counts, for all that found one.
        finished: whether it is the run's last; rank 0's word counts.

    Raises (from ``Trainer.fit``, on every rank):
        CheckpointError: A rank found a checkpoint and another one did not.
        SystemExit: 0, because the run is finished.
    """
    set_up = trainer.strategy.setup_environment

    def setup_environment() -> None:
        with _telling_of_a_wait(trainer):
            set_up()
        every: list[tuple[str, str | None, bool]] = hear_all((socket.gethostname(), checkpoint, finished))
        if every[0][2]:
            if trainer.is_global_zero:
                say_finished(folder, trainer.max_steps)
            raise SystemExit(0)
        seeing = [rank for rank, (_, found, _) in enumerate(every) if found is not None]
        blind = [rank for rank in range(len(every)) if rank not in seeing]
        if seeing and blind:
            raise_first(
                [
                    f"rank {blind[0]} on {every[blind[0]][0]} sees no checkpoint in {folder}, from which rank "
                    f"{seeing[0]} on {every[seeing[0]][0]} would go on with {every[seeing[0]][1]}; nothing was begun: "
                    "start again, and if this comes again, put the folder on a disk that all ranks see"
                ]
            )

    trainer.strategy.setup_environment = setup_environment  # type: ignore[method-assign]


@contextmanager
def _telling_of_a_wait(trainer: pl.Trainer) -> Iterator[None]:
    """Say who is waited for when the ranks take long to meet: by default they may take half an hour, in silence."""

    def tell() -> None:
        told = [f"{n}={os.environ[n]}" for n in (*_RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if n in os.environ]
        print(
            f"mmssl: rank {trainer.global_rank} on {socket.gethostname()} has waited {WAIT_SECONDS:.0f} s for the "
            f"other ranks of {trainer.world_size} to meet it; is each of them started, and does each reach the others? "
            f"({', '.join(told)})",
            flush=True,
        )

    timer = threading.Timer(WAIT_SECONDS, tell)
    timer.daemon = True
    if trainer.world_size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
