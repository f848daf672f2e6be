"""Steps that must change nothing, a rank that is slow, a run that stands still."""

import copy
import csv
import faulthandler
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from forks import together
from ranks import fit, tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmssl.cli import main
from mmssl.training.callbacks import ranks
from mmssl.training.callbacks.health import Health
from mmssl.training.callbacks.ranks import Pace, Slowest
from mmssl.training.guard import SkipError, StepGuard
from mmssl.training.hangs import HangWatch
from mmssl.training.strategies import whole
from mmssl.training.votes import Clock

TESTS = Path(__file__).parents[1]


def at(moment: str, what: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    return "disturb.Disturb", {"at": moment, "what": what, **arguments}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e6])
def test_a_skipped_step_changes_nothing(fused: bool, spoil: float) -> None:
    """Weights, moments and counts stay to the bit, before there are moments and after."""
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
    guard = StepGuard()
    guard.limit = 1e5
    for step in range(1, 7):
        bad = step in (1, 2, 4)
        network(torch.randn(2, 4)).square().sum().backward()
        assert network.weight.grad is not None
        if bad:
            network.weight.grad[0, 0] = spoil
        guard.note([f"shard/{step}"])
        before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
        guard.check(optimizer, torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]), step)
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(value, before[0][name]) for name, value in network.state_dict().items()) == bad
        if bad:
            for number, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    assert torch.equal(value, before[1].get(number, {}).get(name, torch.zeros_like(value))), name
    steps = guard.read()
    assert [number for number, skipped in steps if skipped] == [1, 2, 4]
    assert steps[3][1] is not None
    assert steps[3][1].keys == ["shard/4"]
    assert guard.read() == []


