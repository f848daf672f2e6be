"""One run at W&B: real starts of ``mmssl fit`` against a small server, with the faults that real ones have."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
import wandb
import yaml
from wandb_server import WandbServer

from mmssl.cli import main

FIT = ["fit", "--config", "online.yaml", "--run", "runs/a"]


@pytest.fixture
def server(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """With toy_folder and in it online.yaml, a run that logs every step to this server."""
    config = yaml.safe_load((toy_folder / "toy.yaml").read_text())
    logger = {"class_path": "mmssl.training.loggers.Wandb", "init_args": {"finish_seconds": 3}}
    config["trainer"].update(log_every_n_steps=1, max_steps=10, val_check_interval=100, logger=logger)
    config["checkpoint"] = {"every_n_steps": 5, "keep": 9}
    (toy_folder / "online.yaml").write_text(yaml.safe_dump(config))
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", server.keys[0])
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("NETRC", "netrc")
        wandb.teardown()  # it remembers the address of an earlier test's
        yield server
        server.stalled = False
        wandb.teardown()


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_starts_are_one_run(server: WandbServer, toy_folder: Path):
    """The second goes on from an older checkpoint than the first got to: its steps are there twice, the later last."""
    assert main(FIT) == 0
    run = toy_folder / "runs/a"
    (run / "checkpoints/step=00000010.ckpt").unlink()
    assert main([*FIT, "--resume", "--trainer.max_steps=12"]) == 0

    ((name, kept),) = server.runs.items()
    assert name == (run / "wandb/id").read_text().strip()
    assert kept.display == kept.group == "a"
    assert server.asked.count("RunResumeStatus") == 2  # resume="allow": told what there is, and adds to it
    steps = [row["trainer/global_step"] for row in kept.history if "train/loss" in row]
    assert steps == [*range(1, 11), *range(6, 13)]
    assert [row["_step"] for row in kept.history] == list(range(len(kept.history)))  # W&B's own count never goes back
    losses = {}
    for row in kept.history:
        if "train/loss" in row:
            losses.setdefault(row["trainer/global_step"], []).append(row["train/loss"])
    assert all(len(set(twice)) == 1 for twice in losses.values())  # a resume is exact
    assert kept.config["trainer"]["max_steps"] == 12
    assert [int(row["step"]) for row in rows(run)] == list(range(1, 13))  # the file has every step once


@pytest.mark.parametrize("fault", ["stalled", "gone", 401, 413, 507])
def test_a_run_ends_though_its_server_fails_in_the_middle(
    server: WandbServer, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str
):
    step = toy.ToyModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 5:
            if fault == "stalled":
                server.stalled = True
            elif fault == "gone":
                server.stop()
            else:
                server.status = int(fault)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(toy.ToyModule, "training_step", training_step)
    assert main(FIT) == 0  # left to itself, W&B tries for as long as the server is not there
    run = toy_folder / "runs/a"
    assert [int(row["step"]) for row in rows(run)] == list(range(1, 11))
    assert all(row["train/loss"] for row in rows(run))
    assert (run / "checkpoints/step=00000010.ckpt").is_file()
    # What it did not take is on the disk.
    assert len(list(run.glob("wandb/run-*/*.wandb"))) == 1


def test_a_wrong_key_trains_offline(
    server: WandbServer, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_API_KEY", "1" * 40)
    assert main(FIT) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if "W&B" in line]
    assert len(said) == 1
    assert "W&B is offline (cannot connect: " in said[0]
    assert said[0].endswith("upload with: mmssl sync runs/a")
    assert len(rows(toy_folder / "runs/a")) == 10
