"""The batch scripts without a cluster: what they decide, and that they are clean; with one: that SLURM takes them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import REQUIRED, ROOT, Slurm

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def test_there_are_three() -> None:
    assert [path.stem for path in SCRIPTS] == ["evaluate", "finetune", "pretrain"]


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        if not REQUIRED:
            pytest.skip("shellcheck is not installed; MMSSL_SLURM=required installs it")
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        subprocess.run(["apt-get", "-qq", "install", "-y", "shellcheck"], check=True)
    files = [*SCRIPTS, *(ROOT / "slurm").glob("*.sh"), ROOT / "tools/mini-slurm.sh"]
    done = subprocess.run(["shellcheck", "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("options", ["", "--nodes=2 --gpus-per-node=4", "--gres=gpu:2", "--array=0-3"])
@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_slurm_accepts_them(slurm: Slurm, script: str, options: str) -> None:
    said = slurm("sbatch", "--test-only", *options.split(), str(ROOT / "slurm" / script), "configs/mmm.yaml")
    assert "to start at" in said


# What a fake command of SLURM does; it notes that it was called.
SCONTROL = '#!/bin/sh\n[ $1 = requeue ] || exit 0\necho scontrol "$@" >> calls\nexit {code}\n'
SQUEUE = "#!/bin/sh\necho {left}\n"


def bash(folder: Path, lines: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run lines behind ``slurm/common.sh``, as in a job on 2 nodes x 4 GPUs; ``folder/bin`` is its PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("bash", "sh", "id", "hostname", "date", "head", "sleep", "cat"):
        if not (folder / "bin" / name).exists():
            (folder / "bin" / name).symlink_to(shutil.which(name) or name)
    known = {
        "PATH": str(folder / "bin"),
        "MMSSL_HOME": str(ROOT),
        "MMSSL_VENV": sys.prefix,
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    script = f"set -u -o pipefail; . {ROOT}/slurm/common.sh; sleep() {{ :; }}; {lines}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**known, **environ}, capture_output=True, text=True, timeout=60
    )


def command(folder: Path, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


@pytest.mark.parametrize(
    ("code", "stopped", "left", "requeued", "said"),
    [
        (0, "", "1:00", False, ""),
        (1, "", "1:00", False, ""),
        (2, "", "1:00", False, ""),
        (137, "", "1:00", False, ""),
        (75, "", "1:00", True, "is requeued"),
        (75, "TERM", "1:00", False, "was cancelled"),
        (75, "TERM", "0:00", True, "is requeued"),  # the time limit sends the same signal as scancel
        (75, "TERM", "INVALID", True, "is requeued"),
    ],
)
def test_only_75_is_requeued_and_no_cancelled_job(
    tmp_path: Path, code: int, stopped: str, left: str, requeued: bool, said: str
) -> None:
    command(tmp_path, "scontrol", SCONTROL.format(code=0))
    command(tmp_path, "squeue", SQUEUE.format(left=left))
    done = bash(tmp_path, f"CODE={code} STOPPED={stopped}; requeue_or_exit")
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").exists() == requeued
    assert said in done.stdout


def test_a_job_that_cannot_be_requeued_says_how_to_go_on(tmp_path: Path) -> None:
    done = bash(tmp_path, "CODE=75 STOPPED=; requeue_or_exit")
    assert done.returncode == 75
    assert "there is no scontrol" in done.stdout
    command(tmp_path, "scontrol", SCONTROL.format(code=1))
    done = bash(tmp_path, "CODE=75 STOPPED=; requeue_or_exit")
    assert done.returncode == 75
    assert "could not be requeued; the next job of a chain" in done.stdout


FAKE_SRUN = '#!/bin/sh\nfor x in "$@"; do echo "$x"; done > srun\n'


def srun_of(folder: Path, lines: str, **environ: str) -> list[str]:
    command(folder, "srun", FAKE_SRUN)
    done = bash(folder, lines, **environ)
    assert done.returncode == 0, done.stderr
    return (folder / "srun").read_text().splitlines()


def test_a_task_for_each_device(tmp_path: Path) -> None:
    words = srun_of(tmp_path, "run mmssl fit --x 'a b'")
    assert {"--kill-on-bad-exit=1", "--ntasks=8", "--ntasks-per-node=4"} <= set(words)
    assert words[-4:] == ["mmssl", "fit", "--x", "a b"]
    words = srun_of(tmp_path, "run mmssl", SLURM_GPUS_ON_NODE="", SLURM_NTASKS_PER_NODE="3")
    assert {"--ntasks=6", "--ntasks-per-node=3"} <= set(words)


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 137])
def test_a_failure_outranks_those_who_left_because_of_it(tmp_path: Path, code: int) -> None:
    """srun returns the highest code of its tasks; here it has one that fails and one that leaves with 75."""
    command(tmp_path, "srun", FIRST_AND_SECOND)
    done = bash(tmp_path, "run sh -c 'exit $WITH'; echo $CODE", FIRST=str(code), SECOND="0" if code == 0 else "75")
    assert done.stdout.split() == [str(code)]


# Leaves out its options, runs the command as two tasks and returns the higher code.
FIRST_AND_SECOND = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
WITH=$FIRST "$@"; a=$?
WITH=$SECOND "$@"; b=$?
exit $((a > b ? a : b))
"""


