"""The batch scripts without a cluster: what they decide, and that they are clean; with one: that SLURM takes them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import REQUIRED, ROOT, Slurm

from mmssl import cli
from mmssl.training.signals import NothingBegun

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


MMSSL = """#!/bin/sh
echo "rank $SLURM_PROCID of $SLURM_NTASKS, $OMP_NUM_THREADS threads, home $MMSSL_HOME, unbuffered $PYTHONUNBUFFERED: $*"
"""


@pytest.mark.timeout(600)
def test_each_way_to_ask_for_devices_starts_a_task_for_each(slurm: Slurm, tmp_path: Path, monkeypatch) -> None:
    """As docs/cluster.md tells them, with a command that trains nothing in place of mmssl."""
    monkeypatch.chdir(tmp_path)
    command(tmp_path, "mmssl", MMSSL)
    (tmp_path / "0.tar").touch()
    forms = {  # options: tasks, threads of each
        "--nodelist=n3": (8, 8),
        "--nodelist=n3 --gres=gpu:2": (2, 8),
        "--nodelist=n3,n4 --nodes=2 --gpus-per-node=2 --cpus-per-gpu=3": (4, 3),
        "--nodelist=n3 --gpus-per-node=0 --ntasks-per-node=2 --mincpus=8": (2, 4),
        "--nodelist=n3 --gpus-per-node=1 --export=MMSSL_HOME,MMSSL_VENV,MMSSL_STAGE,MMSSL_STAGE_DIR": (1, 8),
    }
    known = {"MMSSL_VENV": str(tmp_path), "MMSSL_STAGE": f"{tmp_path}/*.tar", "MMSSL_STAGE_DIR": f"{tmp_path}/disk"}
    known["OMP_NUM_THREADS"] = ""
    script = str(ROOT / "slurm/pretrain.sbatch")
    jobs = [
        slurm("sbatch", "--parsable", "--output=%j.out", *form.split(), script, "c.yaml", **known) for form in forms
    ]
    for job, (form, (tasks, threads)) in zip(jobs, forms.items(), strict=True):
        slurm.wait(job, "COMPLETED", seconds=240)
        said = slurm.log(job).splitlines()
        ranks = [f"rank {i} of {tasks}, {threads} threads, home {ROOT}, unbuffered 1: " for i in range(tasks)]
        wanted = [line + "fit --config c.yaml --resume_or_start" for line in ranks]
        assert sorted(line for line in said if line.startswith("rank")) == wanted, (form, said)
        assert any("mmssl: staged on n3" in line for line in said), (form, said)


# What a fake command of SLURM does; it notes that it was called.
SCONTROL = '#!/bin/sh\n[ $1 = requeue ] || exit 0\necho scontrol "$@" >> calls\nexit {code}\n'
SQUEUE = "#!/bin/sh\necho {left}\n"


def bash(folder: Path, lines: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run lines behind ``slurm/common.sh``, as in a job on 2 nodes x 4 GPUs; ``folder/bin`` is its PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in (
        "bash",
        "sh",
        "id",
        "hostname",
        "date",
        "head",
        "sleep",
        "cat",
        "mkdir",
        "rm",
        "rmdir",
        "cksum",
        "env",
    ):
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
        (75, "TERM", "1:00", False, "SLURM ended job 7"),
        (75, "TERM", "0:00", True, "is requeued"),  # the time limit sends the same signal as scancel
        (75, "TERM", "INVALID", True, "is requeued"),
    ],
)
def test_only_75_is_requeued_and_no_cancelled_job(
    tmp_path: Path, code: int, stopped: str, left: str, requeued: bool, said: str
) -> None:
    command(tmp_path, "scontrol", SCONTROL.format(code=0))
    command(tmp_path, "squeue", SQUEUE.format(left=left))
    done = bash(tmp_path, f"CODE={code} STOPPED={stopped}; requeue_or_exit resume")
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").exists() == requeued
    assert said in done.stdout


def test_a_job_that_cannot_be_requeued_says_how_to_go_on(tmp_path: Path) -> None:
    done = bash(tmp_path, "CODE=75 STOPPED=; requeue_or_exit resume")
    assert done.returncode == 75
    assert "there is no scontrol" in done.stdout
    command(tmp_path, "scontrol", SCONTROL.format(code=1))
    done = bash(tmp_path, "CODE=75 STOPPED=; requeue_or_exit resume")
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
    assert {"--export=ALL", "--kill-on-bad-exit=1", "--ntasks=8", "--ntasks-per-node=4"} <= set(words)
    assert words[-4:] == ["mmssl", "fit", "--x", "a b"]
    words = srun_of(tmp_path, "run mmssl", SLURM_GPUS_ON_NODE="", SLURM_NTASKS_PER_NODE="3")
    assert {"--ntasks=6", "--ntasks-per-node=3"} <= set(words)


@pytest.mark.parametrize("code", [0, 1, 2, 54, 75, 130, 137, 255])
def test_a_failure_outranks_those_who_left_because_of_it(tmp_path: Path, code: int) -> None:
    """srun returns the highest code of its tasks; here it has one that fails and one that leaves with 75."""
    command(tmp_path, "srun", FIRST_AND_SECOND)
    done = bash(tmp_path, "run sh -c 'exit $WITH'; echo $CODE", FIRST=str(code), SECOND="0" if code == 0 else "75")
    assert done.stdout.split() == [str(code)]


@pytest.mark.parametrize("code", [140, 143])
def test_ended_by_the_signal_itself_is_told_to_stop(tmp_path: Path, code: int) -> None:
    """Before Python's handlers are in place, and in an evaluation, which has none."""
    command(tmp_path, "srun", FIRST_AND_SECOND)
    command(tmp_path, "scontrol", SCONTROL.format(code=0))
    lines = "run sh -c 'exit $WITH'; requeue_or_exit anew"
    done = bash(tmp_path, lines, FIRST=str(code), SECOND="75")
    assert done.returncode == 75
    assert "job 7 is requeued and starts again" in done.stdout
    assert (tmp_path / "calls").read_text() == "scontrol requeue 7\n"
    assert (
        bash(tmp_path, lines, FIRST=str(code), SECOND="137").returncode == 137
    )  # ended because of the other's failure


