"""What a SLURM job says about itself, and what ``mmssl fit`` takes from it.

Only facts are taken: how many nodes and processes there are, and which task of a job array this is.  Everything else
about a cluster is in the batch scripts (``slurm/``) and in Lightning's own ``SLURMEnvironment``.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmssl.cli.keys import UsageError

_INTERACTIVE_STEP = "4294967290"  # salloc's own shell
SAVED = "MMSSL_SAVED"  # names the file by which the batch script knows that this start left behind a checkpoint


def in_step(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``srun`` started this process as one of a run's tasks.

    A process in a batch script without ``srun`` sees most of SLURM's variables too, but is alone.  So is one in an
    interactive shell that ``srun --pty`` or ``salloc`` opened: it may use all devices that it sees.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return False
    shell = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    one = environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    return not (environ["SLURM_STEP_ID"] == _INTERACTIVE_STEP or (one and (shell or "SLURM_PTY_PORT" in environ)))


def geometry(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """(nodes, processes on each) of this ``srun`` step, or None outside of one.

    Raises:
        UsageError: The tasks are spread unevenly over the nodes.
    """
    if not in_step(environ):
        return None
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    if tasks % nodes:
        raise UsageError(
            f"SLURM started {tasks} tasks on {nodes} nodes; give srun --ntasks-per-node, a node's number of devices"
        )
    return nodes, tasks // nodes


def fit_to_job(trainer: Any, asked: set[str], environ: Mapping[str, str] = os.environ) -> None:
    """Set ``num_nodes`` and ``devices`` of the Trainer's arguments to what SLURM has started, in place.

    Args:
        trainer: the Trainer's arguments.
        asked: names of the options on the command line.

    Raises:
        UsageError: The command line asks for something else than SLURM started.
    """
    started = geometry(environ)
    if started is None:
        return
    for name, number in zip(("num_nodes", "devices"), started, strict=True):
        if f"trainer.{name}" in asked and str(trainer[name]) not in ("auto", "-1", str(number)):
            raise UsageError(
                f"trainer.{name} is {trainer[name]}, but SLURM started {started[0]} nodes x {started[1]} tasks; "
                "leave it out: under srun it is taken from SLURM"
            )
        trainer[name] = number


def array_task(environ: Mapping[str, str] = os.environ) -> str | None:
    """The number of this task in its job array, or None."""
    return environ.get("SLURM_ARRAY_TASK_ID") or None


def note_saved(checkpoint: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the batch script that the ranks agreed to leave and that ``checkpoint`` is on disk.

    Any rank may: one that tidies up for too long is killed, with an exit code that looks like a failure.
    """
    if environ.get(SAVED):
        with suppress(OSError):  # the exit code is there as well
            Path(environ[SAVED]).parent.mkdir(parents=True, exist_ok=True)  # another job may have tidied up
            Path(environ[SAVED]).write_text(f"{checkpoint}\n")
