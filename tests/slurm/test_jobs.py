"""Jobs of one node on a real SLURM: the time limit, chains, arrays, evaluation, ``mmssl submit``."""

import json
import re
from pathlib import Path

import pytest
from cluster import Slurm, until

from mmssl.cli import main
from mmssl.training.callbacks.ledger import read_ledger
from mmssl.training.checkpoint import latest_checkpoint, step_of


def lines_of(log: Path) -> str:
    return log.read_text() if log.exists() else ""


@pytest.mark.timeout(900)
def test_the_time_limit_requeues_scancel_does_not_and_a_chain_goes_on(slurm: Slurm, work: Path) -> None:
    line = ["tiny.yaml", "--trainer.callbacks.init_args.seconds", "2"]
    one = slurm.submit("pretrain.sbatch", *line, options="--nodelist=n3 --signal=USR2@150")
    two = slurm.submit("pretrain.sbatch", *line, log="two", options=f"--nodelist=n3 --dependency=afterany:{one}")
    # Trains before its limit is near, however slow the machine; SLURM looks at limits every half minute.
    ledger = work / "runs/tiny/ledger/rank-00000.jsonl"
    until(lambda: '"step": 2' in lines_of(ledger), "the first steps", 240, lambda: lines_of(work / "log"))
    hours, minutes, _ = map(int, slurm.job(one)["RunTime"].split(":"))
    slurm("scontrol", "update", f"JobId={one}", f"TimeLimit={hours * 60 + minutes + 3}")
    slurm.requeued(one, 1, seconds=180)
    slurm("scontrol", "update", f"JobId={one}", "TimeLimit=20")  # so that its second start is ended by scancel alone
    assert "SIGUSR2: stopped after step" in lines_of(work / "log")
    saved = step_of(latest_checkpoint(work / "runs/tiny"))
    assert saved > 0
    assert slurm.job(two)["Reason"] == "Dependency"

    # `scancel` saves, and the job stays cancelled; the next link of the chain goes on.
    until(lambda: f"from step {saved} to step 60" in lines_of(work / "log"), "the second start", 120)
    slurm("scancel", one)
    assert slurm.wait(one, "CANCELLED")["Restarts"] == "1"
    until(lambda: f"SLURM ended job {one}" in lines_of(work / "log"), "the end of the script", 30)
    (work / "runs/tiny/hurry").touch()
    slurm.wait(two, "COMPLETED")
    assert step_of(latest_checkpoint(work / "runs/tiny")) == 60
    assert list(read_ledger(work / "runs/tiny")) == list(range(1, 61))


@pytest.mark.timeout(600)
def test_an_array_trains_each_task_in_its_folder_and_is_evaluated(slurm: Slurm, work: Path, pair_shards: str) -> None:
    line = ["tiny.yaml", "--trainer.max_steps", "3", "--data.seed", "{task}"]
    array = slurm.submit("finetune.sbatch", *line, log="log-%a", options="--array=0-1 --nodelist=n3")
    for task in ("0", "1"):
        slurm.wait(f"{array}_{task}", "COMPLETED")
        assert f"seed: {task}\n" in (work / f"runs/tiny-{task}/config.yaml").read_text()
        assert not (work / f"runs/tiny-{task}/lock").exists()
    assert read_ledger(work / "runs/tiny-0") != read_ledger(work / "runs/tiny-1")

    # With the shards on the node's disk, and in an image: a stand-in for Apptainer notes how it is called.
    apptainer = work / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(
        f'#!/bin/bash\necho "$@" >> {work}/called\nwhile [ "$1" != mmssl.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    apptainer.chmod(0o755)
    job = slurm.submit(
        "evaluate.sbatch", "runs/tiny-0", "validate", "--data.val", "{stage}/pairs-*.tar", log="evaluated",
        options="--nodelist=n3 --gpus-per-node=1", MMSSL_STAGE=f"{Path(pair_shards).parent}/*.tar",
        MMSSL_STAGE_DIR=str(work / "disk"), MMSSL_IMAGE="mmssl.sif", PATH=f"{apptainer.parent}:{slurm.environ['PATH']}",
    )  # fmt: skip
    slurm.wait(job, "COMPLETED")
    assert "2 files copied, 0 there already" in lines_of(work / "evaluated")
    assert (
        (work / "called")
        .read_text()
        .rstrip()
        .endswith(f"mmssl.sif mmssl validate --run runs/tiny-0 --data.val {work}/disk/pairs-*.tar")
    )
    assert "val/loss" in (work / "runs/tiny-0/validate.csv").read_text()


@pytest.mark.timeout(600)
def test_submit(slurm: Slurm, work: Path, monkeypatch, capsys) -> None:
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)
    options = [
        "--nodes",
        "1",
        "--gpus_per_node",
        "1",
        "--cpus_per_gpu",
        "1",
        "--time",
        "10:00",
        "--slurm",
        "nodelist=n4",
    ]
    assert main(["submit", "tiny.yaml", *options, "--folder", "jobs", "--run", "runs/sub"]) == 0
    said = capsys.readouterr().out
    job, log = re.search(r"submitted job (\d+); log: (\S+)", said).groups()
    until(lambda: "training MMM" in lines_of(Path(log)), "the first start", 120, lambda: lines_of(Path(log)))

    # While it runs, its folder is its own.
    lock = json.loads((work / "runs/sub/lock").read_text())
    assert lock["job"] == job
    assert main(["fit", "--config", "tiny.yaml", "--run", "runs/sub"]) == 2
    assert f"runs/sub is being trained by SLURM job {job}" in capsys.readouterr().err

    slurm("scancel", "--signal=USR2", job)
    slurm.requeued(job, 1)
    saved = step_of(latest_checkpoint(work / "runs/sub"))
    (work / "runs/sub/hurry").touch()
    slurm.wait(job, "COMPLETED")
    assert f"from step {saved} to step 60" in lines_of(Path(log))
    assert list(read_ledger(work / "runs/sub")) == list(range(1, 61))
