"""MMM: both directions at once, and each depends on the other modality."""

import dataclasses
from collections.abc import Callable

import pairs
import pytest
import torch

import mmssl
from mmssl.draws import Draws
from mmssl.types import Batch


@pytest.fixture(params=[False, True], ids=["shared", "experts"])
def module(request: pytest.FixtureRequest, tokenizer_path: str, tiny: dict[str, object]) -> mmssl.MMM:
    torch.manual_seed(0)
    return mmssl.MMM(
        tokenizer_path,
        "vit_tiny_patch16_224",
        {**tiny, "experts": request.param},
        max_tokens=32,
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=4,
        crop_scale=(1.0, 1.0),
    ).eval()


@torch.no_grad()
def test_hidden_words_depend_on_the_picture(module: mmssl.MMM, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(module, 4)
    before = module(batch).logits
    pixels = batch.image.pixels.clone()
    pixels[2] = 255 - pixels[2]
    after = module(dataclasses.replace(batch, image=dataclasses.replace(batch.image, pixels=pixels))).logits
    owner = torch.searchsorted(batch.text.cu_seqlens.long(), batch.text.hidden, right=True) - 1
    change = (after - before).abs().amax(1)
    assert (change[owner == 2] > 1e-4).all()
    assert (change[owner != 2] < 1e-5).all()  # and on no other sample's picture


@torch.no_grad()
def test_hidden_patches_depend_on_the_text(module: mmssl.MMM, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(module, 4)
    before = module(batch).patches
    ids = batch.text.input_ids.clone()
    start, end = batch.text.cu_seqlens[1:3].tolist()
    ids[start + 1 : end - 1] = ids[start + 1 : end - 1].flip(0)
    after = module(dataclasses.replace(batch, text=dataclasses.replace(batch.text, input_ids=ids))).patches
    change = (after - before).abs().amax((1, 2))
    assert change[1] > 1e-5
    assert (change[[0, 2, 3]] < 1e-6).all()


@torch.no_grad()
def test_hidden_pixels_do_not_leak(module: mmssl.MMM, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(module, 4)
    before = module(batch)
    network = module.network
    patches = network.pixels.patchify(batch.image.pixels.float())
    index = batch.image.hidden.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    pixels = network.pixels.unpatchify(patches.scatter(1, index, 0.0), 32).byte()
    after = module(dataclasses.replace(batch, image=dataclasses.replace(batch.image, pixels=pixels)))
    torch.testing.assert_close(after.patches, before.patches)
    torch.testing.assert_close(after.logits, before.logits)


@torch.no_grad()
def test_a_batch_equals_its_samples_one_at_a_time(module: mmssl.MMM, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(module, 4)
    whole = module.compare(module(batch), batch)
    parts: dict[str, float] = {}
    for i in range(4):
        alone = make_batch(module, 4, valid=[j == i for j in range(4)])
        alone.valid = torch.tensor([j == i for j in range(4)])
        for name, (total, count) in module.compare(module(alone), alone).items():
            parts[name] = parts.get(name, 0.0) + float(total)
            parts[name + "#"] = parts.get(name + "#", 0.0) + float(count)
    for name, (total, count) in whole.items():
        assert parts[name] == pytest.approx(float(total), rel=1e-5)
        assert parts[name + "#"] == float(count)
    assert batch.counts == {name: int(whole[name].count) for name in ("text", "image")}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"text_weight": -1.0}, "text_weight is -1.0; give 0 or more"),
        ({"image_weight": float("nan")}, "image_weight is nan; give 0 or more"),
        ({"text_weight": 0.0, "image_weight": 0.0}, "text_weight and image_weight are both 0"),
    ],
)
def test_weights_that_teach_nothing_are_refused(
    tokenizer_path: str, tiny: dict[str, object], weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        mmssl.MMM(tokenizer_path, "vit_tiny_patch16_224", tiny, **weights)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_images_alone_and_texts_alone_are_mae_and_mlm(
    module: mmssl.MMM, make_batch: Callable[..., Batch], tokenizer_path: str, tiny: dict[str, object]
) -> None:
    """The same batches, predictions and losses as those objectives with the same weights have."""
    options = {**tiny, "experts": module.network.backbone.arguments()["experts"]}
    sizes = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 4}
    mae = mmssl.MAE("vit_tiny_patch16_224", tiny, crop_scale=(1.0, 1.0), flip=False, **sizes)
    mlm = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", options, masking="whole_word", max_tokens=32)
    ours = module.state_dict()
    shared = {name: value for name, value in ours.items() if name in mae.state_dict()}
    assert set(mae.state_dict()) == set(shared)
    mae.load_state_dict(shared)
    mlm.load_state_dict({name: ours[name] for name in mlm.state_dict()})
    for part, other in {"image": mae.eval(), "text": mlm.eval()}.items():
        theirs = make_batch(other, 4)
        prepare = module.prepare(train=True).only(part)
        mine = prepare.collate([prepare.sample(pairs.sample(i), Draws(0, i), 0) for i in range(4)])
        assert (mine.image is None, mine.text is None, mine.counts) == (part == "text", part == "image", theirs.counts)
        if part == "image":
            assert mine.image.pixels.equal(theirs.image.pixels)
            assert mine.image.hidden.equal(theirs.image.hidden)
        else:
            assert mine.text.input_ids.equal(theirs.text.input_ids)
            assert mine.text.labels.equal(theirs.text.labels)
        loss = module.compare(module(theirs), theirs)
        expected = other.compare(other(theirs), theirs)
        assert loss.keys() == expected.keys()
        for name in loss:
            torch.testing.assert_close(loss[name].total / loss[name].count, expected[name].total / expected[name].count)
        shown, alone = module.complete(theirs), other.complete(theirs)
        assert (shown.original is None) == (alone.original is None)
        assert shown.guesses == alone.guesses
