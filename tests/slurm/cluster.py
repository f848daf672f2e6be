"""A SLURM on this machine for the tests: one for all workers of pytest, and what is done with its jobs."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "mini-slurm.sh"
NODES = 4
REQUIRED = os.environ.get("MMSSL_SLURM") == "required" or bool(os.environ.get("CI"))  # then no test may be skipped
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SLURMD_TIMEOUT = 10  # after which a node that does not answer is down


class CannotStart(Exception):
    """There is no SLURM here, and why."""


@contextmanager
def shared_slurm(folder: Path) -> Iterator["Slurm"]:
    """The SLURM in ``folder``: the first process that comes starts it, the last that leaves stops it.

    Raises:
        CannotStart: It cannot be installed or started.
    """
    folder.mkdir(exist_ok=True)
    with _alone(folder):
        users = _users(folder)
        if not users:
            _start(folder)
        (folder / "users").write_text(json.dumps([*users, os.getpid()]))
    try:
        yield Slurm(folder)
    finally:
        with _alone(folder):
            users = [pid for pid in _users(folder) if pid != os.getpid()]
            (folder / "users").write_text(json.dumps(users))
            if not users:
                _tool(folder, "stop")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / "mutex", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _users(folder: Path) -> list[int]:
    """The processes that use it; one that was killed does not count."""
    path = folder / "users"
    pids = json.loads(path.read_text()) if path.exists() else []
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _start(folder: Path) -> None:
    if sys.platform != "linux" or os.getuid() != 0:
        raise CannotStart("starting SLURM needs root on Linux")
    if shutil.which("slurmctld", path=_PATH) is None:
        if shutil.which("apt-get") is None:
            raise CannotStart("SLURM is not installed, and there is no apt-get to install it with")
        done = _tool(folder, "install", check=False)
        if done.returncode:
            raise CannotStart(f"SLURM cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    (folder / "port").write_text(str(_free_ports(NODES + 1)))
    done = _tool(folder, "start", check=False)
    if done.returncode:
        raise CannotStart(f"SLURM does not start: {done.stdout}{done.stderr}")


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> int:
    """The first of so many neighbouring free ports, outside of those the system gives away."""
    for first in range(17100 + os.getpid() % 400 * 10, 31000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise CannotStart("there are no free ports")


def _tool(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    port = folder / "port"
    settings = {
        "MINI_SLURM_DIR": str(folder / "slurm"),
        "MINI_SLURM_PORT": port.read_text() if port.exists() else "17100",
        "MINI_SLURM_NODES": str(NODES),
        "MINI_SLURM_TIMEOUT": str(SLURMD_TIMEOUT),
        "MINI_SLURM_GRACE": "30",
    }
    # Not through pipes: the daemons that it starts would keep them open.
    with open(folder / "tool.out", "a+") as out, open(folder / "tool.err", "a+") as err:
        begin = out.seek(0, os.SEEK_END), err.seek(0, os.SEEK_END)
        done = subprocess.run(
            ["bash", str(TOOL), *command],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        out.seek(begin[0])
        err.seek(begin[1])
        result = subprocess.CompletedProcess(done.args, done.returncode, out.read(), err.read())
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


class Slurm:
    """Submits jobs from a work folder and watches them.

    Attributes:
        environ: what jobs are submitted with: this checkout, this Python, one thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environ = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "MMSSL_", "SBATCH_"))
            },
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
            "MMSSL_HOME": str(ROOT),
            "MMSSL_VENV": sys.prefix,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/slurm'}",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def __call__(self, *command: str, check: bool = True, **more: str) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        done = subprocess.run(command, env={**self.environ, **more}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return (done.stdout + done.stderr).strip()

    def submit(self, script: str, *arguments: str, log: str = "log", options: str = "", **more: str) -> str:
        """``sbatch`` one of the shipped scripts with one of the nodes' pretended GPUs each; returns the job's id."""
        small = f"--gpus-per-node=1 --cpus-per-gpu=1 --time=20 --output={log} --parsable {options}"
        return self("sbatch", *small.split(), str(ROOT / "slurm" / script), *arguments, **more).splitlines()[-1]

    def crash(self, node: str) -> None:
        _tool(self._folder, "crash", node)

    def start(self) -> None:
        _tool(self._folder, "start")

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` tells."""
        return dict(re.findall(r"(\S+?)=(\S*)", self("scontrol", "show", "job", "-o", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until the job is in one of the states, and tell what SLURM knows of it."""

        def there() -> bool:
            state = self.state(job)
            assert state in states or state not in ENDED, f"job {job} is {state}; {self.log(job)}"
            return state in states

        until(there, f"job {job} in {states}", seconds, lambda: self.state(job))
        return self.job(job)

    def log(self, job: str) -> str:
        """What the job has written."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else "no log"

    def requeued(self, job: str, times: int, seconds: float = 120) -> None:
        """Wait until the job was requeued so many times, and start it: SLURM itself would hold it for two minutes."""

        def held() -> bool:
            known = self.job(job)
            assert known["JobState"] not in ENDED, f"job {job} is {known['JobState']}; {self.log(job)}"
            return known["JobState"] == "PENDING" and int(known["Restarts"]) == times

        until(held, f"job {job} requeued {times} times", seconds, lambda: str(self.job(job)))
        # Not in the same second: a node would refuse what it has just ended.
        self("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def process_of(self, job: str, rank: int) -> int:
        """The Python process of one rank."""
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
            step = any(variable.startswith(b"SLURM_STEP_ID=") for variable in variables)
            if step and wanted <= set(variables) and b"bin/mmssl\0fit" in command:
                return int(folder.name)
        raise AssertionError(f"rank {rank} of job {job} does not run")


def until(done: Callable[[], bool], what: str, seconds: float, show: Callable[[], str] = str) -> None:
    """Wait for something, and say what it was when it does not come."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}; {show()}"
        time.sleep(0.2)
