"""Low-rank adapters: what is trained, and that the merged backbone is the one that was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import CLASSES, write_labelled
from pairs import TINY
from runs import train
from test_classifiers import SCRATCH, batch_of, trainer

import mmssl
from mmssl.cli import main
from mmssl.finetune.network import pooled
from mmssl.pretrained import load_backbone


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str, pair_shards: str) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "mmm", "MMM", pair_shards, tokenizer=tokenizer_path, max_tokens=16)


def features(module: Any, batch: Any) -> torch.Tensor:
    network = module.network
    pixels = (batch.image.pixels.float() / 255 - network.mean) / network.std
    return pooled(network.backbone(pixels, None, batch.text), batch.text, batch.size, "mean")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "eva_giant_patch14_224"])
def test_adapters_begin_at_nothing_and_all_are_reached(name: str) -> None:
    torch.manual_seed(0)
    scratch = {**SCRATCH, "backbone_name": name}
    plain = mmssl.ImageClassifier(**scratch)
    module = mmssl.ImageClassifier(**scratch, lora_rank=2)
    state = plain.network.backbone.state_dict()
    own = module.network.backbone.state_dict()
    module.network.backbone.load_state_dict(
        {name: state.get(name.replace(".base_layer.", "."), value) for name, value in own.items()}
    )
    batch = batch_of(module, range(4))
    torch.testing.assert_close(features(module, batch), features(plain, batch), atol=1e-6, rtol=1e-5)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("network.head") for name in trained)
    assert not any(".text_expert." in name for name in trained)
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)  # else nothing flows to A
    module.network.zero_grad()
    loss = module.compare(module(batch), batch)["label"].total
    loss.backward()
    unreached = [name for name in trained if module.get_parameter(name).grad is None]
    assert not unreached  # timm multiplies by some layers' weights itself: these must have none


@pytest.mark.parametrize("name", ["TextClassifier", "PairClassifier", "DualEncoder"])
def test_all_adapters_are_reached_with_text_experts(name: str, tokenizer_path: str) -> None:
    """Also of those that see texts alone: DDP ends at the first parameter without a gradient."""
    options = {k: v for k, v in SCRATCH.items() if name != "DualEncoder" or k != "num_classes"}
    options |= {"backbone_options": {**TINY, "experts": True}, "tokenizer": tokenizer_path, "max_tokens": 16}
    module = getattr(mmssl, name)(**options, lora_rank=2)
    batch = batch_of(module, range(4))
    next(iter(module.compare(module(batch), batch).values())).total.backward()
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    adapted = {name for name, _ in module.named_parameters() if ".lora_A." in name}
    assert any(".text_expert." in name for name in adapted)
    assert any(".blocks.0.mlp." in name for name in adapted) == (name != "TextClassifier")


def test_a_run_with_adapters_is_read_merged(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained through the command, resumed; load_backbone has the features of the model with its adapters."""
    monkeypatch.chdir(tmp_path)
    shard = write_labelled(tmp_path / "a.tar", 32)
    options = {
        "model": "mmssl.PairClassifier",
        "model.num_classes": CLASSES,
        "model.backbone": source,
        "model.lora_rank": 4,
        "model.lora_dropout": 0.1,
        "model.lr": 1e-2,
        "data.train": shard,
        "data.val": shard,
        "data.batch_size": 8,
        "data.num_workers": 0,
        "trainer.max_steps": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.logger": "false",
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in options.items()), "--run", "run"]) == 0
    assert main(["fit", "--run", "run", "--resume", "--trainer.max_steps", "6"]) == 0
    assert main(["test", "--run", "run"]) == 0
    (checkpoint,) = Path("run/checkpoints").glob("*6.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    before = load_backbone(source)
    merged = load_backbone("run")
    changed = {
        name
        for name, value in merged.backbone.state_dict().items()
        if not torch.equal(value, before.backbone.state_dict()[name])
    }
    linear = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    assert len(changed) == 2 * 4
    assert all(name.startswith("vit.blocks.") and name.endswith(linear) for name in changed)
    module = mmssl.PairClassifier(num_classes=CLASSES, backbone=str(source), lora_rank=4, lora_dropout=0.1).eval()
    module.load_state_dict(content["state_dict"])
    batch = batch_of(module, range(5))
    with torch.no_grad():
        expected = features(module, batch)
        torch.testing.assert_close(
            merged(batch.image.pixels, batch.text, "mean").pooled, expected, atol=1e-5, rtol=1e-5
        )
    assert main(["export", "run", "--out", "out"]) == 0
    exported = load_backbone("out")
    torch.testing.assert_close(exported(batch.image.pixels, batch.text, "mean").pooled, expected, atol=1e-5, rtol=1e-5)


def test_adapters_learn(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shard = write_labelled(tmp_path / "a.tar", 48)
    module = mmssl.ImageClassifier(
        num_classes=CLASSES, backbone=str(source), lora_rank=8, lr=1e-2, crop_scale=(0.9, 1.0)
    )
    run = trainer(tmp_path, 150)
    run.fit(module, mmssl.DataModule(shard, shard, batch_size=16, num_workers=0))
    assert run.logged_metrics["val/accuracy"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_rank": 4, "frozen_layers": 1}, "frozen_layers is 1, but with lora_rank 4 all are"),
        ({"lora_rank": 4, "mode": "linear_probe"}, "mode is linear_probe, which trains the head alone"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmssl.ImageClassifier(**{**SCRATCH, "backbone_options": TINY, **options})
