"""What labels of plain files become, by the kind of the target: in the shards that a run streams."""

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pairs import picture
from test_classifiers import SCRATCH, trainer

import mmssl
from mmssl.data.shards import ShardSet
from mmssl.finetune.labels import Labels


@pytest.fixture(autouse=True)
def _packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def table(home: Path, labels: list[str], name: str = "a.csv") -> str:
    home.mkdir(parents=True, exist_ok=True)
    with (home / name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "y"])
        for i, label in enumerate(labels):
            (home / f"{i}.png").write_bytes(picture(i))
            rows.writerow([f"{i}.png", label])
    return str(home / name)


def folders(home: Path, names: list[str]) -> str:
    for i, name in enumerate(names):
        (home / name).mkdir(parents=True, exist_ok=True)
        (home / name / f"{i}.png").write_bytes(picture(i))
    return str(home)


def fit(home: Path, train: str, target: str, count: int, **options: Any) -> mmssl.FilesData:
    """One step of a run in ``home``/run; returns its data."""
    named = {} if "folder_labels" in options else {"image": "file", "label": "y"}
    data = mmssl.FilesData(train, **{**named, "batch_size": 4, "num_workers": 0, **options})
    module = mmssl.ImageClassifier(**{**SCRATCH, "num_classes": count, "target": target})  # type: ignore[arg-type]
    trainer(home / "run", 1).fit(module, data)
    return data


def packed(data: mmssl.FilesData, part: str = "train") -> list[str | None]:
    """The .cls of every sample, by the number of its picture."""
    shards = ShardSet(data.train["train"]["shards"] if part == "train" else data.val)
    found = {}
    for sample in map(shards.read, range(len(shards))):
        label = sample.members.get("cls")
        found[int(sample.key.split("/")[-1])] = None if label is None else label.decode()
    return [found[i] for i in sorted(found)]


def classes(home: Path) -> Any:
    return json.loads((home / "run/classes.json").read_text())


# ---- regression