def test_images(tmp_path: Path) -> None:
    words = srun_of(tmp_path, "run mmssl fit", MMSSL_IMAGE="mmssl.sif", MMSSL_MOUNTS="/data")
    apptainer = ["apptainer", "exec", "--nv", "--bind", f"{tmp_path},/data", "--pwd", str(tmp_path), "mmssl.sif"]
    assert words[-10:] == [*apptainer, "mmssl", "fit"]
    words = srun_of(tmp_path, "run mmssl fit", MMSSL_IMAGE="nvcr.io#nvidia/pytorch:26.10-py3")
    assert "--container-image=nvcr.io#nvidia/pytorch:26.10-py3" in words
    assert f"--container-mounts={tmp_path},{ROOT}" in words
    assert words[-2:] == ["mmssl", "fit"]


def test_settings_that_are_set_stay(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    shown = "echo $NCCL_DEBUG $NCCL_SOCKET_IFNAME $OMP_NUM_THREADS"
    done = bash(tmp_path, shown, NCCL_DEBUG="INFO", MMSSL_SITE=str(site), SLURM_CPUS_PER_GPU="8")
    assert done.stdout.split() == ["INFO", "ib0", "8"]


def test_what_is_filled_in(tmp_path: Path) -> None:
    lines = "fill_in a '{stage}/x-{0..3}.tar' 'run-{task}'; printf '%s\\n' \"${ARGS[@]}\""
    done = bash(tmp_path, lines, MMSSL_STAGE_DIR="/scratch", SLURM_ARRAY_TASK_ID="4")
    assert done.stdout.splitlines() == ["a", "/scratch/x-{0..3}.tar", "run-4"]


def test_no_mmssl_is_one_line(tmp_path: Path) -> None:
    done = bash(tmp_path, ":", MMSSL_VENV=str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.startswith("mmssl: error: no mmssl here: run 'make environment'")


def test_staging_copies_once_and_whole(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / f"{i}.tar").write_text(f"shard {i}")
    target = tmp_path / "disk"
    environ = {**os.environ, "MMSSL_STAGE": "data/*.tar", "SLURM_JOB_ID": "7"}
    stage = ["bash", str(ROOT / "slurm/stage.sh"), str(target)]

    def staged() -> str:
        done = subprocess.run(stage, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "3 files copied, 0 there already" in staged()
    assert sorted(path.name for path in target.iterdir()) == ["0.tar", "1.tar", "2.tar"]
    (tmp_path / "data/1.tar").write_text("shard, changed")
    assert "1 files copied, 2 there already" in staged()
    assert (target / "1.tar").read_text() == "shard, changed"
    environ["MMSSL_STAGE"] = "data/*.none"
    done = subprocess.run(stage, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "names no file" in done.stderr
