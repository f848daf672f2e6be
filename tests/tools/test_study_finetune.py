"""The study of fine-tuning runs to its end; what comes out of it is docs/finetune.md's business."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the study needs scikit-learn: pip install 'mmssl[bench]'")
sys.path.append(str(Path(__file__).parents[2] / "tools"))
import study_finetune
from sklearn.datasets import load_digits


def test_labels_are_drawn_class_by_class() -> None:
    _, labels = load_digits(return_X_y=True)
    train, test = study_finetune.split(labels)
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797
    assert min(np.bincount(labels[test])) >= 34
    few = study_finetune.choose(labels, train, 0.01, seed=3)
    assert len(few) == 14
    assert set(np.bincount(labels[few], minlength=10)) == {1, 2}
    assert set(few) <= set(train)
    assert set(few) < set(study_finetune.choose(labels, train, 0.1, seed=3))  # the same seed adds to the same labels
    assert set(few) != set(study_finetune.choose(labels, train, 0.01, seed=4))
    assert set(study_finetune.choose(labels, train, 1.0, seed=3)) == set(train)


def test_it_runs_to_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_finetune, "RATES", (1e-3,))
    monkeypatch.setattr(study_finetune, "PARTS", (0.01,))
    result = study_finetune.main(tmp_path, pretrain_steps=2, steps=2, seeds=1, pretrained=None)
    assert result == json.loads((tmp_path / "study.json").read_text())
    assert (tmp_path / "study.png").stat().st_size > 1000
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["labels", "---", *study_finetune.ARMS]
    assert rows[0].split("|")[2].strip() == "1% (14)"
