"""``mmssl submit``: the job of ``slurm/pretrain.sbatch`` from Python, through submitit.

submitit writes the batch script, keeps the job's files and logs together, and is what a sweep in Python would use.  The
job itself runs ``slurm/pretrain.sbatch`` on its first node, so that signals, exit codes and requeueing are the same
whichever way a job was submitted; submitit's own checkpointing, which works inside a signal handler, is not used.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from mmssl.cli.keys import UsageError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"mmssl submit: {message}; mmssl submit --help lists its options")


def main(args: list[str]) -> None:
    """Submit a training job, or print what would be submitted.

    Raises:
        UsageError: An option is wrong, submitit is not installed, or SLURM refuses the job.
    """
    parser = _parser()
    asked, overrides = parser.parse_known_args(args)
    if not Path(asked.config).is_file():
        raise UsageError(f"there is no config {asked.config}")
    home = _home()
    parameters = {
        "job_name": asked.job_name,
        "nodes": asked.nodes,
        "gpus_per_node": asked.gpus_per_node or None,
        "ntasks_per_node": None if asked.gpus_per_node else 1,
        "time": minutes(asked.time),
        "signal_delay_s": asked.signal_seconds,
        "stderr_to_stdout": True,
        "use_srun": False,  # the batch script calls srun itself, and has to live on to requeue
        "additional_parameters": {
            "requeue": True,
            **({"cpus-per-gpu": asked.cpus_per_gpu} if asked.gpus_per_node else {}),
            **{key: getattr(asked, key) for key in ("partition", "account", "qos") if getattr(asked, key)},
            **_pairs(asked.slurm),
        },
    }
    submitit = _submitit()
    if asked.dry_run:
        from submitit.slurm.slurm import _make_sbatch_string

        command = shlex.join(["bash", str(home / "slurm/pretrain.sbatch"), asked.config, *overrides])
        parameters = {key: value for key, value in parameters.items() if value is not None}
        print(_make_sbatch_string(command=command, folder=asked.folder, **parameters))
        return
    try:
        executor = submitit.SlurmExecutor(folder=asked.folder)
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        job = executor.submit(in_job, str(home), asked.config, overrides)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UsageError(f"SLURM refused the job: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise UsageError("there is no srun here; submit from a login node of the cluster") from error
    print(f"mmssl: submitted job {job.job_id}; log: {job.paths.stdout}")


def in_job(home: str, config: str, overrides: list[str]) -> None:
    """What runs on the job's first node: the batch script, with all that it does about signals and requeueing."""
    environ = {**os.environ, "MMSSL_HOME": home}
    done = subprocess.run(["bash", f"{home}/slurm/pretrain.sbatch", config, *overrides], env=environ)
    if done.returncode:
        sys.exit(done.returncode)


def minutes(text: str) -> int:
    """SLURM's ways to write a time (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up.

    Raises:
        UsageError: It is none of them.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise UsageError(f"--time {text!r} is not a time; write minutes, H:M:S or D-H:M:S")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, (mins, seconds) = 0, [*parts, 0][:2]
    total = ((int(match["days"] or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    return max(1, -(-total // 60))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mmssl submit",
        description="Submit slurm/pretrain.sbatch through submitit; what is not listed here goes to mmssl fit.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", help="the config to train")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="devices of each, one process for each; 0: CPUs")
    parser.add_argument("--cpus_per_gpu", type=int, default=8, help="processors for each device")
    parser.add_argument("--time", default="24:00:00", help="time limit, as SLURM writes it")
    parser.add_argument("--signal_seconds", type=int, default=300, help="how long before it the run saves and requeues")
    parser.add_argument("--partition", help="SLURM's partition")
    parser.add_argument("--account", help="SLURM's account")
    parser.add_argument("--qos", help="SLURM's quality of service")
    parser.add_argument("--job_name", default="mmssl", help="the job's name")
    parser.add_argument("--slurm", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch")
    parser.add_argument("--folder", default="runs/submitit", help="where submitit keeps its files and the log")
    parser.add_argument("--dry_run", action="store_true", help="print the batch script and submit nothing")
    return parser


def _pairs(written: list[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for pair in written:
        name, equals, value = pair.partition("=")
        if name.lstrip("-") in ("array", "a"):  # submitit keeps a job's files by its number, which an array has not
            raise UsageError(f"--slurm {pair}: use sbatch --{pair.lstrip('-')} slurm/pretrain.sbatch CONFIG")
        pairs[name.lstrip("-")] = value if equals else True
    return pairs


def _home() -> Path:
    """The checkout with the batch scripts."""
    named = os.environ.get("MMSSL_HOME")
    for folder in [Path(named)] if named else [Path.cwd(), Path(__file__).parents[2]]:
        if (folder / "slurm/pretrain.sbatch").is_file():
            return folder.resolve()
    raise UsageError("there is no slurm/pretrain.sbatch here; submit from a checkout of mmssl, or set MMSSL_HOME")


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UsageError(
            "mmssl submit needs submitit: pip install 'mmssl[slurm]'; or use sbatch slurm/pretrain.sbatch"
        ) from error
    return submitit
