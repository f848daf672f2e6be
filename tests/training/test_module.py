"""The schedule, the errors, and exact resume through the real command; test_strategies.py has the rest."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from lightning import Trainer
from pairs import TINY

import mmssl
from mmssl.cli import main
from mmssl.training.optim import adamw, warmup_cosine


def test_warm_up_and_cosine() -> None:
    factor = warmup_cosine(10, 110, 0.1)
    assert [factor(0), factor(4), factor(9)] == [0.1, 0.5, 1.0]
    assert factor(10) == 1.0
    assert factor(109) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)
    halfway = 10 + 99 / 2
    assert factor(int(halfway)) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 49 / 99)))


def test_what_is_not_decayed(tokenizer_path: str) -> None:
    module = mmssl.MMM(tokenizer_path, "vit_tiny_patch16_224", TINY, decoder_embed_dim=32, decoder_num_heads=4)
    optimizer = adamw(
        module, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, no_weight_decay=module.no_weight_decay()
    )
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in module.named_parameters()}
    network = "network.backbone."
    for free in ("vit.cls_token", "vit.pos_embed", "vit.norm.weight", "vit.blocks.0.mlp.fc1.bias", "text.position"):
        assert names[network + free] == 0, free
    for decayed in ("vit.blocks.0.mlp.fc1.weight", "vit.patch_embed.proj.weight", "text.token_embedding.weight"):
        assert names[network + decayed] == 0.05, decayed


@pytest.mark.parametrize(
    ("arguments", "trainer", "message"),
    [
        ({}, {"max_steps": 5, "gradient_clip_val": 1.0}, "clip_grad_norm"),
        ({}, {"max_epochs": 1}, "max_steps"),
        ({"warmup_steps": 5}, {"max_steps": 5}, "warmup_steps is 5"),
        ({}, {"max_steps": 5, "limit_train_batches": 5, "accumulate_grad_batches": 2}, "limit_train_batches is 5"),
    ],
)
def test_errors_before_training(
    arguments: dict[str, Any], trainer: dict[str, Any], message: str, pair_shards: str, tmp_path: Path
) -> None:
    module = mmssl.MAE("vit_tiny_patch16_224", TINY, decoder_embed_dim=32, decoder_num_heads=4, **arguments)
    data = mmssl.DataModule(pair_shards, batch_size=4, num_workers=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with pytest.raises(ValueError, match=message):
        Trainer(**quiet, **trainer, default_root_dir=tmp_path).fit(module, data)


def pair_config(folder: Path, tokenizer: str, shards: str) -> Path:
    """A small joint run whose every random part is on: dropped paths, scheduled ratio, crops, accumulation."""
    config = {
        "model": {
            "class_path": "mmssl.MMM",
            "init_args": {
                "tokenizer": tokenizer,
                "backbone": "vit_tiny_patch16_224",
                "backbone_options": {**TINY, "drop_path_rate": 0.2},
                "text_mask_ratio": [0.5, 0.2],
                "max_tokens": 32,
                "decoder_embed_dim": 32,
                "decoder_depth": 1,
                "decoder_num_heads": 4,
                "pad_to_multiple_of": 1,
                "warmup_steps": 2,
            },
        },
        "data": {"train": shards, "val": shards, "batch_size": 12, "num_workers": 1, "val_samples": 10},
        "trainer": {
            "max_steps": 8,
            "accumulate_grad_batches": 2,
            "val_check_interval": 6,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "logger": False,
        },
        "checkpoint": {"every_n_steps": 3, "keep": 10},
    }
    path = folder / "pairs.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def small(tokenizer: str, **arguments: Any) -> mmssl.MLM:
    return mmssl.MLM(tokenizer, "vit_tiny_patch16_224", TINY, max_tokens=32, pad_to_multiple_of=1, **arguments)


def fit(module: Any, data: Any, folder: Path, checkpoint: str | Path | None = None, **trainer: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    runner = Trainer(**quiet, accelerator="cpu", use_distributed_sampler=False, default_root_dir=folder, **trainer)
    runner.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return runner


def test_a_trial_of_a_recipe_with_warm_up(tokenizer_path: str, pair_shards: str, tmp_path: Path) -> None:
    data = mmssl.DataModule(pair_shards, batch_size=4, num_workers=0)
    module = small(tokenizer_path, warmup_steps=100)
    runner = fit(module, data, tmp_path, fast_dev_run=True, accumulate_grad_batches=2)
    assert runner.global_step == 1


def test_a_plain_trainer_leaves_nothing_in_its_folder(
    tokenizer_path: str, pair_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = mmssl.DataModule(pair_shards, batch_size=4, num_workers=0)
    fit(small(tokenizer_path), data, tmp_path, max_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_another_end_of_the_schedule_is_told(
    tokenizer_path: str, pair_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def data() -> mmssl.DataModule:
        return mmssl.DataModule(pair_shards, batch_size=4, num_workers=0)

    fit(small(tokenizer_path), data(), tmp_path, max_steps=2).save_checkpoint(tmp_path / "c.ckpt")
    fit(small(tokenizer_path), data(), tmp_path, tmp_path / "c.ckpt", max_steps=3)
    assert "trainer.max_steps was 2 in the checkpoint, now 3: the schedule ends there" in capsys.readouterr().err
    fit(small(tokenizer_path), data(), tmp_path, tmp_path / "c.ckpt", max_steps=2)
    assert "max_steps" not in capsys.readouterr().err


def test_what_does_not_fit_a_checkpoint_is_refused(tokenizer_path: str, pair_shards: str, tmp_path: Path) -> None:
    def data() -> mmssl.DataModule:
        return mmssl.DataModule(pair_shards, val=pair_shards, batch_size=4, val_samples=4, num_workers=0)

    path = tmp_path / "c.ckpt"
    fit(small(tokenizer_path), data(), tmp_path, max_steps=1, accumulate_grad_batches=3).save_checkpoint(path)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches was 3 in the checkpoint, now 2.*set trainer.acc"):
        fit(small(tokenizer_path), data(), tmp_path, path, max_steps=2, accumulate_grad_batches=2)

    # Of the same size, with two words the other way round: the weights would load.
    other = tmp_path / "other.json"
    content = json.loads(Path(tokenizer_path).read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer .*other.json is not the one .*tokenizer.json in the run's folder"):
        fit(small(str(other)), data(), tmp_path, path, max_steps=2, accumulate_grad_batches=3)
    runner = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer .*other.json is not the one"):
        runner.validate(small(str(other)), data(), ckpt_path=path, weights_only=True)
    runner.validate(small(tokenizer_path), data(), ckpt_path=path, weights_only=True)  # windows are training's


@pytest.mark.parametrize("scaler", [None, object()])
def test_no_fused_optimizer_under_a_gradient_scaler(tokenizer_path: str, scaler: object) -> None:
    """It unscales the gradients in its step only, and we clip before."""
    module = small(tokenizer_path)
    given = {"max_steps": 5, "gradient_clip_val": None, "limit_train_batches": 1.0, "fast_dev_run": False}
    module._trainer = Mock(spec=Trainer, **given, accumulate_grad_batches=1)
    module._trainer.precision_plugin.scaler = scaler
    optimizer = module.configure_optimizers()["optimizer"]
    assert optimizer.defaults["fused"] is (scaler is None)


def metrics(run: Path) -> dict[int, dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    timed = ("speed", "time", "health")
    return {int(row["step"]): {k: v for k, v in row.items() if not k.startswith(timed)} for row in rows}


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 steps of 24 pairs cross the end of the epoch of 64 pairs twice; the run is cut at step 3 and resumed."""
    monkeypatch.chdir(tmp_path)
    config = str(pair_config(tmp_path, tokenizer_path, pair_shards))
    assert main(["fit", "--config", config, "--run", "whole"]) == 0
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    shutil.copy("whole/config.yaml", "cut/config.yaml")
    shutil.copy("whole/checkpoints/step=00000003.ckpt", "cut/checkpoints/")
    torch.manual_seed(12345)  # the resumed process starts anywhere
    assert main(["fit", "--config", config, "--run", "cut", "--resume"]) == 0

    whole, cut = (
        torch.load(f"{run}/checkpoints/step=00000008.ckpt", weights_only=True, map_location="cpu")
        for run in ("whole", "cut")
    )
    for key, weight in whole["state_dict"].items():
        assert torch.equal(cut["state_dict"][key], weight), key
    for key, state in whole["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(cut["optimizer_states"][0]["state"][key][name], value), (key, name)
    assert cut["lr_schedulers"] == whole["lr_schedulers"]
    assert cut["DataModule"]["batches"] == whole["DataModule"]["batches"] == 16
    first, second = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert sorted(first) == list(range(1, 9))
    assert sorted(second) == [4, 5, 6, 7, 8]
    for step, row in second.items():
        assert {k: row[k] for k in row if k in first[step]} == {k: first[step][k] for k in row if k in first[step]}
