"""The classifiers: what is trained, what is measured, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import CLASSES, write_labelled
from lightning import Trainer
from pairs import TINY, caption, picture
from runs import train

import mmssl
from mmssl.draws import Draws
from mmssl.finetune.network import pooled
from mmssl.pretrained import load_backbone
from mmssl.types import Batch, Sample

SCRATCH: dict[str, Any] = {
    "num_classes": CLASSES,
    "backbone_name": "vit_tiny_patch16_224",
    "backbone_options": TINY,
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "all.tar", 48)


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str, pair_shards: str) -> Path:
    """A joint model, four steps old."""
    folder = tmp_path_factory.mktemp("runs") / "mmm"
    return train(folder, "MMM", pair_shards, tokenizer=tokenizer_path, max_tokens=16, decoder_depth=1)


def trainer(folder: Path, steps: int, **more: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(
        **quiet,
        max_steps=steps,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **more,
    )


def batch_of(module: Any, numbers: range | list[int], valid: list[bool] | None = None) -> Batch:
    prepare = module.prepare(train=False)
    samples = [
        Sample(str(i), "a", {"png": picture(i), "txt": caption(i).encode(), "cls": str(i % 4).encode()})
        for i in numbers
    ]
    batch: Batch = prepare.collate([prepare.sample(sample, Draws(0, i), 0) for i, sample in enumerate(samples)], valid)
    batch.keys = [sample.key for sample in samples]
    if valid is not None:
        batch.valid = torch.tensor(valid)
    return batch


def test_pictures_are_learnt(shard: str, tmp_path: Path) -> None:
    """The colour of a square, within seconds; by chance 25 %."""
    torch.manual_seed(0)
    module = mmssl.ImageClassifier(**SCRATCH, lr=3e-3, crop_scale=(0.9, 1.0))
    run = trainer(tmp_path, 200)
    run.fit(module, mmssl.DataModule(shard, shard, batch_size=16, num_workers=0))
    assert run.logged_metrics["val/accuracy"] > 0.9


@pytest.mark.parametrize("name", ["TextClassifier", "PairClassifier"])
def test_texts_and_pairs_are_learnt_from_a_pretrained_backbone(
    name: str, pair_run: Path, shard: str, tmp_path: Path
) -> None:
    """The captions name the colour."""
    torch.manual_seed(0)
    module = getattr(mmssl, name)(num_classes=CLASSES, backbone=str(pair_run), pad_to_multiple_of=32, lr=3e-3)
    assert module.max_tokens == 16
    run = trainer(tmp_path, 80 if name == "TextClassifier" else 160)
    run.fit(module, mmssl.DataModule(shard, shard, batch_size=16, num_workers=0))
    assert run.logged_metrics["val/accuracy"] > 0.9


def test_the_backbone_is_the_pretrained_one(pair_run: Path) -> None:
    pretrained = load_backbone(str(pair_run))
    for pool in ("mean", "cls"):
        module = mmssl.PairClassifier(num_classes=CLASSES, backbone=str(pair_run), pool=pool).eval()
        batch = batch_of(module, range(5))
        assert batch.image is not None
        assert batch.text is not None
        expected = pretrained(batch.image.pixels, batch.text, pool).pooled
        network = module.network
        pixels = (batch.image.pixels.float() / 255 - network.mean) / network.std
        features = pooled(network.backbone(pixels, None, batch.text), batch.text, 5, pool)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module(batch).logits, network.head(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_text_alone_and_in_a_padded_batch(pair_run: Path, pool: Any) -> None:
    module = mmssl.TextClassifier(num_classes=CLASSES, backbone=str(pair_run), pool=pool, pad_to_multiple_of=64).eval()
    together = module(batch_of(module, range(6))).logits
    alone = torch.cat([module(batch_of(module, [i])).logits for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_padding_has_no_part_in_loss_and_metrics() -> None:
    module = mmssl.ImageClassifier(**SCRATCH).eval()
    padded = batch_of(module, range(8), valid=[True] * 5 + [False] * 3)
    alone = batch_of(module, range(5), valid=[True] * 5)
    (total, count), (other, few) = (
        module.compare(module(padded), padded)["label"],
        module.compare(module(alone), alone)["label"],
    )
    torch.testing.assert_close(total, other)
    assert count == few == 5
    values = []
    for batch in (padded, alone):
        module.measure(module(batch), batch)
        values.append(module.measured()["accuracy"])
    assert values[0] == values[1]
    module.measure(module(padded), batch_of(module, range(8), valid=[False] * 8))  # nothing to measure is no error
    assert module.predict_step(padded, 0).rows == module.predict_step(alone, 0).rows


def test_the_head_is_not_rounded_under_autocast() -> None:
    module = mmssl.ImageClassifier(**SCRATCH).eval()
    linear = module.network.head[1]
    torch.nn.init.normal_(linear.weight)
    features: list[torch.Tensor] = []
    linear.register_forward_hook(lambda _, given, __: features.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(batch_of(module, range(8))).logits
    torch.testing.assert_close(logits, features[0].float() @ linear.weight.T + linear.bias, atol=1e-5, rtol=1e-5)


def test_top_five_where_classes_allow() -> None:
    few, many = (mmssl.ImageClassifier(**{**SCRATCH, "num_classes": n}) for n in (5, 6))
    assert set(few.metrics) == {"accuracy"}
    assert set(many.metrics) == {"accuracy", "accuracy_top5"}


def test_a_linear_probe_changes_the_head_alone(pair_run: Path, shard: str, tmp_path: Path) -> None:
    module = mmssl.ImageClassifier(
        num_classes=CLASSES, backbone=str(pair_run), mode="linear_probe", head_norm=True, drop_path_rate=0.5, lr=1e-2
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batch = batch_of(module, range(4))
    module.train()
    assert not module.network.backbone.training
    assert module.network.head[0].training
    loss = module.compare(module(batch), batch)["label"].total
    loss.backward()
    assert all(p.grad is None for p in module.network.backbone.parameters())
    trainer(tmp_path, 5).fit(module, mmssl.DataModule(shard, batch_size=8, num_workers=0))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".head." in name}


def test_frozen_layers_stay(pair_run: Path, shard: str, tmp_path: Path) -> None:
    module = mmssl.PairClassifier(num_classes=CLASSES, backbone=str(pair_run), frozen_layers=2, lr=1e-2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path, 5).fit(module, mmssl.DataModule(shard, batch_size=8, num_workers=0))
    for name, value in module.state_dict().items():
        frozen = ".backbone." in name and ".blocks.1." not in name and ".vit.norm." not in name
        assert torch.equal(value, before[name]) == frozen, name


def test_mixing_is_a_function_of_the_batch(pair_run: Path) -> None:
    module = mmssl.ImageClassifier(**SCRATCH, mixup=0.8, cutmix=1.0)
    assert module.mixing
    module.train()
    seen = set()
    for number in range(8):
        batch = batch_of(module, range(6))
        batch.index = number
        state = torch.get_rng_state()
        first, again = module(batch), module(batch)
        assert torch.equal(state, torch.get_rng_state())  # nothing global is drawn
        assert first.targets is not None
        assert torch.equal(first.targets, again.targets)
        torch.testing.assert_close(first.targets.sum(1), torch.ones(6))
        # Classes 0 1 2 3 0 1 and their predecessors: two classes share a picture.
        shares = first.targets.gather(1, batch.labels[:, None])[:, 0]
        torch.testing.assert_close(shares, shares[:1].expand(6))
        torch.testing.assert_close(first.targets.gather(1, batch.labels.roll(1)[:, None])[:, 0], 1 - shares)
        seen.add(round(float(shares[0]), 6))
        losses = module.compare(first, batch)
        assert set(losses) == {"label"}  # hits of mixed pictures mean nothing
        expected = -(first.targets * torch.log_softmax(first.logits, -1)).sum()
        torch.testing.assert_close(losses["label"].total, expected)
    assert len(seen) > 4
    assert module.eval()(batch).targets is None


def test_label_smoothing_in_training_alone() -> None:
    module = mmssl.ImageClassifier(**SCRATCH, label_smoothing=0.2)
    batch = batch_of(module, range(4))
    prediction = module(batch)
    log = torch.log_softmax(prediction.logits, -1)
    plain = -log.gather(1, batch.labels[:, None]).sum()
    torch.testing.assert_close(module.compare(prediction, batch)["label"].total, 0.8 * plain - 0.2 * log.mean(1).sum())
    torch.testing.assert_close(module.eval().compare(prediction, batch)["label"].total, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"backbone_name": None}, "neither backbone nor backbone_name"),
        ({"backbone": "runs/a"}, "leave out backbone_name"),
        ({"backbone": "no/such/folder", "backbone_name": None, "backbone_options": None}, "no/such/folder"),
        ({"layer_decay": 0.0}, "layer_decay is 0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1"),
        ({"mixup": -1.0}, "mixup is -1"),
        ({"frozen_layers": 9}, "frozen_layers is 9"),
        ({"backbone_name": "vit_base_patch16_siglip_224", "pool": "cls"}, "no class token"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmssl.ImageClassifier(**{**SCRATCH, **arguments})


def test_errors_of_text(pair_run: Path, pair_shards: str, tokenizer_path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer is not given"):
        mmssl.TextClassifier(**SCRATCH)
    with pytest.raises(ValueError, match="16 positions"):
        mmssl.TextClassifier(num_classes=4, backbone=str(pair_run), max_tokens=17)
    short = {**SCRATCH, "backbone_options": {**TINY, "max_text_tokens": 8}, "tokenizer": tokenizer_path}
    assert mmssl.TextClassifier(**short).max_tokens == 8
    with pytest.raises(ValueError, match="max_tokens is 9, but backbone_options' max_text_tokens gives 8 positions"):
        mmssl.TextClassifier(**short, max_tokens=9)
    other = tmp_path / "other.json"
    other.write_text(Path(tokenizer_path).read_text() + "\n")
    with pytest.raises(ValueError, match="is not the one of backbone"):
        mmssl.TextClassifier(num_classes=4, backbone=str(pair_run), tokenizer=str(other))
    pictures = train(tmp_path / "mae", "MAE", pair_shards)
    with pytest.raises(ValueError, match="pretrained without text"):
        mmssl.PairClassifier(num_classes=4, backbone=str(pictures))
