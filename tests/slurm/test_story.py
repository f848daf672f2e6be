"""A run on two nodes that is signalled, preempted, loses a node and then a rank, and leaves no sample out.

One story, because every start of a job costs seconds: each chapter goes on where the one before it was stopped.
"""

import os
import signal
from pathlib import Path

import pytest
from cluster import Slurm, until

from mmssl.cli import main
from mmssl.training.callbacks.ledger import _lines, read_ledger
from mmssl.training.checkpoint import damage_of, latest_checkpoint, step_of

STEPS = 60


@pytest.mark.timeout(900)
def test_one_run_through_everything(slurm: Slurm, work: Path) -> None:
    run = work / "runs/tiny"
    line = ["tiny.yaml", "--trainer.callbacks.init_args.seconds", "2.5"]  # on a slow machine a job starts in 70 s
    nodes = "--nodes=2 --nodelist=n1,n2"

    # A signal, as `--signal` sends it before the time limit: checkpoint, exit code 75, requeue.
    job = slurm.submit("pretrain.sbatch", *line, options=nodes)
    reached(run, 1, 3, slurm, job)
    report = (work / "log").read_text()
    assert f"job {job}, start 1 on n[1-2]: 2 x 1 tasks" in report
    assert "on 2 x cpu" in report  # both ranks joined
    assert "SLURM_NNODES=2" in report
    assert sorted(path.name for path in (run / "ledger").iterdir()) == ["rank-00000.jsonl", "rank-00001.jsonl"]

    # Meanwhile another job is refused the folder: rank 0 fails, srun ends rank 1, and nothing is requeued.
    other = slurm.submit("pretrain.sbatch", *line, log="other", options=nodes)
    assert slurm.wait(other, "FAILED")["ExitCode"] == "2:0"
    assert f"runs/tiny is being trained by SLURM job {job}" in (work / "other").read_text()

    slurm("scancel", "--signal=USR2", job)

    slurm.requeued(job, 1)
    saved = last_saved(run)
    assert saved >= 3
    assert f"job {job} is requeued and goes on from its checkpoint" in (work / "log").read_text()

    # A job of a higher partition takes the nodes: SIGTERM, checkpoint, requeue within the grace time.
    reached(run, 2, saved + 2, slurm, job)
    assert starts(run) == [0, saved]
    high = slurm("sbatch", "--parsable", "--partition=high", *nodes.split(), "--exclusive", "--wrap", "srun hostname")
    slurm.requeued(job, 2)
    assert last_saved(run) > saved
    saved = last_saved(run)
    assert "SIGTERM" in (work / "log").read_text()
    slurm.wait(high, "COMPLETED")

    # A node goes away with its rank: SLURM requeues by itself, and the run goes on from the checkpoint before.
    reached(run, 3, saved + 2, slurm, job)
    slurm.crash("n2")
    slurm.requeued(job, 3)
    assert last_saved(run) == saved or last_saved(run) % 20 == 0
    assert "Node failure on n2" in (work / "log").read_text()
    saved = last_saved(run)
    slurm.start()

    # A rank is killed: the job fails, without a hang (the watch would wait half an hour) and without a requeue.
    reached(run, 4, saved + 2, slurm, job)
    os.kill(slurm.process_of(job, rank=1), signal.SIGKILL)
    assert slurm.wait(job, "FAILED")["Restarts"] == "3"
    saved = last_saved(run)

    # The same line again goes on, to the end.
    (run / "hurry").touch()
    job = slurm.submit("pretrain.sbatch", *line, options=nodes)
    slurm.wait(job, "COMPLETED")
    assert starts(run)[-1] == saved
    assert last_saved(run) == STEPS

    # Every step trained on the same samples as in a run that nothing happened to, on one process.
    (work / "runs/whole").mkdir()
    (work / "runs/whole/hurry").touch()
    assert main(["fit", "--config", "tiny.yaml", "--run", "runs/whole"]) == 0
    assert read_ledger(run) == read_ledger(work / "runs/whole")
    assert list(read_ledger(run)) == list(range(1, STEPS + 1))


def starts(run: Path) -> list[int]:
    """The step from which each start of the run went on."""
    return [entry["start"] for entry in _lines(run / "ledger/rank-00000.jsonl") if "start" in entry]


def last_saved(run: Path) -> int:
    path = latest_checkpoint(run)
    assert damage_of(path) is None
    return step_of(path)


def reached(run: Path, start: int, step: int, slurm: Slurm, job: str) -> None:
    """Wait until the run was started so many times and is at a step."""
    path = run / "ledger/rank-00000.jsonl"

    def there() -> bool:
        assert slurm.state(job) in ("PENDING", "RUNNING", "CONFIGURING"), Path("log").read_text()
        lines = list(_lines(path)) if path.exists() else []
        begun = [i for i in range(len(lines)) if "start" in lines[i]]
        return len(begun) == start and any(entry["step"] >= step for entry in lines[begun[-1] + 1 :])

    until(there, f"step {step} of start {start}", 120, lambda: Path("log").read_text())
