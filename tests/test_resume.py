"""A config that changed between two starts: every changed key is applied and told, or refused, on real runs."""

import csv
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
import yaml
from pairs import TINY, picture
from runs import SMALL

import mmssl
from mmssl.backbone import make_backbone
from mmssl.cli import main
from mmssl.cli.keys import UsageError
from mmssl.cli.resume import DATA, MODEL, REST, changes_since
from mmssl.data.datamodule import DataModule
from mmssl.training.module import PretrainModule
from mmssl.training.optim import warmup_cosine


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, pair_shards: str) -> Path:
    """A run of a small masked autoencoder at its fourth of eight steps."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    config = {
        "model": {
            "class_path": "mmssl.MAE",
            "init_args": {
                "backbone": "vit_tiny_patch16_224",
                "backbone_options": {**TINY, "drop_path_rate": 0.1},
                "lr": 1e-3,
                "warmup_steps": 2,
                **SMALL,
            },
        },
        "data": {"train": pair_shards, "batch_size": 8, "num_workers": 0},
        "trainer": {
            "max_steps": 8,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "logger": False,
            "limit_val_batches": 0,
        },
        "checkpoint": {"every_n_steps": 4, "keep": 9},
    }
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder.with_suffix(".yaml")), "--run", str(folder)]) == 0
    (folder / "checkpoints" / "step=00000008.ckpt").rename(folder / "whole.ckpt")
    return folder


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "run"))


def resume(run: Path, *options: str) -> dict[str, Any]:
    """Go on to the end; returns the last checkpoint."""
    assert main(["fit", "--run", str(run), "--resume", *options]) == 0
    newest = sorted((run / "checkpoints").glob("*.ckpt"))[-1]
    return torch.load(newest, weights_only=True)


def rates(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]


def changes(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "changed" in line]


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_without_a_change_nothing_is_said_and_nothing_differs(run: Path, capsys: pytest.CaptureFixture[str]):
    after = resume(run)
    assert said(capsys) == []
    assert not (run / "changes.jsonl").exists()
    whole = torch.load(run / "whole.ckpt", weights_only=True)
    assert all(torch.equal(after["state_dict"][name], value) for name, value in whole["state_dict"].items())
    assert after["optimizer_states"][0]["param_groups"] == whole["optimizer_states"][0]["param_groups"]
    assert after["lr_schedulers"] == whole["lr_schedulers"]


def test_optimizer_and_schedule_take_the_new_values(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Equal, to the bit, to a run whose checkpoint was edited by hand to hold the new values."""
    new = {"lr": 2e-3, "weight_decay": 0.5, "eps": 1e-4, "warmup_steps": 6, "min_lr_ratio": 0.1}
    options = [f"--model.{name}={value}" for name, value in new.items()] + ["--model.betas=[0.5,0.6]"]

    by_hand = Path(shutil.copytree(run, tmp_path / "by_hand"))
    path = by_hand / "checkpoints" / "step=00000004.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    factor = warmup_cosine(6, 8, 0.1)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group.update(betas=(0.5, 0.6), eps=1e-4, initial_lr=2e-3, lr=2e-3 * factor(4))
        group["weight_decay"] = 0.5 if group["weight_decay"] else 0.0
    checkpoint["lr_schedulers"][0].update(base_lrs=[2e-3, 2e-3], _last_lr=[2e-3 * factor(4)] * 2)
    torch.save(checkpoint, path)
    config = yaml.safe_load((by_hand / "config.yaml").read_text())
    config["model"]["init_args"].update(new, betas=[0.5, 0.6])
    (by_hand / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()

    expected = resume(by_hand)
    assert said(capsys) == []
    after = resume(run, *options)
    assert len(said(capsys)) == 6
    assert all(torch.equal(after["state_dict"][name], value) for name, value in expected["state_dict"].items())
    groups = after["optimizer_states"][0]["param_groups"]
    assert {(tuple(g["betas"]), g["eps"], g["initial_lr"]) for g in groups} == {((0.5, 0.6), 1e-4, 2e-3)}
    assert sorted(g["weight_decay"] for g in groups) == [0.0, 0.5]
    old = warmup_cosine(2, 8, 0.0)
    steps = [1e-3 * old(step) for step in range(4)] + [2e-3 * factor(step) for step in range(4, 8)]
    assert rates(run) == pytest.approx(steps)  # the first step behind the resume has the new rate as well
    noted = {change["key"].removeprefix("model.init_args."): change for change in changes(run)}
    assert (noted["lr"]["old"], noted["lr"]["new"]) == (1e-3, 2e-3)
    assert set(noted) == {*new, "betas"}
    assert {change["step"] for change in noted.values()} == {4}

    # And what was changed stays: the next start has nothing to say.
    capsys.readouterr()
    resume(run, "--trainer.max_steps=9")
    assert [line.split(":")[2].strip() for line in said(capsys)] == ["trainer.max_steps"]
    assert rates(run)[-1] == pytest.approx(2e-3 * 0.1)


def test_a_later_end_of_the_schedule(run: Path, capsys: pytest.CaptureFixture[str]):
    resume(run, "--trainer.max_steps=6")
    assert "trainer.max_steps: 8 -> 6 (the schedule ends there)" in said(capsys)[0]
    schedule = warmup_cosine(2, 6, 0.0)
    assert rates(run)[4:] == pytest.approx([1e-3 * schedule(4), 0.0])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model.mask_ratio=0.5"], "model.init_args.mask_ratio: 0.75 -> 0.5"),
        (["--model.norm_pix_loss=false"], "model.init_args.norm_pix_loss: true -> false"),
        (["--model.clip_grad_norm=0.001"], "model.init_args.clip_grad_norm: 1.0 -> 0.001"),
        (["--model.backbone_options.drop_path_rate=0.0"], "backbone_options.drop_path_rate: 0.1 -> 0.0"),
        (["--data.num_workers=1"], "data.num_workers: 0 -> 1"),
        (["--trainer.precision=bf16-mixed"], "trainer.precision: null -> bf16-mixed"),
        (["--checkpoint.keep=1"], "checkpoint.keep: 9 -> 1"),
        (["--trainer.callbacks+=mmssl.SampleLedger"], "trainer.callbacks[SampleLedger]: null -> mmssl"),
    ],
)
def test_what_is_built_anew_is_applied(run: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str):
    after = resume(run, *options)
    (told,) = said(capsys)
    assert told.startswith("mmssl: changed from step 4 on: ")
    assert line in told
    assert len(changes(run)) == 1
    whole = torch.load(run / "whole.ckpt", weights_only=True)
    same = all(torch.equal(after["state_dict"][name], value) for name, value in whole["state_dict"].items())
    trains_alike = any(word in line for word in ("num_workers", "keep", "callbacks"))
    assert same == trains_alike


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--data.batch_size=16"],
            "data.batch_size was 8 when this run last trained, now 16: it decides which samples",
        ),
        (["--data.seed=1"], "data.seed was 0 when this run last trained, now 1: it decides which samples"),
        (["--data.lanes=2"], "data.lanes was null when this run last trained, now 2: it decides which samples"),
        (["--seed_everything=1"], "seed_everything was 0 when this run last trained, now 1: the checkpoint holds"),
        (["--trainer.accumulate_grad_batches=2"], "accumulate_grad_batches was 1 when this run last trained, now 2"),
        (["--model.decoder_depth=2"], "model.init_args.decoder_depth was 1 when this run last trained, now 2"),
        (["--model.backbone=vit_small_patch16_224"], "model.init_args.backbone was vit_tiny_patch16_224 when"),
        # Of the same sizes: the weights would load, and compute something else.
        (
            ["--model.backbone_options.options={embed_dim: 48, depth: 2, num_heads: 6}"],
            "num_heads was 3 when this run last trained, now 6: the",
        ),
        (["--model.init_from=x.ckpt"], "init_from was null when this run last trained, now x.ckpt: the weights come"),
    ],
)
def test_what_cannot_change_is_refused_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
):
    before = files(run)
    assert main(["fit", "--run", str(run), "--resume", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mmssl: error: ")
    assert "\n" not in error
    assert said in error
    assert "set it back to" in error
    assert files(run) == before


def test_lanes_that_are_the_default_s_anyway(run: Path, capsys: pytest.CaptureFixture[str]):
    resume(run, "--data.lanes=8")
    assert said(capsys) == []


def test_what_the_command_line_says_beats_the_checkpoint_s_hyperparameters(run: Path):
    """Lightning's own CLI would take lr from the checkpoint."""
    checkpoint = resume(run, "--model.lr=0.005")
    assert checkpoint["hyper_parameters"]["lr"] == 0.005
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.005


def test_another_tokenizer_is_refused_and_a_moved_one_taken(
    joint_run: Path, tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(joint_run, tmp_path / "run"))
    content = json.loads(Path(tokenizer_path).read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (tmp_path / "other.json").write_text(json.dumps(content))
    config = tmp_path / "new.yaml"

    def start(tokenizer: Path) -> int:
        content = yaml.safe_load((run / "config.yaml").read_text())
        content["model"]["init_args"]["tokenizer"] = str(tokenizer)
        content["trainer"]["max_steps"] = 5
        config.write_text(yaml.safe_dump(content))
        return main(["fit", "--config", str(config), "--run", str(run), "--resume"])

    assert start(tmp_path / "other.json") == 2
    assert "model.init_args.tokenizer was" in capsys.readouterr().err
    shutil.copy(tokenizer_path, tmp_path / "moved.json")
    assert start(tmp_path / "moved.json") == 0
    assert [line for line in said(capsys) if "tokenizer" in line] == []


@pytest.mark.parametrize("scratch", [True, False])
def test_a_fine_tuned_backbone_takes_another_drop_path_rate(
    image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scratch: bool
):
    """Its shape comes from the checkpoint, how it is trained from the config."""
    with webdataset.TarWriter(str(tmp_path / "labelled.tar")) as writer:
        for i in range(16):
            writer.write({"__key__": f"{i:06d}", "png": picture(i), "cls": str(i % 4).encode()})
    model: dict[str, Any] = {"num_classes": 4, "backbone": str(image_run), "drop_path_rate": 0.1}
    key = "drop_path_rate"
    if scratch:
        options = {**TINY, "drop_path_rate": 0.1}
        model = {"num_classes": 4, "backbone_name": "vit_tiny_patch16_224", "backbone_options": options}
        key = "backbone_options.drop_path_rate"
    config = {
        "model": {"class_path": "mmssl.ImageClassifier", "init_args": model},
        "data": {"train": str(tmp_path / "labelled.tar"), "batch_size": 8, "num_workers": 0},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--run", str(run)]) == 0

    rates = []

    def spied(name: str, options: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(options["drop_path_rate"])
        return make_backbone(name, options, *args, **kwargs)

    monkeypatch.setattr("mmssl.finetune.base.make_backbone", spied)
    resume(run, "--trainer.max_steps=3")
    capsys.readouterr()
    resume(run, f"--model.{key}=0.5", "--trainer.max_steps=4")
    assert rates == [0.1, 0.5]
    assert f"model.init_args.{key}: 0.1 -> 0.5 (when the model is built)" in "\n".join(said(capsys))
    assert main(["fit", "--run", str(run), "--resume", "--trainer.max_steps=5", "--model.pool=cls"]) == 2
    assert "model.init_args.pool was mean when this run last trained, now cls" in capsys.readouterr().err


def test_every_argument_of_every_class_has_a_rule():
    """A new argument must say what its change in mid-run means."""
    from fnmatch import fnmatchcase

    def named(rules: Any, name: str) -> bool:
        return name in ("tokenizer",) or any(fnmatchcase(name, rule.pattern) for rule in rules if rule.pattern != "*")

    exported = [getattr(mmssl, name) for name in mmssl.__all__]
    modules = [cls for cls in exported if isinstance(cls, type) and issubclass(cls, PretrainModule)]
    assert len(modules) >= 6
    for cls in modules:
        for base in cls.__mro__[: cls.__mro__.index(PretrainModule) + 1]:
            for argument in inspect.signature(base.__init__).parameters:
                if argument not in ("self", "kwargs"):
                    assert named(MODEL, argument), f"{cls.__name__}.{argument}"
    told = {"num_workers", "val_batch_size", "budget", "prefetch_factor", "allow_appended", "bad_samples"}
    told |= {"cache_dir", "cache_limit_gb", "multiprocessing_context"}  # of no weight for what is learnt
    for argument in inspect.signature(DataModule.__init__).parameters:
        assert argument == "self" or argument in told or named(DATA, argument), argument
    assert {rule.verdict for rule in (*MODEL, *DATA, *REST)} == {"applied", "refused", "nothing"}


def test_a_class_of_one_s_own(toy_folder: Path, capsys: pytest.CaptureFixture[str]):
    """Its arguments are applied as far as it reads them, and the line says just that."""
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a", "--trainer.max_steps=4"]) == 0
    capsys.readouterr()
    options = ["--trainer.max_steps=6", "--model.step_seconds=0.001", "--data.workers=1"]
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/a", "--resume", *options]) == 0
    lines = said(capsys)
    assert len(lines) == 3
    assert "step_seconds: 0.0 -> 0.001 (as far as ToyModule reads it from the config" in "\n".join(lines)


def test_arguments_that_an_older_mmssl_did_not_have(run: Path):
    text = (run / "config.yaml").read_text()
    config = yaml.safe_load(text)
    del config["model"]["init_args"]["flip"], config["data"]["budget"], config["checkpoint"]["every_n_steps"]
    config["trainer"].pop("inference_mode")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert [change.key for change in changes_since(run, text)] == ["checkpoint.every_n_steps"]  # 4; the default is 1000


def test_a_config_that_no_run_wrote_is_not_compared_with(run: Path):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("data: {batch_size: 999}\n")
    assert changes_since(run, text) == []


def test_tables_and_callbacks_that_an_older_mmssl_did_not_know(run: Path):
    """What the older config lacks is no change where it has its default."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": "mmssl.training.callbacks.pictures.Pictures", "init_args": {"samples": 4}}
    ]
    older = {key: value for key, value in config.items() if key != "health"}
    (run / "config.yaml").write_text(yaml.safe_dump(older))
    config["trainer"]["callbacks"][0]["init_args"]["every_n_steps"] = 1000
    assert changes_since(run, yaml.safe_dump(config)) == []
    config["trainer"]["callbacks"][0]["init_args"]["every_n_steps"] = 500
    config["health"]["skip_limit"] = 3
    assert {change.key: change.new for change in changes_since(run, yaml.safe_dump(config))} == {
        "trainer.callbacks[Pictures].init_args.every_n_steps": 500,
        "health.skip_limit": 3,
    }


def test_what_this_mmssl_does_not_have_any_more_cannot_be_set_back(run: Path):
    text = (run / "config.yaml").read_text()
    config = yaml.safe_load(text)
    config["model"]["init_args"]["decoder_width"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UsageError) as refused:
        changes_since(run, text)
    said = str(refused.value)
    assert "decoder_width was 3 when this run last trained, and this version of MAE has no decoder_width" in said
    assert "set it back" not in said
    assert "begin a new run with --model.init_args.init_from" in said


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [("1e-3", 0.001, True), (0.0015, "15e-4", True), ("1e-3", 0.002, False), (["9e-1", 0.95], [0.9, 0.95], True)],
)
def test_a_number_that_yaml_takes_for_text_is_that_number(run: Path, was: Any, now: Any, same: bool):
    config = yaml.safe_load((run / "config.yaml").read_text())
    key = "betas" if isinstance(was, list) else "lr"
    config["model"]["init_args"][key] = was
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    config["model"]["init_args"][key] = now
    assert (changes_since(run, yaml.safe_dump(config)) == []) == same
