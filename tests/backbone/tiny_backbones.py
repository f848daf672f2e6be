"""Small backbones with lively weights, and packed texts, shared by the tests of this folder."""

from typing import Any

import torch
from torch import nn

from mmssl.backbone import Backbone
from mmssl.types import Text

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4}

# One name for each way in which timm's two classes differ: prefix tokens, positions, norms, rotary form, block.
NAMES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch32_clip_224": {},
    "vit_so150m2_patch16_reg1_gap_256": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_rope_224": {},
    "vit_base_patch16_rope_mixed_ape_224": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": 2},
    "vit_base_patch16_rpn_224": {},
    "eva02_enormous_patch14_clip_224": {},
}


def backbone(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Backbone:
    """A tiny backbone for 32-pixel pictures with 8-pixel patches, in evaluation mode.

    Its weights are drawn anew, larger: layer scale starts near 0 in some models, which would hide every error.
    """
    torch.manual_seed(0)
    options = {**TINY, **NAMES.get(name, {}), **arguments.pop("options", {})}
    module = Backbone(name, **{"vocab_size": 50, "img_size": 32, "patch_size": 8, "options": options, **arguments})
    enliven(module)
    return module.eval()


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
        elif "norm" in name or "ls" in name or "gamma" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.1)


def pictures(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def visible(n: int, count: int = 6, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(16, generator=generator)[:count] for _ in range(n)])


def text(lengths: list[int], max_seqlen: int = 16, seed: int = 3) -> Text:
    ids = torch.randint(50, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    nothing = torch.empty(0, dtype=torch.long)
    return Text(ids, cu_seqlens, max_seqlen, nothing, nothing)


def one(batch: Text, s: int) -> Text:
    """Sample s alone."""
    a, b = batch.cu_seqlens[s : s + 2].tolist()
    return Text(batch.input_ids[a:b], torch.tensor([0, b - a]).int(), batch.max_seqlen, batch.hidden, batch.labels)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    """Equal keys, and differences small against the size of each tensor."""
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=rtol * max(1.0, b[key].abs().max().item()), msg=key)
