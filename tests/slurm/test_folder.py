"""What a run takes from SLURM, its folder's lock, ``--resume_or_start``, and the environment report."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment

from mmssl.cli import lock, main
from mmssl.cli.cluster import fit_to_job, geometry
from mmssl.cli.environment import report, variables
from mmssl.cli.extras import plugins
from mmssl.cli.folder import default_run
from mmssl.cli.keys import UsageError
from mmssl.cli.submit import minutes

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}


def test_nodes_and_devices_come_from_slurm() -> None:
    assert geometry({}) is None
    assert geometry({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # in a batch script, without srun
    assert geometry(STEP) == (2, 4)
    trainer = {"num_nodes": 1, "devices": "auto"}
    fit_to_job(trainer, set(), STEP)
    assert trainer == {"num_nodes": 2, "devices": 4}
    with pytest.raises(UsageError, match=r"trainer.devices is 8, but SLURM started 2 nodes x 4 tasks; leave it out"):
        fit_to_job({"num_nodes": 2, "devices": 8}, {"trainer.devices"}, STEP)
    with pytest.raises(UsageError, match="7 tasks on 2 nodes"):
        geometry({**STEP, "SLURM_STEP_NUM_TASKS": "7"})


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_STEP_ID": "4294967290"},  # salloc's
        {"SLURM_JOB_NAME": "bash"},  # srun --pty bash
        {"SLURM_JOB_NAME": "interactive"},
        {"SLURM_JOB_NAME": "zsh", "SLURM_PTY_PORT": "40000"},
    ],
)
def test_an_interactive_shell_is_no_task(monkeypatch, shell: dict[str, str]) -> None:
    environ = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "1", **shell}
    trainer = {"num_nodes": 1, "devices": "auto"}
    fit_to_job(trainer, set(), environ)
    assert trainer == {"num_nodes": 1, "devices": "auto"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins(None))
    assert geometry({**STEP, "SLURM_JOB_NAME": "bash"}) == (2, 4)  # a batch job may have that name
    for name, value in {**STEP, "SLURM_JOB_NAME": "mmssl"}.items():
        monkeypatch.setenv(name, value)
    assert any(isinstance(plugin, SLURMEnvironment) for plugin in plugins(None))


def test_an_array_task_has_its_own_folder(monkeypatch) -> None:
    args = ["fit", "--config", "configs/mmm.yaml"]
    assert default_run(args) == "runs/mmm"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert default_run(args) == "runs/mmm-3"


def test_times() -> None:
    written = ["30", "1:30", "2:00:00", "1-0", "1-12:30", "0:00:01"]
    assert [minutes(text) for text in written] == [30, 2, 120, 1440, 2190, 1]
    with pytest.raises(UsageError, match="--time 'a day' is not a time"):
        minutes("a day")


def test_submit_s_dry_run_and_without_submitit(toy_folder: Path, monkeypatch, capsys) -> None:
    options = ["--nodes", "2", "--gpus_per_node", "4", "--partition", "gpu", "--slurm", "mem=0", "--dry_run"]
    assert main(["submit", "toy.yaml", *options, "--data.batch_size", "8"]) == 0
    script = capsys.readouterr().out
    for line in ("nodes=2", "gpus-per-node=4", "partition=gpu", "mem=0", "requeue", "signal=USR2@300", "time=1440"):
        assert f"#SBATCH --{line}\n" in script
    assert "slurm/pretrain.sbatch toy.yaml --data.batch_size 8\n" in script
    assert not (toy_folder / "runs").exists()
    assert main(["submit", "toy.yaml", "--slurm", "array=0-1", "--dry_run"]) == 2
    assert "--slurm array=0-1: use sbatch --array=0-1 slurm/pretrain.sbatch CONFIG" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["submit", "toy.yaml"]) == 2
    assert "needs submitit: pip install 'mmssl[slurm]'" in capsys.readouterr().err


def test_resume_or_start(toy_folder: Path, capsys) -> None:
    line = [
        "fit",
        "--config",
        "toy.yaml",
        "--run",
        "runs/a",
        "--resume_or_start",
        "--trainer.val_check_interval",
        "100",
    ]
    assert main([*line, "--trainer.max_steps", "3"]) == 0
    assert main([*line, "--trainer.max_steps", "6"]) == 0
    assert "from step 3 to step 6" in capsys.readouterr().out
    assert main([*line, "--trainer.max_steps", "6"]) == 0
    assert "it is finished" in capsys.readouterr().out

    [last] = (toy_folder / "runs/a/checkpoints").glob("step=00000006.ckpt")
    for path in (toy_folder / "runs/a/checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:100])
    for _ in range(2):  # also once the damaged ones are set aside
        assert main([*line, "--trainer.max_steps", "9"]) == 2
        assert "damaged" in capsys.readouterr().err
    assert not last.exists()

    for path in (toy_folder / "runs/a/checkpoints").iterdir():
        path.unlink()
    assert main([*line, "--trainer.max_steps", "3"]) == 0  # as after a kill before the first checkpoint
    assert "runs/a was stopped before its first checkpoint; it starts again from step 0" in capsys.readouterr().out
    assert main([*line, "--ckpt_path", "x.ckpt"]) == 2


def owner(**changes: object) -> dict[str, object]:
    return {**lock._me(), "id": "another", **changes}


def test_a_lock_of_a_living_process_is_respected(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps(owner()))
    with pytest.raises(UsageError, match=f"is being trained by process {os.getpid()} on "):
        with lock.locked(tmp_path):
            pass
    assert json.loads((tmp_path / "lock").read_text())["id"] == "another"


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "lock").write_text(json.dumps(owner(pid=child.pid, process=lock._process(child.pid))))
    with pytest.raises(UsageError):
        with lock.locked(tmp_path):
            pass
    child.kill()
    child.wait()
    said: list[str] = []
    with lock.locked(tmp_path, said.append):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]
    assert not (tmp_path / "lock").exists()
    assert [line for line in said if "is dead; this process goes on" in line] == said != []


def test_slurm_tells_which_jobs_live(tmp_path: Path, monkeypatch) -> None:
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    mine = lock._me()
    elsewhere = owner(process=["boot", "ns", "1"], job="12", step="0")
    for script, alive in [
        ("echo 12 RUNNING", True),
        ("echo 12 PENDING", False),
        ("echo 12 COMPLETING", True),  # after scancel it still saves
        ("true", False),
        ("echo 14 PENDING; echo 13 COMPLETING; echo 12 RUNNING", True),  # an array, whose first task has its number
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None),
    ]:
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)
        assert lock._is_alive(elsewhere, mine) is alive, script
    requeued = {**mine, "job": "12", "step": "0"}
    assert lock._is_alive(elsewhere, requeued) is False  # an earlier start of the same job
    assert lock._is_alive({**elsewhere, "step": "1"}, requeued) is None
    assert lock._is_alive({**elsewhere, "cluster": "a"}, {**requeued, "cluster": "b"}) is None  # another job 12


def test_an_owner_whose_job_ends_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1.0)
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 12 COMPLETING\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path, said = tmp_path / "lock", []
    ending = owner(process=["boot", "ns", "1"], job="12")
    path.write_text(json.dumps(ending))
    saved = threading.Timer(0.6, path.unlink)  # its checkpoint is saved, and it leaves
    saved.start()
    with lock.locked(tmp_path, said.append):
        saved.join()
    assert len(said) == 1
    assert "SLURM job 12, process" in said[0]
    assert "whose job is ending; waiting until it is gone" in said[0]

    path.write_text(json.dumps(ending))  # killed, while its node tidies up
    with lock.locked(tmp_path, said.append):
        assert "is dead; this process goes on" in said[-1]

    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.3)  # it never ends
    path.write_text(json.dumps(ending))
    with pytest.raises(UsageError, match="is being trained by SLURM job 12"):
        with lock.locked(tmp_path, said.append):
            pass


LOSES_ITS_LOCK = """
import time
from pathlib import Path
from mmssl.cli import lock

