"""Each objective overfits one batch to near zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mmssl
from mmssl.types import Batch

DECODER = {"decoder_embed_dim": 48, "decoder_depth": 2, "decoder_num_heads": 4}


@pytest.mark.parametrize("name", ["MLM", "MAE", "MMM"])
def test_overfits_one_batch(
    name: str, tokenizer_path: str, tiny: dict[str, object], make_batch: Callable[..., Batch]
) -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "backbone_options": tiny}
    if name != "MAE":
        arguments |= {"tokenizer": tokenizer_path, "max_tokens": 32}
    if name != "MLM":
        arguments |= {**DECODER, "norm_pix_loss": False}
    module = getattr(mmssl, name)(**arguments)
    batch = make_batch(module, 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
    first: dict[str, float] = {}
    for _ in range(250):
        sums = module.compare(module(batch), batch)
        means = {key: total / count for key, (total, count) in sums.items()}
        first = first or {key: float(value) for key, value in means.items()}
        loss = sum(means[key] for key in module.loss_weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    for key in module.loss_weights:
        assert float(means[key]) < 0.02 * first[key] + 1e-3, (key, first[key], float(means[key]))
    if "text" in means:
        assert float(means["text_accuracy"]) == 1.0
