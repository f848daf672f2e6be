"""Fine-tuning on plain files: what is packed, how labels are numbered, what is refused; through real runs."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from pairs import COLOURS, TINY, caption, picture
from test_classifiers import SCRATCH, trainer

import mmssl
from mmssl.cli import main
from mmssl.data.shards import ShardSet
from mmssl.finetune.packing import Files

NAMES = list(COLOURS)


@pytest.fixture(autouse=True)
def _packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def image_folder(folder: Path, numbers: range) -> str:
    """Pictures in folders named by the colour of the square."""
    for i in numbers:
        path = folder / NAMES[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return str(folder)


def table(path: Path, numbers: range, label: Callable[[int], Any] = lambda i: NAMES[i % 4]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption", "colour"])
        for i in numbers:
            (path.parent / f"{i}.png").write_bytes(picture(i))
            rows.writerow([f"{i}.png", caption(i), label(i)])
    return str(path)


def saved_dataset(folder: Path, numbers: range) -> str:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "colour": datasets.ClassLabel(names=NAMES),
        }
    )
    rows = [{"image": {"bytes": picture(i), "path": None}, "caption": caption(i), "colour": i % 4} for i in numbers]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder))
    return str(folder)


def labels_of(data: mmssl.FilesData) -> dict[bytes, int]:
    """Label by picture, from the shards that a data module streams."""
    shards = ShardSet(data.train["train"]["shards"])
    samples = [shards.read(i).members for i in range(len(shards))]
    return {members["png"]: int(members["cls"]) for members in samples}


SOURCES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "folder": lambda home: {"train": image_folder(home / "images", range(40)), "folder_labels": True},
    "csv": lambda home: {"train": table(home / "a.csv", range(40)), "image": "file", "label": "colour"},
    "dataset": lambda home: {"train": saved_dataset(home / "saved", range(40)), "image": "image", "label": "colour"},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_labels_by_name_and_by_number(kind: str, tmp_path: Path) -> None:
    data = mmssl.FilesData(**SOURCES[kind](tmp_path), batch_size=8, num_workers=0)
    data.prepare_data()
    names = NAMES if kind == "dataset" else sorted(NAMES)  # of a saved data set classes are numbers already
    assert labels_of(data) == {picture(i): names.index(NAMES[i % 4]) for i in range(40)}
    (packed,) = (tmp_path / "xdg/mmssl/packed").iterdir()
    assert (packed / "classes.json").exists() == (kind != "dataset")
    if kind != "dataset":
        assert json.loads((packed / "classes.json").read_text()) == names


def test_an_image_folder_is_learnt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = mmssl.ImageClassifier(**SCRATCH, lr=3e-3, crop_scale=(0.9, 1.0))
    data = mmssl.FilesData(
        image_folder(tmp_path / "images", range(64)), folder_labels=True, val_part=0.2, batch_size=16, num_workers=0
    )
    run = trainer(tmp_path / "run", 150)
    run.fit(module, data)
    assert run.logged_metrics["val/accuracy"] > 0.9
    assert json.loads((tmp_path / "run/classes.json").read_text()) == sorted(NAMES)


def test_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_path: str) -> None:
    """Pairs from a table; packed once; validation by the training's numbers; stopped, resumed, predicted."""
    config = {
        "model": {
            "class_path": "mmssl.PairClassifier",
            "init_args": {**SCRATCH, "tokenizer": tokenizer_path, "max_tokens": 16, "backbone_options": TINY},
        },
        "data": {
            "class_path": "mmssl.FilesData",
            "init_args": {
                "train": table(tmp_path / "a/train.csv", range(32)),
                "val": table(tmp_path / "b/val.csv", range(40, 43)),
                "image": "file",
                "text": "caption",
                "label": "colour",
                "batch_size": 8,
                "num_workers": 0,
            },
        },
        "trainer": {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "devices": 1, "logger": False},
    }
    path, run = tmp_path / "c.yaml", str(tmp_path / "run")
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path), "--run", run]) == 0
    said = capsys.readouterr().out
    assert said.count("mmssl: packed") == 2
    assert "packed 32 samples" in said
    assert main(["fit", "--run", run, "--resume", "--trainer.max_steps", "6"]) == 0
    assert main(["predict", "--run", run]) == 0
    assert "mmssl: packed" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/predictions/labels-0.jsonl").read_text().splitlines()]
    assert [row["truth"] for row in rows] == [sorted(NAMES).index(NAMES[i % 4]) for i in range(40, 43)]

    lines = (tmp_path / "b/val.csv").read_text().splitlines()
    (tmp_path / "b/new.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))  # without the label
    fresh = ["--data.init_args.val", str(tmp_path / "b/new.csv"), "--data.init_args.label", "null"]
    assert main(["predict", "--run", run, *fresh]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/predictions/labels-0.jsonl").read_text().splitlines()]
    assert [row["truth"] for row in rows] == [None] * 3


def test_predictions_of_pictures_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of their own, while the config has val_part and folder_labels; then without the training files."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", range(24))
    (tmp_path / "new").mkdir()
    for i in range(5):
        (tmp_path / "new" / f"{i}.png").write_bytes(picture(i))
    config = {
        "model": {"class_path": "mmssl.ImageClassifier", "init_args": SCRATCH},
        "data": {
            "class_path": "mmssl.FilesData",
            "init_args": {"train": "photos", "folder_labels": True, "val_part": 0.2, "batch_size": 8, "num_workers": 0},
        },
        "trainer": {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "devices": 1, "logger": False},
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml", "--run", "run"]) == 0
    fresh = ["--run", "run", "--data.init_args.val", "new"]

    def truths() -> dict[str, Any]:
        lines = Path("run/predictions/labels-0.jsonl").read_text().splitlines()
        return {row["key"]: row["truth"] for row in map(json.loads, lines)}

    capsys.readouterr()
    for _ in range(2):
        assert main(["predict", *fresh]) == 0
        assert truths() == {f"train-000000.tar/{i}": None for i in range(5)}
    assert capsys.readouterr().out.count("mmssl: packed") == 1  # the new ones, once
    assert main(["test", *fresh]) == 2
    assert "new: the labels 'new' are not among the 4 of run/classes.json" in capsys.readouterr().err

    shutil.rmtree("photos")
    image_folder(tmp_path / "more", range(30, 38))
    for command in ("test", "predict"):
        assert main([command, "--run", "run", "--data.init_args.val", "more"]) == 0
    assert truths() == {
        f"train-000000.tar/{NAMES[i % 4]}/{i}": sorted(NAMES).index(NAMES[i % 4]) for i in range(30, 38)
    }
    assert main(["test", "--run", "run"]) == 2
    assert "photos: not found" in capsys.readouterr().err


def test_the_run_decides_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Names that changed behind a run's back are refused by test and --resume, and the run's folder stays as it was."""
    monkeypatch.chdir(tmp_path)
    for part, numbers in (("photos", range(32)), ("others", range(32, 40))):
        for i in numbers:
            path = tmp_path / part / ("dog", "yak")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i))
    config = {
        "model": {"class_path": "mmssl.ImageClassifier", "init_args": {**SCRATCH, "num_classes": 2}},
        "data": {
            "class_path": "mmssl.FilesData",
            "init_args": {
                "train": "photos",
                "val": "others",
                "folder_labels": True,
                "classes": None,
                "batch_size": 8,
                "num_workers": 0,
            },
        },
        "trainer": {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "devices": 1, "logger": False},
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml", "--run", "run"]) == 0
    names = Path("run/classes.json").read_text()
    assert json.loads(names) == ["dog", "yak"]

    def says(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments[:1], "--run", "run", *arguments[1:]]) == 2
        assert Path("run/classes.json").read_text() == names
        return str(capsys.readouterr().err)

    for part in ("photos", "others"):
        Path(part, "yak").rename(Path(part, "ant"))
    refused = "others: the labels 'ant' are not among the 2 of run/classes.json ('dog', 'yak'); correct them"
    assert refused in says("test")
    assert "photos: has the labels 'ant', but this run was trained with the 2 of run/classes.json; restore" in says(
        "fit", "--resume", "--trainer.max_steps", "3"
    )
    assert "data.classes are other ones than those of run/classes.json" in says(
        "test", "--data.init_args.classes", "[yak, dog]"
    )

    Path("others/ant").rename("others/yak")  # the run's numbers, whatever the training files are called by now
    assert main(["predict", "--run", "run"]) == 0
    rows = map(json.loads, Path("run/predictions/labels-0.jsonl").read_text().splitlines())
    assert sorted((row["key"].split("/")[1], row["truth"]) for row in rows) == [("dog", 0)] * 4 + [("yak", 1)] * 4
    Path("photos/ant").rename("photos/yak")
    capsys.readouterr()
    assert main(["fit", "--run", "run", "--resume", "--trainer.max_steps", "3"]) == 0
    assert "mmssl: packed" not in capsys.readouterr().out
    assert Path("run/classes.json").read_text() == names


def test_held_out_samples_by_the_numbers_of_the_run(tmp_path: Path) -> None:
    """With val_part: where a folder has gone, the other classes keep their numbers in a test."""
    source = image_folder(tmp_path / "images", range(40))
    options = {"folder_labels": True, "val_part": 0.3, "batch_size": 4, "num_workers": 0}
    data, module = mmssl.FilesData(source, **options), mmssl.ImageClassifier(**SCRATCH)
    trainer(tmp_path / "run", 1).fit(module, data)
    shutil.rmtree(tmp_path / "images/blue")
    trainer(tmp_path / "run", 1).test(module, data)
    assert labels_of(data).items() <= {
        (picture(i), sorted(NAMES).index(NAMES[i % 4])) for i in range(40) if NAMES[i % 4] != "blue"
    }
    (tmp_path / "run/classes.json").write_text('{"blue": 0}')
    with pytest.raises(ValueError, match=r"run/classes\.json is no list of classes' names"):
        trainer(tmp_path / "run", 1).test(module, data)


def test_a_run_without_names_after_one_with_names(tmp_path: Path) -> None:
    """In the same folder: the earlier one's classes do not decide for the later one's test."""
    words = table(tmp_path / "a/a.csv", range(8))
    numbers = table(tmp_path / "b/b.csv", range(8), lambda i: i % 4)
    for source in (words, numbers):
        data = mmssl.FilesData(source, source, image="file", label="colour", batch_size=4, num_workers=0)
        run, module = trainer(tmp_path / "run", 1), mmssl.ImageClassifier(**SCRATCH)
        run.fit(module, data)
        assert (tmp_path / "run/classes.json").exists() == (source == words)
        run.test(module, data)


def test_what_changed_is_packed_anew(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", range(8))

    def packed() -> dict[bytes, int]:
        data = mmssl.FilesData(source, image="file", label="colour", batch_size=8, num_workers=0)
        data.prepare_data()
        return labels_of(data)

    before = packed()
    (tmp_path / "3.png").write_bytes(picture(20))  # the table itself is as it was
    os.utime(tmp_path / "3.png", ns=(1, 1))
    after = packed()
    assert before.keys() - after.keys() == {picture(3)}
    assert after.keys() - before.keys() == {picture(20)}
    assert not list((tmp_path / "xdg/mmssl/packed").glob(".packing*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda home: {"train": str(home / "none")}, "none: not found"),
        (lambda home: {"train": str(home), "val": str(home), "val_part": 0.1}, "val and val_part 0.1 are both given"),
        (lambda home: {"train": str(home), "classes": ["a", "a"]}, "names a class twice"),
        (
            lambda home: {"train": table(home / "a.csv", range(8)), "image": "picture"},
            r"has no column 'picture' .* its columns are file, caption, colour",
        ),
        (
            lambda home: {**SOURCES["csv"](home), "classes": ["red", "green"]},
            r"the labels 'blue', 'grey' are not among the 2 of classes",
        ),
        (
            lambda home: {**SOURCES["folder"](home), "classes": ["red", "green", "blue"]},
            r"images: the labels 'grey' are not among the 3 of classes",
        ),
        (
            lambda home: {**SOURCES["csv"](home), "val": table(home / "b/b.csv", range(4), lambda i: "pink")},
            r"b.csv: the labels 'pink' are not among the 4 of the training data",
        ),
        (
            lambda home: {**SOURCES["csv"](home), "val": table(home / "b/b.csv", range(4), lambda i: i)},
            r"b.csv: the labels '0', '1', '2', '3' are not among the 4 of the training data",
        ),
        (
            lambda home: {
                "train": table(home / "a.csv", range(8), lambda i: i % 4),
                "val": table(home / "b/b.csv", range(4)),
                "image": "file",
                "label": "colour",
            },
            r"b.csv: the labels 'blue', 'green', 'grey', 'red' are not among the numbers of the training data",
        ),
        (lambda home: {**SOURCES["csv"](home), "val_part": 1e-9}, "val_part 1e-09 of 40 samples holds none out"),
        (lambda home: {**SOURCES["csv"](home), "packed_dir": "/proc/none"}, "packed_dir /proc/none cannot be written"),
    ],
)
def test_what_cannot_be_used_is_named(make: Callable[[Path], dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        mmssl.FilesData(**make(tmp_path), batch_size=4, num_workers=0).prepare_data()


def test_too_many_that_cannot_be_used(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", range(40))
    for i in range(2):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 40 samples cannot be used \(2 x .*the first: .*row 1"):
        mmssl.FilesData(source, image="file", batch_size=4, num_workers=0).prepare_data()
    assert not list((tmp_path / "xdg/mmssl/packed").iterdir())


def test_saved_datasets_that_are_not_what_they_seem(tmp_path: Path) -> None:
    whole = datasets.load_from_disk(saved_dataset(tmp_path / "whole", range(8)))
    whole.select([5, 1]).save_to_disk(str(tmp_path / "chosen"))
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(str(tmp_path / "both"))
    options: dict[str, Any] = {"image": "image", "label": "colour", "batch_size": 2, "num_workers": 0}
    with pytest.raises(ValueError, match=r"holds several data sets \(test, train\); name the folder of one"):
        mmssl.FilesData(str(tmp_path / "both"), **options).prepare_data()
    data = mmssl.FilesData(str(tmp_path / "both/test"), **options)
    data.prepare_data()
    assert len(labels_of(data)) == 8
    data = mmssl.FilesData(str(tmp_path / "chosen"), **options)
    data.prepare_data()
    assert labels_of(data) == {picture(5): 1, picture(1): 1}
    state = json.loads((tmp_path / "chosen/state.json").read_text())  # as earlier versions of datasets left it
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "chosen/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"save it again after dataset\.flatten_indices\(\)"):
        mmssl.FilesData(str(tmp_path / "chosen"), **options).prepare_data()


@pytest.mark.parametrize(
    ("source", "count", "message"),
    [
        ("folder", 2, r"has 4 classes \('blue', .*\), but num_classes is 2; set model.num_classes to 4$"),
        (
            "folder",
            6,
            r"4 classes .* but num_classes is 6; set model.num_classes to 4, or name all 6 in data.classes",
        ),
        (lambda i: i % 10, 8, "labels go from 0 to 9, but num_classes is 8; set model.num_classes to 10, or correct"),
        (lambda i: i % 10 + 1, 10, "labels go from 1 to 10, but num_classes is 10; set model.num_classes to 11"),
        (lambda i: i % 4 - 1, 4, "labels go from -1 to 2, but num_classes is 4; classes begin at 0"),
    ],
)
def test_other_classes_than_the_model_has(source: Any, count: int, message: str, tmp_path: Path) -> None:
    module = mmssl.ImageClassifier(**{**SCRATCH, "num_classes": count})
    options: dict[str, Any] = {"batch_size": 4, "num_workers": 0}
    if source == "folder":
        data = mmssl.FilesData(image_folder(tmp_path / "images", range(8)), folder_labels=True, **options)
    else:
        data = mmssl.FilesData(table(tmp_path / "a.csv", range(20), source), image="file", label="colour", **options)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", 1).fit(module, data)


def test_numbers_that_are_no_classes_may_be_large(tmp_path: Path) -> None:
    module = mmssl.ImageClassifier(**{**SCRATCH, "num_classes": 1, "target": "regression"})
    source = table(tmp_path / "a.csv", range(8), lambda i: 5 * i)
    data = mmssl.FilesData(source, image="file", label="colour", batch_size=4, num_workers=0)
    trainer(tmp_path / "run", 1).fit(module, data)


def test_a_class_of_which_all_is_held_out(tmp_path: Path) -> None:
    """One rare picture is in training, another, by its key's hash, in what is held out: that one is named."""
    said = []
    for i in range(8):
        home = tmp_path / str(i)
        image_folder(home, range(20))
        (home / "rare").mkdir()
        (home / "rare" / f"{i}.png").write_bytes(picture(50))
        data = mmssl.FilesData(str(home), folder_labels=True, val_part=0.5, batch_size=4, num_workers=0)
        try:
            data.prepare_data()
            said.append("")
            assert 4 in labels_of(data).values()
        except ValueError as problem:
            said.append(str(problem))
    assert set(said) == {""} | {
        f"{tmp_path / str(i)}: of class 'rare' there is 1 sample, and val_part 0.5 holds out all of it; add samples, "
        "leave the class out, or give val"
        for i in range(8)
        if said[i]
    }
    assert 0 < said.count("") < 8


def test_files_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that packs; every further use looks again, since files may have changed."""
    looks = []
    original = Files.stats
    monkeypatch.setattr(Files, "stats", lambda self: looks.append(str(self)) or original(self))
    source = image_folder(tmp_path / "images", range(8))
    data = mmssl.FilesData(source, val=source, folder_labels=True, batch_size=4, num_workers=0)
    run = trainer(tmp_path / "run", 1)
    module = mmssl.ImageClassifier(**SCRATCH)
    run.fit(module, data)
    assert len(looks) == 2  # train and val
    image_folder(tmp_path / "images", range(8, 12))
    run.validate(module, data)
    assert len(looks) == 3  # val, by the run's classes
    assert len(ShardSet(data.val)) == 12


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Processes that pack do not run the user's script again."""
    source = image_folder(tmp_path / "images", range(8))
    script = tmp_path / "script.py"
    script.write_text(
        "print('begins')\nimport mmssl\n"
        f"mmssl.FilesData({source!r}, folder_labels=True, packed_dir='packed', batch_size=4).prepare_data()\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "begins"
    assert done.stdout.count("begins") == 1
    assert "packed 8 samples" in done.stdout


def test_a_class_of_data_behind_plain_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, own = tmp_path / "plain.yaml", tmp_path / "own.yaml"
    plain.write_text(yaml.safe_dump({"model": {"class_path": "mmssl.ImageClassifier"}, "data": {"train": "a.tar"}}))
    own.write_text(yaml.safe_dump({"data": {"class_path": "mmssl.FilesData", "init_args": {"train": "b"}}}))
    assert main(["fit", "--config", str(plain), "--config", str(own), "--run", str(tmp_path / "run")]) == 2
    assert "plain.yaml has the arguments of mmssl.DataModule as data, and" in capsys.readouterr().err
