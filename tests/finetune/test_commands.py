"""Fine-tuning through the real command: every YAML in configs/finetune, resume, the best checkpoint, predictions."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
import yaml
from labelled import CLASSES, write_labelled
from pairs import TINY, caption, picture
from runs import train

from mmssl.cli import main
from mmssl.finetune.retrieval import places_of_partners
from mmssl.pretrained import load_backbone

CONFIGS = sorted((Path(__file__).parents[2] / "configs/finetune").glob("*.yaml"))


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str, pair_shards: str) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "mmm", "MMM", pair_shards, tokenizer=tokenizer_path, max_tokens=16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("labelled")
    return write_labelled(folder / "train.tar", 32), write_labelled(folder / "val.tar", 13, first=100)


def reduced(path: Path, backbone: Path, shards: tuple[str, str], **more: Any) -> list[str]:
    """The options that make a config's run a matter of a second."""
    options = {
        "model.init_args.backbone": backbone,
        "model.init_args.num_classes": CLASSES,
        "model.init_args.warmup_steps": 1,
        "model.init_args.compile_blocks": "false",
        "data.train": shards[0],
        "data.val": shards[1],
        "data.batch_size": 8,
        "data.num_workers": 0,
        "trainer.max_steps": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "false",
        **more,
    }
    if path.stem == "text":
        options["model.init_args.max_tokens"] = 16
    if path.stem == "retrieval":
        del options["model.init_args.num_classes"]
    return ["--config", str(path), *(f"--{key}={value}" for key, value in options.items())]


def column(path: Path, name: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_tests_and_predicts(
    path: Path, pair_run: Path, shards: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *reduced(path, pair_run, shards), "--run", "run"]) == 0
    metric = "recall/image_to_text@1" if path.stem == "retrieval" else "accuracy"
    accuracies = column(tmp_path / "run/metrics.csv", f"val/{metric}")
    assert len(accuracies) == 2
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == (2 if accuracies[0] >= accuracies[1] else 4)

    assert main(["test", "--run", "run", "--ckpt_path", "best"]) == 0
    assert column(tmp_path / "run/test.csv", f"test/{metric}") == pytest.approx([max(accuracies)])

    assert main(["predict", "--run", "run", "--ckpt_path", "best"]) == 0
    (file,) = (tmp_path / "run/predictions").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"val.tar/{i:06d}" for i in range(100, 113)]
    if path.stem == "retrieval":
        embeddings = [torch.tensor([line[side] for line in lines]) for side in ("image", "text")]
        places = places_of_partners(embeddings[0], embeddings[1])
        assert float((places < 1).float().mean()) == pytest.approx(max(accuracies))
        return
    assert [line["truth"] for line in lines] == [i % CLASSES for i in range(100, 113)]
    for line in lines:
        assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-4)
        assert line["probabilities"][line["label"]] == max(line["probabilities"])
    assert sum(line["label"] == line["truth"] for line in lines) / 13 == pytest.approx(max(accuracies))


def test_a_run_outlives_its_source(
    pair_run: Path, shards: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test, resume and load_backbone do without the pretraining run; pictures alone, from a backbone that has text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pair_run, "source")
    for name in ("image", "pair"):
        config = next(path for path in CONFIGS if path.stem == name)
        options = reduced(config, Path("source"), shards)
        assert main(["fit", *options, "--run", name]) == 0
    expected = [load_backbone(name).state_dict() for name in ("image", "pair")]
    shutil.rmtree("source")
    for name, weights in zip(("image", "pair"), expected, strict=True):
        assert main(["test", "--run", name]) == 0
        last = column(tmp_path / name / "metrics.csv", "val/accuracy")[-1]
        assert column(tmp_path / name / "test.csv", "test/accuracy") == pytest.approx([last])
        assert main(["fit", "--run", name, "--resume", "--trainer.max_steps=6"]) == 0
        trained = torch.load(tmp_path / name / "checkpoints/step=00000004.ckpt", weights_only=True)["state_dict"]
        ours = {key: value for key, value in weights.items() if key.startswith("backbone.")}
        assert any(".text." in key for key in ours) == (name == "pair")  # pictures carry no vocabulary along
        assert all(torch.equal(trained[f"network.{key}"], value) for key, value in ours.items())