def test_a_saved_checkpoint_is_requeued_whatever_the_code(tmp_path: Path) -> None:
    """Rank 0 tidies up for longer than KillWait, and srun kills it."""
    command(tmp_path, "scontrol", SCONTROL.format(code=0))
    command(tmp_path, "srun", '#!/bin/sh\n[ "$SAVES" = no ] || echo x.ckpt > "$MMSSL_SAVED"\nexit 137\n')
    done = bash(tmp_path, "run mmssl; requeue_or_exit resume")
    assert done.returncode == 75
    assert "requeued and goes on from its checkpoint" in done.stdout
    (tmp_path / "calls").unlink()
    # A later start that fails has no part in it, even where the note was left behind.
    done = bash(tmp_path, 'mkdir -p "$NOTES"; echo x > "$MMSSL_SAVED"; run mmssl; requeue_or_exit resume', SAVES="no")
    assert done.returncode == 137
    assert not (tmp_path / "calls").exists()
    assert not (tmp_path / "runs/.slurm").exists()


def test_the_last_rank_notes_what_it_saved(tmp_path: Path, monkeypatch) -> None:
    stop = SystemExit(75)
    stop.line, stop.checkpoint = "", Path("runs/x/checkpoints/step=00000003.ckpt")
    monkeypatch.setenv("MMSSL_SAVED", str(tmp_path / "saved"))
    assert cli._exit_code(stop) == 75
    assert (tmp_path / "saved").read_text() == "runs/x/checkpoints/step=00000003.ckpt\n"
    (tmp_path / "saved").unlink()
    assert cli._exit_code(NothingBegun("SIGTERM")) == 75
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("saves", ["", "step=00000003.ckpt"])  # before the first step; in an endless validation
def test_starts_without_a_step_come_to_an_end(tmp_path: Path, saves: str) -> None:
    command(tmp_path, "scontrol", SCONTROL.format(code=0))
    command(tmp_path, "srun", '#!/bin/sh\n[ -z "$SAVES" ] || echo "$SAVES" > "$MMSSL_SAVED"\nexit 75\n')

    def start(saves: str) -> subprocess.CompletedProcess[str]:
        return bash(tmp_path, "run mmssl; requeue_or_exit resume", SAVES=saves)

    # Counted anew behind a step.
    codes = [start(saved).returncode for saved in ("", "", "", "", "step=00000003.ckpt", *[saves] * 4)]
    assert codes == [75] * 9
    done = start(saves)
    assert done.returncode == 2
    assert "job 7 was stopped 5 times in a row without a step" in done.stderr
    assert not (tmp_path / "runs/.slurm").exists()


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (75, 75), (143, 75), (1, 2), (2, 2)])
def test_told_to_stop_while_staging_is_requeued(tmp_path: Path, code: int, ends: int) -> None:
    command(tmp_path, "scontrol", SCONTROL.format(code=0))
    # The wrapper of srun's task, with this code in place of staging.
    command(tmp_path, "srun", f"#!/bin/bash\nexec \"${{@:$#-6:4}}\" sh -c 'exit {code}'\n")
    done = bash(tmp_path, "stage || requeue_or_exit resume; exit 0", MMSSL_STAGE="x")
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "calls").exists() == (ends == 75)
    assert ("staging failed" in done.stderr) == (ends == 2)


def test_a_job_that_is_cancelled_while_staging_trains_no_more(tmp_path: Path) -> None:
    command(tmp_path, "scontrol", SCONTROL.format(code=0))
    command(tmp_path, "squeue", SQUEUE.format(left="1:00"))
    command(tmp_path, "srun", "#!/bin/bash\necho srun >> calls\nkill -TERM $PPID\n")
    done = bash(tmp_path, "stage || requeue_or_exit resume; run mmssl; requeue_or_exit resume", MMSSL_STAGE="x")
    assert done.returncode == 75, done.stderr
    assert "SLURM ended job 7: it was cancelled, or SLURM itself requeues it; nothing was begun" in done.stdout
    assert (tmp_path / "calls").read_text() == "srun\n"