@pytest.mark.parametrize("word", ["unknown", "NA", "nan"])
def test_numbers_stay_numbers_with_a_word_among_them(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sample with the word is a bad one, named when packed and when met."""
    labels = [f"{-1 + 0.02 * i:.2f}" for i in range(104)]
    labels[7] = word
    source = table(tmp_path, labels)
    data = fit(tmp_path, source, "regression", 1, val=source, val_batch_size=52)
    assert packed(data) == packed(data, "val") == labels
    assert f"; labels that are no numbers, and will be bad samples: '{word}'" in capsys.readouterr().out
    bad = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in bad} == {("000000007", "label_not_a_number")}
    assert not (tmp_path / "run/classes.json").exists()


def test_too_many_words_among_numbers(tmp_path: Path) -> None:
    labels = [f"{i / 10} {i}" for i in range(40)]
    labels[3], labels[8] = "- 3", "0.1 none"
    with pytest.raises(ValueError, match=r"a\.csv: 2 of 80 labels are no numbers \('-', 'none'\), but target is regr"):
        fit(tmp_path, table(tmp_path, labels), "regression", 2)
    with pytest.raises(ValueError, match=r"data\.classes names classes, but target is regression"):
        fit(tmp_path, table(tmp_path, labels), "regression", 2, classes=["-", "none"])
    assert not list((tmp_path / "xdg").rglob("*.tar"))


def test_the_same_file_for_other_targets(tmp_path: Path) -> None:
    """What was packed for one kind is not taken for another."""
    source = table(tmp_path, ["3.0", "1", "0", "2"])
    assert packed(fit(tmp_path, source, "class", 4)) == ["3", "1", "0", "2"]
    assert packed(fit(tmp_path, source, "regression", 1)) == ["3.0", "1", "0", "2"]


def test_folders_named_by_numbers(tmp_path: Path) -> None:
    data = fit(tmp_path, folders(tmp_path / "ages", ["20", "35.5", "20", "7"]), "regression", 1, folder_labels=True)
    assert packed(data) == ["20", "35.5", "20", "7"]


# ---- multilabel


def test_words_in_a_cell_are_classes_each(tmp_path: Path) -> None:
    """Also those of validation; an empty cell is none of them, which is not the same as not known."""
    source = table(tmp_path, ["cat dog", "cat", "", "dog,yak", "yak, cat"])
    data = fit(tmp_path, source, "multilabel", 3, val=table(tmp_path / "v", ["", "yak"]))
    assert classes(tmp_path) == ["cat", "dog", "yak"]
    assert packed(data) == ["0 1", "0", "[]", "1 2", "2 0"]
    assert packed(data, "val") == ["[]", "2"]
    module = mmssl.ImageClassifier(**{**SCRATCH, "num_classes": 3, "target": "multilabel"})
    shards = ShardSet(data.train["train"]["shards"])
    read = [Labels(module.target).of(shards.read(i)) for i in range(5)]
    assert read == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 0, 1]]


def test_numbers_in_a_cell(tmp_path: Path) -> None:
    data = fit(tmp_path, table(tmp_path, ["0 2", "", "1.0", "2,1"]), "multilabel", 3)
    assert packed(data) == ["0 2", "[]", "1", "2 1"]


@pytest.mark.parametrize("target", ["class", "multilabel", "regression"])
def test_cells_that_are_all_empty(target: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: no row has a label in the column 'y'"):
        fit(tmp_path, table(tmp_path, [""] * 4), target, 3)


def test_all_of_a_class_held_out_of_cells(tmp_path: Path) -> None:
    labels = ["cat dog", "dog"] * 20
    options = {"image": "file", "label": "y", "val_part": 0.3, "batch_size": 4, "num_workers": 0}
    data = fit(tmp_path, table(tmp_path, labels), "multilabel", 2, **options)
    held_out = ShardSet(data.val).read(0)  # the same key is held out whatever the labels are
    labels[int(held_out.key)] += " rare"
    with pytest.raises(ValueError, match=r"of class 'rare' there is 1 sample, and val_part 0\.3 holds out all of it"):
        fit(tmp_path, table(tmp_path, labels), "multilabel", 3, **options)


# ---- classes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["0", "1", "unknown", "1"],
            r"a\.csv: 2 of 3 different labels are numbers, but 'unknown' is not; correct them",
        ),
        (["0", "cat", "-", "1"], r"2 of 4 different labels are numbers, but '-', 'cat' are not; .* in data\.classes"),
        (
            ["0.5", "1", "1.25", "2"],
            r"a\.csv: the labels '0\.5', '1\.25' are not whole numbers; set model\.target to r",
        ),
    ],
)
def test_mixtures(labels: list[str], message: str, tmp_path: Path) -> None:
    source = table(tmp_path, labels)
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, source, "class", len(set(labels)))
    assert "\n" not in str(caught.value)
    names = sorted(set(labels))
    data = fit(tmp_path, source, "class", len(names), classes=names)  # said to be names
    assert packed(data) == [str(names.index(label)) for label in labels]


def test_integers_as_pandas_writes_them(tmp_path: Path) -> None:
    """A column with gaps becomes floats."""
    data = fit(tmp_path, table(tmp_path, ["3.0", "0.0", "", "1.", " 2 "]), "class", 4)
    assert packed(data) == ["3", "0", None, "1", "2"]
    with pytest.raises(ValueError, match=r"labels go from 0 to 3, but num_classes is 3; set model\.num_classes to 4"):
        fit(tmp_path, table(tmp_path, ["3.0", "0.0"]), "class", 3)
    rows = {"file": [str(tmp_path / f"{i}.png") for i in range(3)], "y": [1.0, None, 0.0]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    assert packed(fit(tmp_path, str(tmp_path / "a.parquet"), "class", 2)) == ["1", None, "0"]


@pytest.mark.parametrize("names", [[str(i) for i in range(12)], ["007", "8", "30", "2020", "-1"]])
def test_folders_of_integers_are_in_their_order(names: list[str], tmp_path: Path) -> None:
    data = fit(tmp_path, folders(tmp_path / "images", names), "class", len(names), folder_labels=True)
    assert classes(tmp_path) == sorted(names, key=int)
    assert packed(data) == [str(sorted(names, key=int).index(name)) for name in names]
    if names[0] == "0":  # the number of a class is its name, as in a table
        assert packed(data) == packed(fit(tmp_path, table(tmp_path, names), "class", len(names)))


def test_folders_with_a_word_are_names(tmp_path: Path) -> None:
    fit(tmp_path, folders(tmp_path / "images", ["10", "9", "other"]), "class", 3, folder_labels=True)
    assert classes(tmp_path) == ["10", "9", "other"]


# ---- what is missing


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda home: {"train": table(home, ["a", "b"]), "label": None},
            r"a\.csv: data\.label is not given; name the column that holds the labels",
        ),
        (
            lambda home: {"train": folders(home / "images", ["a", "b"]), "folder_labels": False},
            r"images: no picture has a \.cls beside it; set data\.folder_labels to true",
        ),
    ],
)
def test_labels_that_are_not_given(make: Callable[[Path], dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, target="class", count=2, **make(tmp_path))
    assert not (tmp_path / "xdg/mmssl/packed").exists()


def test_labels_beside_pictures(tmp_path: Path) -> None:
    source = folders(tmp_path / "images", ["a", "b"])
    for i, name in enumerate("ab"):
        (tmp_path / "images" / name / f"{i}.cls").write_text(str(1 - i))
    assert packed(fit(tmp_path, source, "class", 2, folder_labels=False)) == ["1", "0"]


def test_a_label_in_another_column(tmp_path: Path) -> None:
    """``label_key`` names a column that goes to the .json as it is."""
    data = mmssl.FilesData(table(tmp_path, ["0", "1", "1", "0"]), image="file", batch_size=4, num_workers=0)
    trainer(tmp_path / "run", 1).fit(mmssl.ImageClassifier(**{**SCRATCH, "label_key": "y"}), data)


def test_links_to_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out and counted as other samples that cannot be used."""
    source = folders(tmp_path / "images", ["a", "b"] * 60)
    os.symlink(tmp_path / "nowhere.png", tmp_path / "images/a/gone.png")
    os.symlink(tmp_path / "nowhere.txt", tmp_path / "images/a/0.txt")
    with pytest.raises(ValueError, match=r"2 of 121 samples cannot be used \(2 x not_found; the first: .*0\.png"):
        fit(tmp_path, source, "class", 2, folder_labels=True)
    (tmp_path / "images/a/0.txt").unlink()
    assert len(packed(fit(tmp_path, source, "class", 2, folder_labels=True))) == 120
    assert re.search(
        r"packed 120 samples .*; 1 left out \(1 x not_found; the first: .*gone\.png", capsys.readouterr().out
    )
