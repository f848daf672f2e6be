"""Layer-wise rates against timm's own groups on the plain timm model."""

import pytest
import timm
import torch
from pairs import TINY
from timm.optim import param_groups_layer_decay

import mmssl


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", TINY["options"]),
        ("vit_small_patch14_reg4_dinov2", TINY["options"]),
        ("vit_base_patch16_clip_224", TINY["options"]),
        ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
        ("vit_small_patch16_rope_mixed_224", TINY["options"]),
    ],
)
def test_rates_and_decay_are_timms(name: str, sizes: dict[str, int]) -> None:
    module = mmssl.ImageClassifier(
        num_classes=5,
        backbone_name=name,
        backbone_options={"img_size": 32, "patch_size": 8, "options": sizes},
        layer_decay=0.7,
        lr=0.5,
        weight_decay=0.05,
    )
    # global_pool="token" keeps timm's last norm before the pooling, where it is here, too.
    plain = timm.create_model(name, img_size=32, patch_size=8, num_classes=5, global_pool="token", **sizes)
    theirs = {
        id(p): group
        for group in param_groups_layer_decay(
            plain, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=plain.no_weight_decay()
        )
        for p in group["params"]
    }
    ours = {id(p): group for group in module.parameter_groups() for p in group["params"]}
    found = dict(module.named_parameters())
    names = {"head.weight": "network.head.1.weight", "head.bias": "network.head.1.bias"}
    compared = 0
    for key, parameter in plain.named_parameters():
        group = ours[id(found[names.get(key, f"network.backbone.vit.{key}")])]
        expected = theirs[id(parameter)]
        assert group["lr"] == pytest.approx(0.5 * expected["lr_scale"]), key
        assert group["weight_decay"] == expected["weight_decay"], key
        compared += 1
    assert compared == len(ours)


def test_text_goes_with_its_layer(tokenizer_path: str) -> None:
    module = mmssl.PairClassifier(
        tokenizer=tokenizer_path,
        num_classes=5,
        backbone_name="vit_tiny_patch16_224",
        backbone_options={**TINY, "experts": True},
        layer_decay=0.5,
        lr=1.0,
    )
    groups = module.parameter_groups()
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    assert found["network.head.1.weight"] == groups[0]["lr"] == 1.0
    for layer, part in enumerate(
        [
            "text.token_embedding.weight",
            "vit.blocks.0.text_expert.mlp.fc1.weight",
            "vit.blocks.1.text_expert.mlp.fc1.weight",
        ]
    ):
        assert found[f"network.backbone.{part}"] == 0.5 ** (3 - layer)
    free = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert id(module.network.backbone.text.position) in free
    assert id(module.network.backbone.text.token_embedding.weight) not in free


def test_without_decay_all_have_one_rate() -> None:
    module = mmssl.ImageClassifier(num_classes=5, backbone_name="vit_tiny_patch16_224", backbone_options=TINY, lr=0.25)
    assert {group["lr"] for group in module.parameter_groups()} == {0.25}
    trained = sum(p.numel() for group in module.parameter_groups() for p in group["params"])
    assert trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert isinstance(torch.optim.AdamW(module.parameter_groups(), lr=9.0), torch.optim.AdamW)
