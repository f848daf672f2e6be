"""The study of fine-tuning runs to its end; what comes out of it is docs/finetune.md's business."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

pytest.importorskip("sklearn", reason="the study needs scikit-learn: pip install 'mmssl[bench]'")
sys.path.append(str(Path(__file__).parents[2] / "tools"))
import study_finetune
from study_finetune import choose, digits


def test_labels_are_drawn_class_by_class() -> None:
    train, test = digits()
    assert not set(train.pictures) & set(test.pictures)
    assert len(train.pictures) + len(test.pictures) == 1797
    assert min(np.bincount(test.labels)) >= 34
    few = choose(train.labels, 0.01, seed=3)
    assert len(few) == 14
    assert set(np.bincount(train.labels[few], minlength=10)) == {1, 2}
    assert set(few) < set(choose(train.labels, 0.1, seed=3))  # the same seed adds to the same labels
    assert set(few) != set(choose(train.labels, 0.01, seed=4))
    assert set(choose(train.labels, 1.0, seed=3)) == set(range(len(train.labels)))


@pytest.fixture
def demo_folder(tmp_path: Path, tokenizer_path: str) -> Path:
    """Shards as the demo's, of plain colours."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(Path(tokenizer_path).read_bytes())
    for part, count in (("train", 40), ("val", 8)):
        with webdataset.TarWriter(str(folder / f"pairs-{part}-000000.tar")) as writer:
            for i in range(count):
                data = io.BytesIO()
                Image.new("RGB", (48, 48), ["red", "blue"][i % 2]).save(data, "JPEG")
                about = {"ink": ["red", "blue"][i % 2], "paper": "black"}
                writer.write({"__key__": f"{i:04d}", "jpg": data.getvalue(), "txt": "a red square", "json": about})
    return folder


def test_it_runs_to_its_table(
    tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_finetune, "DEMO", demo_folder)
    monkeypatch.setattr(study_finetune, "RATES", (1e-3,))
    monkeypatch.setattr(study_finetune, "PARTS", (0.1,))
    study_finetune.main(tmp_path / "out", ["digits", "demo", "pairs"], steps=2, pretrain_steps=2, seeds=1)
    for name, labels, tests in (("digits", 144, 355), ("demo", 4, 8), ("pairs", 4, 8)):
        result = json.loads((tmp_path / "out" / name / "study.json").read_text())
        assert (result["labels"], result["test_pictures"]) == ({"0.1": labels}, tests)
        assert list(result["accuracy"]) == list(result["last_train_loss"]) == list(study_finetune.ARMS)
    assert (tmp_path / "out" / "study.png").stat().st_size > 1000
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["labels", "---", *study_finetune.ARMS] * 3
    assert rows[0].split("|")[2].strip() == "10% (144)"