# Leaves out its options, runs the command as two tasks and returns the higher code.
FIRST_AND_SECOND = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
WITH=$FIRST "$@"; a=$?
WITH=$SECOND "$@"; b=$?
exit $((a > b ? a : b))
"""


def test_images(tmp_path: Path) -> None:
    words = srun_of(tmp_path, "run mmssl fit", MMSSL_IMAGE="mmssl.sif", MMSSL_MOUNTS="/data")
    always = f"{tmp_path}:{tmp_path},{ROOT}:{ROOT}"
    apptainer = ["apptainer", "exec", "--nv", "--bind", f"{always},/data", "--pwd", str(tmp_path), "mmssl.sif"]
    assert words[-10:] == [*apptainer, "mmssl", "fit"]
    image = "nvcr.io#nvidia/pytorch:26.10-py3"
    words = srun_of(tmp_path, "run mmssl fit", MMSSL_IMAGE=image, MMSSL_STAGE="x", MMSSL_STAGE_DIR="/disk")
    assert "--container-image=nvcr.io#nvidia/pytorch:26.10-py3" in words
    assert f"--container-mounts={always},/disk:/disk" in words
    assert words[-2:] == ["mmssl", "fit"]


def test_settings_that_are_set_stay(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export NCCL_SOCKET_IFNAME=ib0$NOT_SET\n")
    shown = "echo $NCCL_DEBUG $NCCL_SOCKET_IFNAME $OMP_NUM_THREADS ${MASTER_ADDR-none}"
    known = {"NCCL_DEBUG": "INFO", "MMSSL_SITE": str(site), "SLURM_CPUS_PER_GPU": "8", "MASTER_ADDR": "login"}
    done = bash(tmp_path, shown, **known)
    assert done.stdout.split() == ["INFO", "ib0", "8", "none"], done.stderr
    assert bash(tmp_path, shown, **known, MMSSL_MASTER_ADDR="n7").stdout.split()[-1] == "n7"


def test_what_is_filled_in(tmp_path: Path) -> None:
    lines = "fill_in a '{stage}/x-{0..3}.tar' 'run-{task}'; printf '%s\\n' \"${ARGS[@]}\""
    done = bash(tmp_path, lines, MMSSL_STAGE_DIR="/scratch/a&b", SLURM_ARRAY_TASK_ID="4")
    assert done.stdout.splitlines() == ["a", "/scratch/a&b/x-{0..3}.tar", "run-4"]


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


def test_two_files_of_one_name_are_not_staged(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_text(folder)
    environ = {**os.environ, "MMSSL_STAGE": "a/*.tar b/*.tar a/0.tar", "SLURM_JOB_ID": "7"}
    stage = ["bash", str(ROOT / "slurm/stage.sh"), "disk"]
    done = subprocess.run(stage, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "mmssl: error: MMSSL_STAGE names two files 0.tar, a/0.tar and b/0.tar; copies cannot both have that name\n"
    )
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_file_that_became_older_is_copied_again(tmp_path: Path) -> None:
    """The last version but one, put back: as large, and older than the copy."""
    (tmp_path / "0.tar").write_text("new")
    environ = {**os.environ, "MMSSL_STAGE": "*.tar", "SLURM_JOB_ID": "7"}
    stage = ["bash", str(ROOT / "slurm/stage.sh"), "disk"]
    subprocess.run(stage, cwd=tmp_path, env=environ, check=True)
    (tmp_path / "0.tar").write_text("old")
    os.utime(tmp_path / "0.tar", (1e9, 1e9))
    subprocess.run(stage, cwd=tmp_path, env=environ, check=True)
    assert (tmp_path / "disk/0.tar").read_text() == "old"


def test_other_files_are_staged_elsewhere(tmp_path: Path) -> None:
    folders = {bash(tmp_path, "echo $STAGE_DIR", MMSSL_STAGE=stage).stdout for stage in ("a/*.tar", "b/*.tar")}
    assert len(folders) == 2
    assert bash(tmp_path, "echo $STAGE_DIR", MMSSL_STAGE="a/*.tar", MMSSL_STAGE_DIR="/disk").stdout == "/disk\n"


def test_staging_that_is_told_to_stop_leaves_no_half_copy(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")  # a file of which more and more may come
    environ = {**os.environ, "MMSSL_STAGE": "*.tar", "SLURM_JOB_ID": "7"}
    stage = subprocess.Popen(["bash", str(ROOT / "slurm/stage.sh"), "disk"], cwd=tmp_path, env=environ)
    with open(tmp_path / "0.tar", "w"):  # waits until it is being copied
        stage.send_signal(signal.SIGUSR2)
        assert stage.wait(timeout=60) == 75
    assert list((tmp_path / "disk").iterdir()) == []