def test_predictions_need_no_labels(
    pair_run: Path, shards: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = next(path for path in CONFIGS if path.stem == "pair")
    assert main(["fit", *reduced(config, pair_run, shards), "--run", "run"]) == 0
    with webdataset.TarWriter("new.tar") as writer:
        for i in range(5):
            writer.write({"__key__": f"{i}", "png": picture(i), "txt": caption(i)})
    assert main(["predict", "--run", "run", "--data.val", "new.tar"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/predictions/labels-0.jsonl").read_text().splitlines()]
    assert [(line["key"], line["truth"]) for line in lines] == [(f"new.tar/{i}", None) for i in range(5)]


def test_a_resumed_run_equals_an_uninterrupted_one(
    pair_run: Path, shards: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drop path, mixup, cutmix and validation in between."""
    monkeypatch.chdir(tmp_path)
    config = next(path for path in CONFIGS if path.stem == "image")
    options = reduced(config, pair_run, shards, **{"checkpoint.every_n_steps": 3, "trainer.max_steps": 6})
    assert main(["fit", *options, "--run", "whole"]) == 0
    half = tmp_path / "half/checkpoints"
    half.mkdir(parents=True)
    (half / "step=00000003.ckpt").write_bytes((tmp_path / "whole/checkpoints/step=00000003.ckpt").read_bytes())
    assert main(["fit", *options, "--run", "half", "--resume"]) == 0
    whole, resumed = (
        torch.load(tmp_path / run / "checkpoints/step=00000006.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "half")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_early_stopping(
    pair_run: Path, shards: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric that cannot grow any more stops the run at the second validation; the run ends well."""
    monkeypatch.chdir(tmp_path)
    path = next(path for path in CONFIGS if path.stem == "image")
    config = yaml.safe_load(path.read_text())
    stop = config["trainer"]["callbacks"][1]
    assert stop["class_path"].endswith("EarlyStopping")
    stop["init_args"] |= {"patience": 1, "min_delta": 1.0}
    own = tmp_path / "image.yaml"
    own.write_text(yaml.safe_dump(config))
    assert main(["fit", *reduced(own, pair_run, shards, **{"trainer.max_steps": 20}), "--run", "run"]) == 0
    assert (tmp_path / "run/checkpoints/step=00000004.ckpt").is_file()
    assert column(tmp_path / "run/metrics.csv", "val/accuracy").__len__() == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.num_classes=2", "num_classes to 4 or more"),
        ("--model.init_args.backbone=runs/none", "runs/none"),
        ("--model.init_args.tokenizer=tokenizer.json", "tokenizer"),  # a classifier of pictures has none
        ("--model.init_args.layer_decay=2", "layer_decay is 2"),
    ],
)
def test_mistakes_are_said_in_one_line(
    option: str,
    message: str,
    pair_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shard = write_labelled(tmp_path / "a.tar", 8, dict.fromkeys(range(8), 3))
    config = next(path for path in CONFIGS if path.stem == "image")
    assert main(["fit", *reduced(config, pair_run, (shard, shard)), option, "--run", "run"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmssl: error")]
    assert message in line


def test_a_monitor_that_no_validation_gives(
    shards: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before the run, not at its first validation."""
    monkeypatch.chdir(tmp_path)
    config = next(path for path in CONFIGS if path.stem == "image")
    options = reduced(
        config, Path("null"), shards, **{"model.init_args.target": "regression", "model.init_args.num_classes": 1}
    )
    zero = [f"--model.init_args.{name}=0" for name in ("mixup", "cutmix", "label_smoothing")]
    scratch = ["--model.init_args.backbone_name=vit_tiny_patch16_224", "--model.init_args.drop_path_rate=0"]
    options = [option for option in options if "init_args.backbone=" not in option]
    tiny = f"--model.init_args.backbone_options={json.dumps(TINY)}"
    assert main(["fit", *options, *zero, *scratch, "--model.init_args.backbone=null", tiny, "--run", "run"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "monitors val/accuracy, but the validation of ImageClassifier gives val/loss, val/loss_label" in line