def test_a_skipped_step_changes_nothing_under_fsdp(tmp_path: Path) -> None:
    def rank_of_two(rank: int) -> None:
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        guard = StepGuard()
        for step in range(1, 5):
            bad = step in (1, 3)
            (network(torch.randn(2, 4)).square().sum() * (torch.nan if bad and rank else 1.0)).backward()
            before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
            norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
            guard.check(optimizer, whole(norm), step)
            optimizer.step()
            optimizer.zero_grad()
            for name, value in network.state_dict().items():
                assert torch.equal(whole(value), whole(before[0][name])) == bad, (step, name)
            for number, state in optimizer.state_dict()["state"].items() if bad else ():
                for name, value in state.items():
                    assert torch.equal(whole(value), whole(before[1].get(number, {}).get(name, 0 * value)))
        assert [number for number, skipped in guard.read() if skipped] == [1, 3]

    together(2, tmp_path / "meet", rank_of_two)


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_s_bad_gradient_is_skipped_by_all(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, strategy: str
) -> None:
    config = tiny_config(tokenizer_path, pair_shards, steps=8)
    overlay = ["--config", str(TESTS.parent / "configs" / "strategy" / f"{strategy}.yaml")]
    spoils = at("backward", "nan", rank=1, step=3)
    codes, said = fit(tmp_path / "run", config, *overlay, "--model.lr=0.01", callbacks=[spoils])
    assert codes == [0, 0], said
    assert said.count("step 4 is skipped: the norm of its gradients is nan") == 1
    numbers = rows(tmp_path / "run")
    assert [float(row["train/skipped_steps"]) for row in numbers] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert all(float(row["train/loss"]) < 10 for row in numbers)  # NaN is not
    [line] = map(json.loads, (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["grad_norm"], len(line["keys"])) == (4, "nan", 8)


@pytest.mark.timeout(300)
def test_a_slow_rank_is_named(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "WINDOWS", 3)
    monkeypatch.setattr(ranks, "SECONDS", 3.0)
    slow = ("disturb.Slow", {"rank": 1, "seconds": 1.5})
    codes, said = fit(tmp_path / "run", tiny_config(tokenizer_path, pair_shards, steps=8), callbacks=[slow])
    assert codes == [0, 0], said
    assert "warning: rank 1 on " in said
    assert all(row["health/slowest_rank"] and row["speed/rank_wait_seconds"] for row in rows(tmp_path / "run"))


def test_a_rank_s_own_time_ends_where_it_meets_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    for micro_batches in (1, 2):  # of which the second one meets nobody
        for micro_batch in range(micro_batches):
            clock.begins(torch.device("cpu"))
            now += 0.5
            if micro_batch == 0:
                clock.enters()
                now += 0.25
                clock.leaves()
            now += 8.0
    assert clock.read() == (1.0, 0.5)
    assert clock.read() == (0.0, 0.0)


def test_too_many_in_a_row_stop_the_run(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    config = tiny_config(tokenizer_path, pair_shards, steps=20)
    config["data"]["num_workers"] = 0
    config["trainer"] |= {"accumulate_grad_batches": 2, "devices": 1}
    config["health"] = {"skip_grad_norm": 1e-9, "skip_limit": 3}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml", "--run", "run"]) == 2
    said = capsys.readouterr().err
    assert "mmssl: error: 3 steps in a row were skipped, up to step 3" in said
    assert "the weights are those of step 0" in said
    lines = [json.loads(line) for line in Path("run/skipped_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line["keys"])) for line in lines] == [(1, 16), (2, 16), (3, 16)]
    assert ", ".join(lines[-1]["keys"][:8]) in said


def on_a_gpu(folder: Path, saved: dict[str, Any] | None = None) -> tuple[Health, Any, Any]:
    """The callback in a run whose device the host does not wait for between two logged steps."""
    trainer = Mock(pl.Trainer, world_size=1, global_step=0, log_every_n_steps=50, default_root_dir=folder)
    trainer.strategy = Mock(root_device=torch.device("cuda"))
    module = Mock(pl.LightningModule, guard=StepGuard(), votes=None)
    health = Health(skip_limit=4, hang_minutes=None)
    health.setup(trainer, module, "fit")
    if saved is not None:
        trainer.global_step = saved["step"]
        health.on_load_checkpoint(trainer, module, saved)
    health.on_train_start(trainer, module)

    def train(norms: list[float]) -> None:
        for norm in norms:
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
            module.guard.check(optimizer, torch.tensor(norm), trainer.global_step + 1)
            trainer.global_step += 1
            health.on_train_batch_end(trainer, module, None, None, trainer.global_step)

    def save() -> dict[str, Any]:
        checkpoint: dict[str, Any] = {"step": trainer.global_step}
        health.on_save_checkpoint(trainer, module, checkpoint)
        return checkpoint

    return health, train, save


def test_a_checkpoint_holds_the_skips_that_no_one_has_looked_at(tmp_path: Path) -> None:
    """Preempted every other step, a run whose gradients stay bad stops all the same."""
    saved = None
    for _ in range(2):
        health, train, save = on_a_gpu(tmp_path, saved)
        train([torch.nan, torch.inf])
        saved = save()
    assert health.skipped == 4
    assert len((tmp_path / "skipped_steps.jsonl").read_text().splitlines()) == 4
    with pytest.raises(SkipError, match=r"4 steps in a row were skipped, up to step 4.*weights are those of step 0"):
        train([1.0])

    health, train, save = on_a_gpu(tmp_path, saved)  # the same, but the row ends behind the checkpoint
    train([1.0, torch.nan])
    assert save()["skipped_in_a_row"] == 1


def test_the_end_of_a_run_looks_at_what_came_behind_the_last_logged_step(tmp_path: Path) -> None:
    health, train, _ = on_a_gpu(tmp_path)
    trainer, module = Mock(pl.Trainer, world_size=1, default_root_dir=tmp_path), Mock(pl.LightningModule)
    train([1.0, torch.nan, 1.0])
    health.on_train_end(trainer, module)
    assert health.skipped == 1
    train([torch.nan] * 4)
    with pytest.raises(SkipError, match="up to step 7"):
        health.on_train_end(trainer, module)


def test_only_who_stays_slower_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    slowest = Slowest()

    def window(*own: float, seconds: float = 12.0) -> dict[str, float]:
        return slowest.judge([Pace(f"node{rank}", 0.1, mine) for rank, mine in enumerate(own)], 10, seconds)

    assert window(1.0, 4.0, 1.0, 1.2) == {"slowest_rank": 1, "imbalance": pytest.approx(0.25)}
    for _ in range(8):
        window(1.0, 4.0, 1.0, 1.2)
    window(4.0, 1.0, 1.0, 1.2)  # another one
    for _ in range(9):
        window(1.0, 4.0, 1.0, 1.0)
    window(1.0, 2.0, 1.0, 1.0)  # not by much
    for _ in range(9):
        window(1.0, 4.0, 1.0, 1.0)
    assert capsys.readouterr().err == ""
    window(1.0, 4.0, 1.0, 1.0)
    assert "rank 1 on node1 is slower than the others, for 100 steps now" in capsys.readouterr().err
    for _ in range(30):
        window(1.0, 4.0, 1.0, 1.0)
    assert [line.split("for ")[1].split(" steps")[0] for line in capsys.readouterr().err.splitlines()] == ["200", "400"]


def test_a_rank_of_a_run_of_seconds_is_not_called_slow(capsys: pytest.CaptureFixture[str]) -> None:
    slowest = Slowest()
    for _ in range(200):  # a tiny run's steps of 10 ms, each logged
        slowest.judge([Pace("here", 0.0, 0.001), Pace("here", 0.004, 0.005)], 1, 0.01)
    assert capsys.readouterr().err == ""


@pytest.mark.timeout(300)
def test_a_rank_that_never_comes_is_reported_by_all(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> None:
    config = tiny_config(tokenizer_path, pair_shards, steps=50)
    config["health"] = {"hang_minutes": 5.0}
    sleeps = at("train", "sleep", rank=1, step=2, seconds=10000)
    codes, said = fit(tmp_path / "run", config, callbacks=[("disturb.Impatient", {"seconds": 9.0}), sleeps])
    assert codes == [1, 1], said
    assert "nothing has moved for 0.15 minutes" in said
    waits, hangs = ((tmp_path / "run" / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in (0, 1))
    assert "sum_over_ranks" in waits
    assert 'disturb.py", line' in hangs
    assert "in _now" in hangs


def test_a_call_that_holds_the_lock_is_reported_too(tmp_path: Path) -> None:
    code = (
        "import ctypes, pathlib\nfrom mmssl.training.hangs import HangWatch\n"
        f"watch = HangWatch(pathlib.Path({str(tmp_path / 'stacks.txt')!r}), 0.5, 0)\n"
        "watch.start()\nimport time; time.sleep(0.3)\nctypes.PyDLL(None).sleep(100)\n"
    )
    started = subprocess.run([sys.executable, "-c", code], timeout=60, cwd=TESTS.parent, check=False)
    assert started.returncode == 1
    assert 'File "<string>", line 6' in (tmp_path / "stacks.txt").read_text()


def test_what_is_stopped_winds_up_no_timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is just about to when the run ends."""
    about_to, go_on, did = threading.Event(), threading.Event(), list[str]()

    def wind_up(*args: Any, **kwargs: Any) -> None:
        about_to.set()
        go_on.wait()
        did.append("wound up")

    monkeypatch.setattr(faulthandler, "dump_traceback_later", wind_up)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: did.append("cancelled"))
    watch = HangWatch(tmp_path / "stacks.txt", 100.0, 0)
    watch.start()
    assert about_to.wait(60)
    ends = threading.Thread(target=watch.stop)
    ends.start()
    assert watch._stop.wait(60)
    ends.join(0.2)  # as far as it gets
    go_on.set()
    ends.join()
    assert did == ["wound up", "cancelled"]
    assert not (tmp_path / "stacks.txt").exists()


def test_a_run_that_ends_leaves_no_stacks(toy_folder: Path) -> None:
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a", "--health.hang_minutes", "5"]) == 0
    assert not list(toy_folder.glob("runs/a/stacks/*"))


def test_options_that_cannot_be() -> None:
    for name, value in {"skip_grad_norm": 0.0, "skip_limit": 0, "hang_minutes": 0.0}.items():
        with pytest.raises(ValueError, match=f"health.{name} is 0"):
            Health(**{name: value})
