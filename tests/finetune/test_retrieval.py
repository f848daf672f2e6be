"""The dual encoder: CLIP's loss, recall by hand, and pairs that are learnt."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labelled import write_labelled
from lightning import Callback
from pairs import TINY, caption, picture
from test_classifiers import trainer
from transformers import CLIPConfig, CLIPModel

import mmssl
from mmssl.draws import Draws
from mmssl.finetune.retrieval import Embeddings, places_of_partners
from mmssl.types import Batch, Sample


@pytest.fixture
def module(tokenizer_path: str) -> mmssl.DualEncoder:
    torch.manual_seed(0)
    return mmssl.DualEncoder(
        embed_dim=16,
        tokenizer=tokenizer_path,
        backbone_name="vit_tiny_patch16_224",
        backbone_options=TINY,
        max_tokens=16,
        crop_scale=(0.9, 1.0),
        lr=3e-3,
    )


def batch_of(module: Any, count: int) -> Batch:
    prepare = module.prepare(train=False)
    samples = [Sample(str(i), "a", {"png": picture(i), "txt": caption(i).encode()}) for i in range(count)]
    batch: Batch = prepare.collate([prepare.sample(sample, Draws(0, i), 0) for i, sample in enumerate(samples)])
    batch.keys = [sample.key for sample in samples]
    return batch


def test_the_loss_is_that_of_clip(module: mmssl.DualEncoder) -> None:
    """Against the loss and the normalisation in Hugging Face's CLIPModel."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    torch.manual_seed(0)
    clip = CLIPModel(config).eval()
    ids = torch.randint(0, 18, (6, 8))
    ids[:, -1] = 19
    with torch.no_grad():
        theirs = clip(input_ids=ids, pixel_values=torch.randn(6, 3, 8, 8), return_loss=True)
    scale = clip.logit_scale.detach().exp().reshape(1)
    batch = batch_of(module, 6)
    losses = module.compare(Embeddings(theirs.image_embeds, theirs.text_embeds, scale), batch)
    total, count = losses["contrastive"]
    torch.testing.assert_close(total / count, theirs.loss)
    batch.valid = torch.tensor([True] * 4 + [False] * 2)
    padded = module.compare(Embeddings(theirs.image_embeds, theirs.text_embeds, scale), batch)["contrastive"]
    batch.valid = None
    four = module.compare(Embeddings(theirs.image_embeds[:4], theirs.text_embeds[:4], scale), batch)["contrastive"]
    assert padded.count == 4
    torch.testing.assert_close(padded.total, four.total)


def test_places_by_hand() -> None:
    query = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]])
    among = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert places_of_partners(query, among).tolist() == [0.5, 1.5, 0.0]
    same = torch.ones(11, 4)
    assert places_of_partners(same, same).tolist() == [5.0] * 11  # nothing is found where all are the same
    assert places_of_partners(torch.full((3, 2), math.nan), among).tolist() == [3.0] * 3
    torch.manual_seed(0)
    query, among = torch.randn(2, 2100, 8)
    expected = (query @ among.T).argsort(1, descending=True).eq(torch.arange(2100)[:, None]).int().argmax(1)
    assert (places_of_partners(query, among) - expected).abs().max() <= 1


def test_pairs_find_each_other(module: mmssl.DualEncoder, tmp_path: Path) -> None:
    """24 pairs of squares and captions; by chance 5 of 24 are among the first five."""
    shard = write_labelled(tmp_path / "a.tar", 24)
    run = trainer(tmp_path, 150)
    run.fit(module, mmssl.DataModule(shard, shard, batch_size=12, val_batch_size=8, num_workers=0))
    assert run.logged_metrics["val/recall/image_to_text@5"] > 0.8
    assert run.logged_metrics["val/recall/text_to_image@5"] > 0.8
    row = module.predict_step(batch_of(module, 3), 0).rows[1]
    assert (row["key"], len(row["image"]), len(row["text"])) == ("1", 16, 16)
    assert sum(x * x for x in row["image"]) == pytest.approx(1, abs=1e-3)


def test_a_temperature_at_its_limit_comes_back(module: mmssl.DualEncoder, tmp_path: Path) -> None:
    """As in OpenCLIP: the limit holds after every step, and the gradient flows at it."""
    limit = math.log(100)
    torch.nn.init.constant_(module.network.log_scale, limit + 1)
    seen: list[float] = []

    class Note(Callback):
        def on_train_batch_end(self, *_: Any) -> None:  # where checkpoints are saved
            seen.append(float(module.network.log_scale.detach()))

    shard = write_labelled(tmp_path / "a.tar", 24)
    run = trainer(tmp_path, 8, callbacks=[Note()])
    module.warmup_steps, module.lr = 0, 3e-2
    run.fit(module, mmssl.DataModule(shard, batch_size=12, num_workers=0))
    assert seen[0] == pytest.approx(limit)
    assert all(0 <= value <= limit + 1e-6 for value in seen)
    assert seen[-1] < limit - 0.02  # pairs that are not yet found ask for a softer distribution


def test_the_loss_is_not_rounded_under_autocast(module: mmssl.DualEncoder) -> None:
    """Of bfloat16, cosines times 100 would keep no digit behind the point."""
    batch = batch_of(module, 24)
    torch.manual_seed(0)
    image = F.normalize(torch.randn(24, 16), dim=-1)
    text = F.normalize(image + 0.3 * torch.randn(24, 16), dim=-1)
    grads, losses = [], []
    for autocast in (False, True):
        mine = image.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = module.compare(Embeddings(mine, text, torch.tensor([100.0])), batch)["contrastive"].total
        total.backward()
        grads.append(mine.grad)
        losses.append(total.detach())
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(grads[1], grads[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = module(batch)
    assert found.image.dtype == found.text.dtype == torch.float32


def test_what_is_not_finite_is_predicted_as_null(module: mmssl.DualEncoder) -> None:
    torch.nn.init.constant_(module.network.text_head.weight, math.nan)
    row = module.predict_step(batch_of(module, 2), 0).rows[0]
    assert row["text"] is None
    assert len(row["image"]) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"temperature": 0.001}, "temperature is 0.001; give 0.01 to 1"),
        ({"tokenizer": None}, "tokenizer is not given"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, tokenizer_path: str) -> None:
    scratch = {"backbone_name": "vit_tiny_patch16_224", "backbone_options": TINY, "tokenizer": tokenizer_path}
    with pytest.raises(ValueError, match=message):
        mmssl.DualEncoder(**{**scratch, **options})
