"""MLM's loss against the equation, and its errors."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import mmssl
from mmssl.draws import Draws
from mmssl.objectives.base import check_text_masking, ratio_at
from mmssl.types import Batch, Sample


@pytest.fixture
def module(tokenizer_path: str, tiny: dict[str, object]) -> mmssl.MLM:
    torch.manual_seed(0)
    return mmssl.MLM(
        tokenizer_path, "vit_tiny_patch16_224", tiny, mask_ratio=0.3, max_tokens=32, pad_to_multiple_of=16
    ).eval()


def test_loss_equals_the_equation(module: mmssl.MLM, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(module, 5)
    text = batch.text
    total, count = module.compare(module(batch), batch)["text"]

    # L = sum over hidden j of -log p(i_j | g(h_j)), one token at a time, by hand.
    h = module.network.backbone(text=text).text
    head = module.network.text_head
    by_hand = 0.0
    for j, label in zip(text.hidden.tolist(), text.labels.tolist(), strict=True):
        g = head.norm(torch.nn.functional.gelu(head.dense(h[j])))
        scores = (module.network.backbone.token_embedding.weight @ g + head.out.bias).double()
        by_hand -= float(scores[label] - torch.log(torch.exp(scores).sum()))
    assert count == len(text.labels) > 5
    assert float(total) == pytest.approx(by_hand, rel=1e-5)


def test_only_hidden_positions_reach_the_head(module: mmssl.MLM, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(module, 5)
    assert module(batch).shape == (len(batch.text.hidden), module.tokenizer.vocab_size)


def test_labels_are_what_stood_there(
    module: mmssl.MLM, make_batch: Callable[..., Batch], make_caption: Callable[[int], str]
) -> None:
    batch = make_batch(module, 5)
    restored = batch.text.input_ids.clone()
    restored[batch.text.hidden] = batch.text.labels
    whole = np.concatenate([module.tokenizer.encode(make_caption(i)).ids for i in range(5)])
    assert (restored[: len(whole)].numpy() == whole).all()
    assert len(restored) % 16 == 0
    assert (restored[len(whole) :] == module.tokenizer.pad_id).all()
    assert len(batch.text.cu_seqlens) == 5 + 2  # the padding is a segment of its own
    assert batch.counts == {"text": len(batch.text.labels)}


def test_padded_samples_hide_nothing(module: mmssl.MLM, make_batch: Callable[..., Batch]) -> None:
    whole, part = make_batch(module, 4), make_batch(module, 4, valid=[True, True, True, False])
    end = whole.text.cu_seqlens[3]
    assert (part.text.hidden == whole.text.hidden[whole.text.hidden < end]).all()
    assert (part.text.input_ids == whole.text.input_ids).all()


def test_a_scheduled_ratio_moves_in_a_straight_line(tokenizer_path: str, tiny: dict[str, object]) -> None:
    assert ratio_at(0.2, 5, 10) == 0.2
    assert [round(ratio_at((0.5, 0.1), i, 5), 6) for i in range(6)] == [0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    module = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", tiny, mask_ratio=(0.4, 0.15))
    assert module.prepare(True).text.ratio == (0.4, 0.15)
    module = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", tiny, mask_ratio=[0.4, 0.2])
    assert ratio_at(module.prepare(True).text.ratio, 1, 3) == pytest.approx(0.3)


def test_long_texts_give_windows_that_keep_their_special_tokens(tokenizer_path: str, tiny: dict[str, object]) -> None:
    module = mmssl.MLM(tokenizer_path, "vit_tiny_patch16_224", tiny, max_tokens=16)
    words = ["red", "green", "blue", "grey"]
    text = " ".join(words[i % 4] for i in range(200))
    sample = Sample("k", "s", {"txt": text.encode()})
    seen = set()
    for seed in range(50):
        out = module.prepare(True).sample(sample, Draws(seed), 0)
        assert len(out.input_ids) == 16
        ids = out.input_ids.copy()
        ids[out.hidden] = out.labels
        assert ids[0] == module.tokenizer.cls_id
        assert ids[-1] == module.tokenizer.sep_id
        seen.add(int(ids[1]))
    assert len(seen) == 4  # windows begin anywhere
    fixed = [module.prepare(False).sample(sample, Draws(seed), 0) for seed in range(5)]
    first = module.tokenizer.encode("red").ids[1]
    for out in fixed:
        ids = out.input_ids.copy()
        ids[out.hidden] = out.labels
        assert ids[1] == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 1.5}, "mask_ratio of the text is 1.5"),
        ({"mask_ratio": (0.3, 0.0)}, "mask_ratio of the text is 0.0"),
        ({"mask_ratio": [0.3, 1.0]}, "mask_ratio of the text is 1.0"),
        ({"mask_ratio": [0.4, 0.3, 0.15]}, r"mask_ratio of the text is \[0.4, 0.3, 0.15\]; give one number or \[first"),
        ({"mask_ratio": [0.4]}, r"mask_ratio of the text is \[0.4\]"),
        ({"vocab_size": 30522}, "vocab_size is 30522 but the tokenizer"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_errors(tokenizer_path: str, tiny: dict[str, object], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmssl.MLM(**{"tokenizer": tokenizer_path, "backbone_options": tiny, **arguments})


def test_an_unknown_strategy_is_named(module: mmssl.MLM) -> None:
    with pytest.raises(ValueError, match="text masking 'words' is unknown; use one of random, whole_word, span"):
        check_text_masking(module.tokenizer, None, 0.3, "words", 32)
