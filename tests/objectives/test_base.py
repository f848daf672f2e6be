"""What the objectives share: pixels and patches, windows of long texts, packing, guesses handed back."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pairs import TINY

import mmssl
from mmssl.data.tokenizer import TextTokenizer
from mmssl.draws import Draws
from mmssl.objectives.base import Pixels, PrepareText, guesses, ratio_at
from mmssl.training.completion import split_by_sample
from mmssl.types import BadSample, Batch, Image, Sample, Text

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
# No ten tokens of it come twice.
LONG = "a red square with blue paper under it upon a wide table there grey square under red table with green paper"


def text(words: str) -> Sample:
    return Sample("0", "memory.tar", {"txt": words.encode()})


def prepare(tokenizer: str, **changes: object) -> PrepareText:
    arguments = {"max_tokens": 12, "ratio": 0.3, "strategy": "random", "batches": 100, "train": True, **changes}
    return PrepareText(TextTokenizer(tokenizer), **arguments)  # type: ignore[arg-type]


# ---- pictures


def picture(height: int = 6, width: int = 4) -> torch.Tensor:
    return torch.arange(2 * 3 * height * width, dtype=torch.int64).reshape(2, 3, height, width).to(torch.uint8)


def test_patches_by_hand_and_back() -> None:
    pixels = Pixels(MEAN, STD, 2, False)
    image = picture().float()
    patches = pixels.patchify(image)
    assert patches.shape == (2, 6, 12)
    for b in range(2):
        for n in range(6):
            y, x = 2 * (n // 2), 2 * (n % 2)
            tile = image[b, :, y : y + 2, x : x + 2].permute(1, 2, 0)  # row, column, channel
            assert torch.equal(patches[b, n], tile.reshape(-1))
    assert torch.equal(pixels.unpatchify(patches, 6), image)  # not square


def test_normalised_and_restored() -> None:
    pixels = Pixels(MEAN, STD, 2, False)
    normalised = pixels(picture())
    by_hand = (picture().double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalised, by_hand.float())
    torch.testing.assert_close(pixels.restore(normalised), picture().float() / 255)
    assert pixels.restore(normalised + 100).max() == 1


def test_targets_of_flat_patches_stay_finite() -> None:
    flat = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    flat[:, :, :2] = picture()[:1, :, :2]
    pixels = Pixels((0.5,) * 3, (0.5,) * 3, 2, True)
    targets = pixels.targets(pixels(flat), torch.tensor([[1, 3]]))
    assert torch.isfinite(targets).all()
    assert targets[0, 0].mean().abs() < 1e-5
    assert targets[0, 0].var() == pytest.approx(1, abs=1e-2)
    assert targets[0, 1].abs().max() < 1e-3  # of one colour


@pytest.mark.parametrize("normalize", [False, True])
def test_the_truth_completes_a_picture(normalize: bool) -> None:
    pixels = Pixels(MEAN, STD, 2, normalize)
    image = Image(picture(), torch.tensor([[0, 2, 4], [1, 2, 3]]), torch.tensor([[1, 3, 5], [0, 4, 5]]))
    normalised = pixels(image.pixels)
    truth = image.pixels.float() / 255
    visible, completed = pixels.complete(normalised, image, pixels.targets(normalised, image.hidden))
    torch.testing.assert_close(completed, truth, atol=1e-5, rtol=1e-5)
    seen, kept = pixels.patchify(visible), pixels.patchify(truth)
    for b in range(2):
        torch.testing.assert_close(seen[b, image.visible[b]], kept[b, image.visible[b]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen[b, image.hidden[b]], torch.full((3, 12), 0.5), atol=1e-6, rtol=0.0)
    _, wrong = pixels.complete(normalised, image, torch.zeros(2, 3, 12))
    for b in range(2):
        torch.testing.assert_close(
            pixels.patchify(wrong)[b, image.visible[b]], kept[b, image.visible[b]], atol=1e-5, rtol=1e-5
        )


# ---- texts


def test_windows_keep_both_ends_and_reach_everything(tokenizer_path: str) -> None:
    tokenizer = TextTokenizer(tokenizer_path)
    ids = tokenizer.encode(LONG).ids
    half = prepare(tokenizer_path)
    starts = set()
    for i in range(400):
        example = half.sample(text(LONG), Draws(i), 0)
        whole = example.input_ids.copy()
        whole[example.hidden] = example.labels
        assert len(whole) == 12
        assert (whole[0], whole[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
        places = [p for p in range(1, len(ids) - 10) if np.array_equal(ids[p : p + 10], whole[1:-1])]
        assert len(places) == 1
        starts.update(places)
        assert not {0, 11} & set(example.hidden.tolist())
    assert {1, len(ids) - 11} <= starts  # the first and the last window
    beginning = prepare(tokenizer_path, train=False).sample(text(LONG), Draws(5), 0)
    whole = beginning.input_ids.copy()
    whole[beginning.hidden] = beginning.labels
    assert np.array_equal(whole[:-1], ids[:11])


def test_a_text_of_just_the_length_is_left_alone(tokenizer_path: str) -> None:
    tokenizer = TextTokenizer(tokenizer_path)
    ids = tokenizer.encode("a red square with blue paper").ids
    for longest, cut in ((len(ids), False), (len(ids) - 1, True)):
        example = prepare(tokenizer_path, max_tokens=longest).sample(text("a red square with blue paper"), Draws(0), 0)
        assert len(example.input_ids) == longest
        whole = example.input_ids.copy()
        whole[example.hidden] = example.labels
        assert np.array_equal(whole, ids) is not cut


def test_a_text_of_nothing_is_a_bad_sample(tokenizer_path: str) -> None:
    with pytest.raises(BadSample, match="no_text"):
        prepare(tokenizer_path).sample(text("中"), Draws(0), 0)  # unknown to the tokenizer


@pytest.mark.parametrize("name", ["MLM", "MMM"])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_no_room_for_a_token_is_refused(name: str, max_tokens: int, tokenizer_path: str) -> None:
    with pytest.raises(ValueError, match=rf"max_tokens.* {max_tokens}"):
        getattr(mmssl, name)(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=max_tokens)


def test_ratios_move_in_a_straight_line_and_rest_at_their_end(tokenizer_path: str) -> None:
    assert [ratio_at((0.5, 0.3), i, 5) for i in (0, 2, 4, 9)] == pytest.approx([0.5, 0.4, 0.3, 0.3])
    assert ratio_at(0.4, 3, 5) == 0.4
    assert ratio_at((0.5, 0.3), 0, 1) == 0.5
    words = "a red square with blue paper under it upon a"
    for train, batch, ratio in ((True, 0, 0.8), (True, 99, 0.2), (True, 500, 0.2), (False, 0, 0.2)):
        half = prepare(tokenizer_path, ratio=(0.8, 0.2), max_tokens=64, train=train)
        tokens = len(half.tokenizer.encode(words).ids) - 2
        assert len(half.sample(text(words), Draws(0), batch).hidden) == int(ratio * tokens + 1e-9)


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_packing(tokenizer_path: str, multiple: int) -> None:
    half = prepare(tokenizer_path, pad_to_multiple_of=multiple)
    texts = ["a red square", LONG, "blue paper under it", "a red square"]
    examples = [half.sample(text(t), Draws(i), 0) for i, t in enumerate(texts)]
    packed = half.collate(examples, [True, True, False, True])
    bounds = packed.cu_seqlens.tolist()
    assert len(bounds) == (5 if multiple == 1 else 6)
    assert len(packed.input_ids) % multiple == 0
    assert bounds[-1] == len(packed.input_ids)
    assert packed.max_seqlen >= packed.cu_seqlens.diff().max()
    assert (packed.input_ids[bounds[4] :] == half.tokenizer.pad_id).all()
    hidden, labels = [], []
    for s, example in enumerate(examples):
        assert np.array_equal(packed.input_ids[bounds[s] : bounds[s + 1]].numpy(), example.input_ids)
        if s != 2:  # a sample that only pads has nothing to predict
            hidden += (bounds[s] + example.hidden).tolist()
            labels += example.labels.tolist()
    assert packed.hidden.tolist() == hidden
    assert packed.labels.tolist() == labels
    assert half.collate(examples, [False] * 4).hidden.shape == (0,)


def test_values_go_back_to_their_samples() -> None:
    bounds = torch.tensor([0, 3, 3, 7, 8, 8], dtype=torch.int32)  # an empty text, and an empty padding segment
    values, positions = split_by_sample(
        torch.tensor([10, 11, 12, 13, 14]), torch.tensor([0, 2, 3, 6, 7]), bounds, samples=4
    )
    assert values == [[10, 11], [], [12, 13], [14]]
    assert positions == [[0, 2], [], [0, 3], [0]]


def test_guesses_leave_the_padding_out() -> None:
    packed = Text(
        torch.tensor([1, 4, 2, 1, 5, 6, 2, 0, 0]),
        torch.tensor([0, 3, 7, 9], dtype=torch.int32),
        4,
        torch.tensor([1, 4, 5]),
        torch.tensor([7, 8, 9]),
    )
    logits = torch.nn.functional.one_hot(torch.tensor([7, 3, 9]), 10).float()
    found = guesses(logits, packed, 2)
    assert found.input_ids == [[1, 4, 2], [1, 5, 6, 2]]
    assert found.hidden == [[1], [1, 2]]
    assert found.labels == [[7], [8, 9]]
    assert found.guesses == [[7], [3, 9]]
    assert found.original is None


# ---- all three


@pytest.mark.parametrize(
    ("name", "experts"), [("MLM", False), ("MLM", True), ("MAE", False), ("MMM", False), ("MMM", True)]
)
def test_every_trainable_parameter_gets_a_gradient(
    name: str, experts: bool, tokenizer_path: str, make_batch: Callable[..., Batch]
) -> None:
    """One without would stop DDP at the second step."""
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
    arguments = {"tokenizer": tokenizer_path} if name != "MAE" else {}
    arguments |= decoder if name != "MLM" else {}
    backbone = {"backbone": "vit_tiny_patch16_224", "backbone_options": {**TINY, "experts": experts}}
    module = getattr(mmssl, name)(**arguments, **backbone)
    batch = make_batch(module, 4)
    sums = module.compare(module(batch), batch)
    sum(sums[k].total / sums[k].count for k in module.loss_weights).backward()
    assert [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
