"""What is logged: validation means over padded batches, and the mean that a step's loss is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from pairs import TINY, picture, sample

import mmssl
from mmssl.draws import Draws
from mmssl.types import Batch

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "use_distributed_sampler": False,
}


def tiny(name: str, tokenizer: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    common = {"backbone": "vit_tiny_patch16_224", "backbone_options": TINY, **arguments}
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
    if name == "MAE":
        return mmssl.MAE(**common, **decoder)
    text = {"tokenizer": tokenizer, "max_tokens": 32, "pad_to_multiple_of": 16}
    return mmssl.MLM(**text, **common) if name == "MLM" else mmssl.MMM(**text, **common, **decoder)


@pytest.mark.parametrize("name", ["MLM", "MAE", "MMM"])
def test_validation_does_not_depend_on_the_batch_size(
    name: str, tmp_path: Path, tokenizer_path: str, pair_shards: str
) -> None:
    """10 samples as 1 batch, as 4 batches of 3 (2 of padding), as 2 of 7 (4 of padding), captions of 7 to 12 words."""
    module = tiny(name, tokenizer_path)
    results = []
    for size in (10, 3, 7):
        data = mmssl.DataModule(
            pair_shards, val=pair_shards, batch_size=4, val_batch_size=size, val_samples=10, num_workers=0
        )
        results += Trainer(**QUIET, default_root_dir=tmp_path).validate(module, data, verbose=False)
    kinds = {"MLM": ["text"], "MAE": ["image"], "MMM": ["text", "image"]}[name]
    names = {"val/loss", *(f"val/loss_{kind}" for kind in kinds), *(["val/text_accuracy"] if "text" in kinds else [])}
    assert set(results[0]) == names
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-6, abs=1e-6)
    assert results[0]["val/loss"] == pytest.approx(sum(results[0][f"val/loss_{kind}"] for kind in kinds))


def test_validation_means_by_hand(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> None:
    """Every token counts once, whichever batch it is in; weights of the losses enter the sum alone."""
    module = tiny("MMM", tokenizer_path, text_weight=0.5, image_weight=2.0).eval()
    data = mmssl.DataModule(pair_shards, val=pair_shards, batch_size=4, val_batch_size=4, val_samples=10, num_workers=0)
    (result,) = Trainer(**QUIET, default_root_dir=tmp_path).validate(module, data, verbose=False)
    losses, hits, errors = [], [], []
    with torch.no_grad():
        for batch in data.val_dataloader():
            prediction = module(batch)
            log_p = prediction.logits.log_softmax(-1)
            losses += (-log_p[range(len(log_p)), batch.text.labels]).tolist()
            hits += (prediction.logits.argmax(-1) == batch.text.labels).tolist()
            pixels = module.network.pixels
            target = pixels.targets(pixels(batch.image.pixels), batch.image.hidden)
            errors += (prediction.patches - target).square().mean(-1)[batch.valid].flatten().tolist()
    assert len(errors) == 10 * 12
    assert len(set(losses)) > 10
    assert result["val/loss_text"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result["val/text_accuracy"] == pytest.approx(sum(hits) / len(hits), rel=1e-5)
    assert result["val/loss_image"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert result["val/loss"] == pytest.approx(0.5 * result["val/loss_text"] + 2 * result["val/loss_image"], rel=1e-5)


def test_padding_has_no_weight_whatever_it_holds(tokenizer_path: str) -> None:
    module = tiny("MMM", tokenizer_path).eval()
    prepare = module.prepare(train=False)
    sums = []
    for filler in (0, 3):
        examples = [prepare.sample(sample(i), Draws(0, i), 0) for i in (0, 1, filler)]
        batch = prepare.collate(examples, [True, True, False])
        batch.keys, batch.valid = ["a", "b", "c"], torch.tensor([True, True, False])
        with torch.no_grad():
            sums.append(module.compare(module(batch), batch))
    for name, (total, count) in sums[0].items():
        assert total.item() == pytest.approx(sums[1][name].total.item(), rel=1e-5)
        assert count.item() == sums[1][name].count.item()
    assert sums[0]["image"].count.item() == 2 * 12
    assert picture(0) != picture(3)


def test_a_test_run_logs_under_its_own_name(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> None:
    module = tiny("MLM", tokenizer_path)
    data = mmssl.DataModule(pair_shards, val=pair_shards, batch_size=4, val_samples=6, num_workers=0)
    (test,) = Trainer(**QUIET, default_root_dir=tmp_path).test(module, data, verbose=False)
    (val,) = Trainer(**QUIET, default_root_dir=tmp_path).validate(module, data, verbose=False)
    assert {k.replace("test/", "val/"): v for k, v in test.items()} == val


def test_a_second_validation_starts_from_nothing(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> None:
    """Two validations of weights that stand still (a rate of next to nothing) give the same numbers."""

    class Seen(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.values.append(float(trainer.callback_metrics["val/loss_text"]))

    seen = Seen()
    module = tiny("MLM", tokenizer_path, lr=1e-20, weight_decay=0.0)
    data = mmssl.DataModule(pair_shards, val=pair_shards, batch_size=4, val_samples=6, num_workers=0)
    runner = Trainer(
        **QUIET,
        default_root_dir=tmp_path,
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        callbacks=[seen],
    )
    runner.fit(module, data)
    assert len(seen.values) == 3  # the first: a check of one batch before training
    assert seen.values[1] == pytest.approx(seen.values[2], rel=1e-6)


def test_logged_gradient_is_the_one_before_clipping(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> None:
    class Norm(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
        ) -> None:
            self.logged = float(trainer.callback_metrics["train/grad_norm"])

        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            self.applied = float(torch.stack(norms).norm()) if norms else 0.0

    norms = []
    for clip in (None, 1e-3):
        norm = Norm()
        data = mmssl.DataModule(pair_shards, batch_size=4, num_workers=0)
        trainer = Trainer(
            **QUIET, default_root_dir=tmp_path, max_steps=1, log_every_n_steps=1, limit_val_batches=0, callbacks=[norm]
        )
        module = tiny("MAE", tokenizer_path, clip_grad_norm=clip)
        trainer.fit(module, data)
        norms.append(norm.logged)
        left = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
        assert float(left) == pytest.approx(norm.logged if clip is None else clip, rel=1e-3)
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] > 0.01