lock.TOUCH_SECONDS = 0.05
with lock.locked(Path("run")):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_an_owner_that_lost_its_lock_ends_at_once(tmp_path: Path) -> None:
    """As the process of a job that was requeued because its node did not answer."""
    (tmp_path / "run").mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", LOSES_ITS_LOCK], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    other = json.dumps(owner(job="13"))
    (tmp_path / "other").write_text(other)
    (tmp_path / "other").rename(tmp_path / "run/lock")
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert said.startswith("mmssl: error: run belongs to SLURM job 13, process")
    assert (tmp_path / "run/lock").read_text() == other


def test_a_link_that_was_made_counts_though_nfs_says_it_is_there(tmp_path: Path, monkeypatch) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    with lock.locked(tmp_path, lambda line: None):
        pass


def test_an_unknown_owner_is_watched(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.05)
    unknown = owner(process=["boot", "ns", "1"], job=None)
    (tmp_path / "lock").write_text(json.dumps(unknown))
    said: list[str] = []
    with lock.locked(tmp_path, said.append):
        assert "counts as dead after 1 s without a sign of life" in said[0]
        # Seen from a machine that knows nothing of this one, the touches say that it lives.
        monkeypatch.setattr(lock, "_is_alive", lambda owner, mine: None)
        with pytest.raises(UsageError, match="is being trained"):
            with lock.locked(tmp_path, said.append):
                pass


def test_the_report_tells_no_secrets() -> None:
    environ = {
        "SLURM_JOB_ID": "5", "NCCL_DEBUG": "INFO", "WANDB_PROJECT": "p", "WANDB_API_KEY": "s3cret", "HOME": "/root",
        "MMSSL_TOKEN": "s3cret", "NCCL_NET": "https://user:s3cret@proxy/", "AWS_SECRET_ACCESS_KEY": "s3cret",
    }  # fmt: skip
    shown = variables(environ)
    assert list(shown) == ["SLURM_JOB_ID", "MMSSL_TOKEN", "NCCL_DEBUG", "NCCL_NET", "WANDB_PROJECT"]
    text = "\n".join(report(environ))
    assert "s3cret" not in text
    assert "torch 2" in text
    assert "NCCL_DEBUG=INFO" in text


def test_env_is_a_command(capsys) -> None:
    assert main(["env"]) == 0
    assert capsys.readouterr().out.startswith("mmssl ")
