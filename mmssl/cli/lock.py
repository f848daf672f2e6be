"""One run's folder, one writer: ``lock`` in the folder says which process trains there, and on which machine.

Two jobs that write one folder at once would prune each other's checkpoints and mix their logs.  A lock whose owner is
dead is taken over, for a job that is requeued after a crash must go on without a person.  Whether the owner is dead is
asked, in this order, of this machine's processes, of SLURM, and of the lock itself, which a living owner touches.

An owner whose job is ending still saves, so it is waited for.  An owner that finds another's lock in place of its own,
because SLURM took its node for dead, ends at once and writes nothing more.
"""

import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmssl.cli.keys import UsageError

TOUCH_SECONDS = 10.0
DEAD_SECONDS = 90.0  # longer than a network file system may show an old time, and than SLURM's KillWait
ENDING_SECONDS = 600.0  # how long an owner that says it lives is waited for while its job ends
_RUNS = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
_ENDS = {"COMPLETING", "STOPPING", "STAGE_OUT"}


@contextmanager
def locked(folder: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold ``folder/lock`` while the body runs; the folder must exist.

    Args:
        folder: the run's.
        say: gets a line when an owner is waited for or its lock is taken over; default: standard output.

    Raises:
        UsageError: Another process trains there.
    """
    path, mine = folder / "lock", _me()
    _take(path, mine, say or (lambda line: print(line, flush=True)))
    ended = threading.Event()
    thread = threading.Thread(target=_touch, args=(path, mine, ended), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """Whether somebody seems to train there, without waiting and without touching the lock; in doubt they do."""
    path = folder / "lock"
    owner = _read(path)
    if owner is None:
        return False
    alive = _is_alive(owner, _me())
    # Nobody here knows: what the lock says last, with room for clocks that differ.
    return time.time() - _touched(path) / 1e9 < 10 * DEAD_SECONDS if alive is None else alive


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": _process(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "step": os.environ.get("SLURM_STEP_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "id": secrets.token_hex(8),
    }


def _take(path: Path, mine: dict[str, Any], say: Callable[[str], None]) -> None:
    while not _create(path, mine):
        owner = _read(path)
        if owner is None:  # it went between the two looks
            continue
        alive = _is_alive(owner, mine)
        if alive and _state(owner, mine) in _ENDS:
            say(
                f"mmssl: {path} belongs to {_name(owner)}, whose job is ending; waiting until it is gone, "
                f"or has given no sign of life for {DEAD_SECONDS:.0f} s"
            )
            alive = _lives_on(path, owner, mine)
        elif alive is None:
            say(
                f"mmssl: {path} belongs to {_name(owner)}, of which nothing is known here; "
                f"it counts as dead after {DEAD_SECONDS:.0f} s without a sign of life"
            )
            alive = _gives_a_sign(path)
        if alive:
            raise UsageError(
                f"{path.parent} is being trained by {_name(owner)} since {owner['since']}; "
                "wait until it has ended, or give another folder with --run"
            )
        if _take_over(path, owner, mine):
            say(f"mmssl: {path} belonged to {_name(owner)}, which is dead; this process goes on")
            return


def _create(path: Path, mine: dict[str, Any]) -> bool:
    """Make the lock with its content, or say that there is one."""
    whole = path.with_name(f".lock.{mine['id']}")
    whole.write_text(json.dumps(mine))
    try:
        os.link(whole, path)  # atomic, on network file systems too: the lock is never seen half written
    except FileExistsError:
        there = _read(path)  # NFS may answer so to its own repetition of a request that was granted
        return there is not None and there["id"] == mine["id"]
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(json.dumps(mine))
        except FileExistsError:
            return False
    finally:
        whole.unlink()
    return True


def _take_over(path: Path, owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Replace a dead owner's lock; False if somebody else was faster."""
    claim = path.with_name(f".lock.{owner['id']}.claim")  # one for each dead owner, so one process alone gets it
    if not _create(claim, mine):
        holder = _read(claim)
        if holder is not None and _is_alive(holder, mine) is False:
            claim.unlink(missing_ok=True)  # it died as well, in the moment between
        time.sleep(0.2)
        return False
    try:
        if _read(path) != owner:
            return False
        path.unlink()
        return _create(path, mine)
    finally:
        claim.unlink(missing_ok=True)


def _is_alive(owner: dict[str, Any], mine: dict[str, Any]) -> bool | None:
    """Whether the owner lives; None when nobody here knows."""
    if owner["process"] and mine["process"] and owner["process"][:2] == mine["process"][:2]:
        return owner["process"] == _process(owner["pid"])
    if owner["job"] is None or _on_another_cluster(owner, mine):
        return None
    if owner["job"] == mine["job"]:  # an earlier start of this job, unless it is another step of this one
        return False if owner["step"] == mine["step"] else None
    state = _state(owner, mine)
    return None if state is None else state in _RUNS | _ENDS


def _state(owner: dict[str, Any], mine: dict[str, Any]) -> str | None:
    """What SLURM says of the owner's job: "" if it does not know the job any more, None if SLURM cannot be asked."""
    if owner["job"] is None or _on_another_cluster(owner, mine):
        return None
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-j", owner["job"], "-o", "%A %T"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode:
        return "" if "Invalid job id" in asked.stderr else None
    # Of an array's first task, whose number is the array's, squeue lists all tasks.
    states = dict(line.split()[:2] for line in asked.stdout.splitlines() if len(line.split()) > 1)
    return states.get(owner["job"], "")


def _on_another_cluster(owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the number of the owner's job means nothing here; outside of a job the default cluster is asked."""
    return None not in (owner["cluster"], mine["cluster"]) and owner["cluster"] != mine["cluster"]


def _process(pid: int) -> list[str] | None:
    """What tells a process from any other: [boot, pid namespace, start time]; None if it is gone or /proc is."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return [boot, os.readlink("/proc/self/ns/pid"), stat[19]] if stat[0] != "Z" else None
    except OSError:
        return None


def _gives_a_sign(path: Path) -> bool:
    """Whether somebody touches or removes the lock within the time after which its owner counts as dead."""
    before, deadline = _touched(path), time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, DEAD_SECONDS / 10))
        if _touched(path) != before:
            return path.exists()
    return False


def _lives_on(path: Path, owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Wait for the owner of a job that ends; whether it is still there after all the time that may take."""
    begin = time.monotonic()
    seen, touched = begin, _touched(path)
    while time.monotonic() - begin < ENDING_SECONDS:
        time.sleep(min(5.0, DEAD_SECONDS / 10))
        if _read(path) != owner or _is_alive(owner, mine) is False:
            return False
        if _touched(path) != touched:
            seen, touched = time.monotonic(), _touched(path)
        if time.monotonic() - seen > DEAD_SECONDS:  # killed; its node is still tidying up
            return False
    return True


def _touch(path: Path, mine: dict[str, Any], ended: threading.Event) -> None:
    """Say that the owner lives, until it ends; end this process if the lock is another's."""
    while not ended.wait(TOUCH_SECONDS):
        there = _read(path)
        if there is not None and there["id"] not in (mine["id"], "damaged") and not ended.is_set():
            line = f"mmssl: error: {path.parent} belongs to {_name(there)} now; this process ends and saves nothing\n"
            os.write(2, line.encode())
            os._exit(1)  # not by an exception: the training, which may wait in a collective, must write nothing more
        try:
            os.utime(path)
        except OSError:
            continue  # a file system that stumbles does not stop a run


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        content = {}
    unknown = {"process": None, "job": None, "cluster": None, "step": None, "since": "?", "id": "damaged"}
    return {"host": "?", "pid": 0, **unknown, **content}


def _name(owner: dict[str, Any]) -> str:
    job = f"SLURM job {owner['job']}, " if owner["job"] else ""
    return f"{job}process {owner['pid']} on {owner['host']}"
