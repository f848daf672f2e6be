"""Many classes and numbers as targets: losses and metrics against scikit-learn's, and real training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled import write_labelled
from pairs import TINY, picture
from sklearn.metrics import average_precision_score, f1_score, log_loss, mean_absolute_error, r2_score
from test_classifiers import trainer

import mmssl
from mmssl.draws import Draws
from mmssl.finetune.network import Logits
from mmssl.finetune.targets import make_target
from mmssl.types import BadSample, Batch, Sample

SCRATCH: dict[str, Any] = {"backbone_name": "vit_tiny_patch16_224", "backbone_options": TINY}


def batch_of(module: Any, labels: list[str]) -> Batch:
    prepare = module.prepare(train=False)
    samples = [Sample(str(i), "a", {"png": picture(i), "cls": text.encode()}) for i, text in enumerate(labels)]
    batch: Batch = prepare.collate([prepare.sample(sample, Draws(0, i), 0) for i, sample in enumerate(samples)])
    batch.keys = [sample.key for sample in samples]
    batch.valid = torch.ones(len(labels), dtype=torch.bool)
    return batch


def test_many_classes_equal_scikit_learns_figures() -> None:
    torch.manual_seed(0)
    module = mmssl.ImageClassifier(num_classes=3, target="multilabel", **SCRATCH).eval()
    batch = batch_of(module, ["0", "1 2", "0 2", "1", "2", "0 1 2", "1 0"])
    truth = batch.labels.numpy()
    prediction = module(batch)
    logits = prediction.logits.detach()
    scores = logits.sigmoid().numpy().astype(np.float64)
    total, count = module.compare(prediction, batch)["label"]
    expected = np.mean([log_loss(truth[:, k], scores[:, k], labels=[0, 1]) for k in range(3)])
    assert float(total / count) == pytest.approx(expected, rel=1e-5)
    module.measure(prediction, batch)
    found = module.measured()
    assert float(found["mAP"]) == pytest.approx(average_precision_score(truth, scores, average="macro"), abs=1e-5)
    f1 = f1_score(truth, scores > 0.5, average="macro", zero_division=0)
    assert float(found["f1"]) == pytest.approx(f1, abs=1e-5)
    row = module.predict_step(batch, 0).rows[1]
    assert (row["truth"], row["labels"]) == ([1, 2], np.flatnonzero(scores[1] > 0.5).tolist())


@pytest.mark.parametrize("count", [1, 2])
def test_numbers_equal_scikit_learns_figures(count: int) -> None:
    torch.manual_seed(0)
    module = mmssl.ImageClassifier(num_classes=count, target="regression", **SCRATCH).eval()
    batch = batch_of(module, [" ".join(f"{i * 0.3 - k}" for k in range(count)) for i in range(6)])
    truth = batch.labels.numpy()
    prediction = module(batch)
    values = prediction.logits.detach().numpy()
    total, count_ = module.compare(prediction, batch)["label"]
    assert float(total / count_) == pytest.approx(((values - truth) ** 2).mean(), rel=1e-5)
    module.measure(prediction, batch)
    found = {name: float(value) for name, value in module.measured().items()}
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, values), rel=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt(((values - truth) ** 2).mean()), rel=1e-5)
    assert found["r2"] == pytest.approx(r2_score(truth, values), rel=1e-4)
    assert module.predict_step(batch, 0).rows[2]["truth"] == pytest.approx(truth[2].tolist())
    one = batch_of(module, [" ".join(["1"] * count)])
    module.measure(module(one), one)
    assert np.isnan(float(module.measured()["r2"]))  # of one sample there is none, and no run ends of it


@pytest.mark.parametrize(
    ("target", "key", "metric", "least"), [("multilabel", "colours", "mAP", 0.95), ("regression", "red", "r2", 0.8)]
)
def test_they_are_learnt(target: Any, key: str, metric: str, least: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shard = write_labelled(tmp_path / "a.tar", 48)
    count = 4 if target == "multilabel" else 2
    module = mmssl.ImageClassifier(
        num_classes=count, target=target, label_key=key, lr=3e-3, crop_scale=(0.9, 1.0), **SCRATCH
    )
    run = trainer(tmp_path, 150)
    run.fit(module, mmssl.DataModule(shard, shard, batch_size=16, num_workers=0))
    assert run.logged_metrics[f"val/{metric}"] > least


@pytest.mark.parametrize("target", ["class", "multilabel", "regression"])
def test_predictions_need_no_labels(target: str) -> None:
    kind = make_target(target, 3)
    row = kind.row(torch.zeros(3), kind.stack([kind.unknown])[0])
    assert row["truth"] is None
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("target", ["class", "multilabel", "regression"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_predicted_as_null(target: str, bad: float) -> None:
    kind = make_target(target, 3)
    row = kind.row(torch.tensor([0.5, bad, 0.0]), kind.stack([kind.read("1 2 0" if target != "class" else "1")])[0])
    truth = row.pop("truth")
    assert truth is not None
    assert set(row.values()) == {None}


def test_numbers_are_those_that_float32_holds() -> None:
    kind = make_target("regression", 1)
    assert kind.stack([kind.read("3.4e38"), kind.read(-3.4e38)]).isfinite().all()
    for label in ("1e39", -1e39, "nan", "1e999"):
        with pytest.raises(BadSample, match="no finite number of float32") as caught:
            kind.read(label)
        assert caught.value.reason == "label_not_a_number"


@pytest.mark.parametrize("target", ["class", "multilabel", "regression"])
def test_padding_has_no_part_in_metrics(target: Any) -> None:
    """Of no target, and where all is padding the metrics keep the shapes that the ranks exchange."""
    torch.manual_seed(0)
    module = mmssl.ImageClassifier(num_classes=6, target=target, **SCRATCH).eval()
    labels = [f"{i}" if target == "class" else " ".join(str((i + k) % 6) for k in range(6)) for i in range(6)]
    labels = [label[: 2 * i + 3] if target == "multilabel" else label for i, label in enumerate(labels)]
    padded, alone, none = (batch_of(module, labels) for _ in range(3))
    prediction = Logits(torch.randn(6, 6))
    padded.valid[4:] = False
    none.valid[:] = False
    alone.labels, alone.valid = alone.labels[:4], None
    module.measure(Logits(prediction.logits[:4]), alone)
    expected = module.measured()
    module.measure(prediction, none)
    module.measure(prediction, padded)
    assert module.measured() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1; there must be at least 2 classes"),
        ({"num_classes": 0, "target": "regression"}, "num_classes is 0; there must be at least 1 value"),
        ({"num_classes": 1, "target": "multilabel"}, "num_classes is 1; there must be at least 2 classes"),
        ({"target": "regression", "label_smoothing": 0.1}, "label_smoothing is 0.1"),
        ({"target": "regression", "mixup": 0.8}, "mixup 0.8 and cutmix 0.0 mix classes, but target is regression"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmssl.ImageClassifier(**{"num_classes": 3, **SCRATCH, **options})
    with pytest.raises(ValueError, match="target is 'ranking'; choose class, multilabel or regression"):
        make_target("ranking", 3)
