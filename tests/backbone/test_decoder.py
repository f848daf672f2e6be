"""The decoder.  Its equality with Hugging Face's ViTMAE is tested with the whole objective."""

import itertools

import numpy as np
import pytest
import torch
from tiny_backbones import assert_close, backbone, enliven, gradients, one, pictures, text

from mmssl.backbone import Decoder, Encoded
from mmssl.backbone.embed import sincos_2d

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 4, "grid_size": (4, 4), "patch_size": 8}


def split(n: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in range(n)])
    return order[:, :count], order[:, count:]


def decoder(**arguments: object) -> Decoder:
    torch.manual_seed(0)
    module = Decoder(48, **{**SIZES, "num_prefix_tokens": 1, **arguments})
    enliven(module)
    return module


def test_positions_are_those_of_mae() -> None:
    """For one patch at a time, from the text of facebookresearch/mae (util/pos_embed.py)."""
    table = sincos_2d(16, (3, 5))
    assert table.shape == (15, 16)
    omega = 1 / 10000 ** (np.arange(4) / 4)
    for row, column in itertools.product(range(3), range(5)):
        parts = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
        torch.testing.assert_close(table[row * 5 + column], torch.from_numpy(np.concatenate(parts)).float())


@torch.no_grad()
def test_equals_the_picture_put_in_order() -> None:
    """MAE's own way: mask tokens sorted into their places, every token predicted, hidden ones picked out."""
    module, (shown, hidden) = decoder(num_prefix_tokens=2), split(3)
    encoded = Encoded(torch.randn(3, 2, 48), torch.randn(3, 6, 48), None)
    x = module.mask_token.expand(3, 16, 32).clone()
    for b in range(3):
        x[b, shown[b]] = module.embed(encoded.patches[b])
    x = torch.cat([module.embed(encoded.prefix), x + module.positions], 1)
    for block in module.blocks:
        x = block(x)
    every = module.predict(module.norm(x))[:, 2:]
    expected = torch.stack([every[b, hidden[b]] for b in range(3)])
    result = module(encoded, shown, hidden)
    assert result.shape == (3, 10, 192)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_pairs_equal_one_at_a_time() -> None:
    encoder, module, (shown, hidden) = backbone(), decoder(text=True, max_text_tokens=16), split(4)
    batch = text([5, 3, 4, 5, 20], 32)  # the last is padding
    packed = module(encoder(pictures(4), shown, batch), shown, hidden, batch)
    weights = torch.randn(packed.shape)
    (packed * weights).sum().backward()
    together = gradients(module)
    for s in range(4):
        part = shown[s : s + 1], hidden[s : s + 1], one(batch, s)
        alone = module(encoder(pictures(4)[s : s + 1], part[0], part[2]), *part)
        torch.testing.assert_close(alone, packed[s : s + 1], rtol=1e-5, atol=1e-4)
        (alone * weights[s]).sum().backward()
    assert_close(together, gradients(module))
    other = module(encoder(pictures(4), shown, text([5, 3, 4, 5, 20], 32, seed=6)), shown, hidden, batch)
    assert not torch.allclose(other, packed)


def test_initialisation_is_that_of_mae() -> None:
    module = Decoder(48, **{**SIZES, "embed_dim": 128}, num_prefix_tokens=1)
    bound = (6 / (128 + 384)) ** 0.5
    weight = module.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert all(p.abs().max() == 0 for name, p in module.named_parameters() if name.endswith("bias"))
    assert module.mask_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="embed_dim 30 is not divisible by num_heads = 4; try 28 or 32"):
        decoder(embed_dim=30)
    with pytest.raises(ValueError, match=r"embed_dim 30 is not divisible by 4, .*; try 28 or 32"):
        decoder(embed_dim=30, num_heads=3)
    shown, hidden = split(1)
    encoded = Encoded(torch.randn(1, 1, 48), torch.randn(1, 6, 48), torch.randn(3, 48))
    with pytest.raises(ValueError, match="text came to a decoder without"):
        decoder()(encoded, shown, hidden, text([3]))
    with pytest.raises(ValueError, match="the text that was encoded"):
        decoder(text=True)(encoded, shown, hidden)
    with pytest.raises(ValueError, match="needs encoded patches"):
        decoder()(Encoded(None, None, torch.randn(3, 48)), shown, hidden)
