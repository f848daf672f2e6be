"""The image side is timm's: the same features, the same weights, and clear words for what cannot serve."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tiny_backbones import NAMES, TINY, backbone, pictures, visible

from mmssl.backbone import Backbone


def reference(name: str, ours: Backbone) -> torch.nn.Module:
    model = timm.create_model(
        name, num_classes=0, global_pool="", img_size=32, patch_size=8, **{**TINY, **NAMES[name]}
    ).eval()
    model.load_state_dict(ours.timm_state_dict(), strict=True)
    return model


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_and_weights_equal_timm(name: str) -> None:
    ours = backbone(name, vocab_size=None)
    theirs = reference(name, ours)
    expected = theirs.forward_features(pictures(2))
    encoded = ours(pictures(2))
    assert expected.std() > 0.3  # the weights are lively enough for the comparison to mean something
    assert encoded.prefix.shape == (2, ours.num_prefix_tokens, 48)
    assert encoded.text is None
    torch.testing.assert_close(torch.cat([encoded.prefix, encoded.patches], 1), expected, rtol=1e-5, atol=1e-5)

    every = torch.stack([torch.randperm(16), torch.arange(16)])
    shuffled = ours(pictures(2), every)
    torch.testing.assert_close(shuffled.prefix, encoded.prefix, rtol=1e-5, atol=1e-5)
    back = torch.stack([shuffled.patches[b][every[b].argsort()] for b in range(2)])
    torch.testing.assert_close(back, encoded.patches, rtol=1e-5, atol=1e-5)

    ours.vit.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch32_clip_224"])
@torch.no_grad()
def test_hidden_patches_are_dropped(name: str) -> None:
    """Equals timm's own blocks on the gathered tokens, and does not depend on the hidden pixels."""
    ours = backbone(name)
    theirs = reference(name, ours)
    assert isinstance(theirs, VisionTransformer)
    ids = visible(2)
    tokens = theirs._pos_embed(theirs.patch_embed(pictures(2)))
    prefix = ours.num_prefix_tokens
    kept = [torch.cat([tokens[b, :prefix], tokens[b, prefix:][ids[b]]]) for b in range(2)]
    expected = theirs.norm(theirs.blocks(theirs.norm_pre(torch.stack(kept))))
    encoded = ours(pictures(2), ids)
    torch.testing.assert_close(torch.cat([encoded.prefix, encoded.patches], 1), expected, rtol=1e-5, atol=1e-5)

    shown = torch.zeros(2, 16, dtype=torch.bool).scatter(1, ids, True).view(2, 1, 4, 4)
    shown = shown.repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(shown, pictures(2), pictures(2, seed=9))
    torch.testing.assert_close(ours(other, ids).patches, encoded.patches, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_base_patch16_rope_mixed_ape_224"])
@torch.no_grad()
def test_rotary_positions_follow_the_patches(name: str) -> None:
    """timm's own patch dropout with the same indices is the reference."""
    ours = backbone(name)
    theirs = timm.create_model(
        name, num_classes=0, global_pool="", img_size=32, patch_size=8, patch_drop_rate=0.5, **TINY
    )
    theirs.load_state_dict(ours.timm_state_dict(), strict=True)
    theirs.train()
    kept: list[torch.Tensor] = []
    theirs.patch_drop.register_forward_hook(lambda module, args, out: kept.append(out[1]))
    expected = theirs.forward_features(pictures(2))
    encoded = ours(pictures(2), kept[0])
    torch.testing.assert_close(torch.cat([encoded.prefix, encoded.patches], 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("beit_base_patch16_224", "it is a Beit"),
        ("swin_tiny_patch4_window7_224", "it is a SwinTransformer"),
        ("vit_relpos_small_patch16_224", "it is a VisionTransformerRelPos"),
        ("samvit_base_patch16", "it is a VisionTransformerSAM"),
        ("hiera_tiny_224", "it is a Hiera"),
        ("naflexvit_base_patch16_gap", "it is a NaFlexVit"),
        ("resnet18", "it is a ResNet"),
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("vit_tiny_r_s16_p8_224", "its HybridEmbed"),
        ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "its attention is DiffAttention"),
    ],
)
def test_unfit_models_are_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be a backbone: {why}.*use .*vit_base_patch16_224"):
        Backbone(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "no model 'vit_tinny_patch16_224'.*vit_tiny_patch16_224"),
        ({"name": "vit_tiny_patch16_224.nope"}, "no weights tagged 'nope'; it has .*augreg"),
        ({"img_size": 30, "patch_size": 8}, "img_size 30 is not divisible by patch_size 8.*24 and 32"),
        ({"patch_size": 300}, "img_size 224 .* patch_size 300.*300"),
        ({"options": {"embeddim": 48}}, "no option 'embeddim'; the nearest are embed_dim"),
        ({"options": {"patch_drop_rate": 0.5}}, "'patch_drop_rate': hidden patches"),
        ({"options": {"img_size": 48}}, "'img_size': it is an argument"),
        ({"options": {"embed_dim": 50, "num_heads": 4}}, "embed_dim 50 .* divisible by num_heads = 4"),
        ({"name": "eva02_tiny_patch14_224", "options": {"embed_dim": 24, "num_heads": 4}}, "num_heads x 4 = 16"),
        ({"pretrained": True, "weights": "x.pt"}, "choose"),
        ({"weights": "nowhere/x.pt"}, "there is no file nowhere/x.pt"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"experts": True}, "give vocab_size"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(**{"name": "vit_tiny_patch16_224", **arguments})


def test_pretrained_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **arguments: object) -> torch.nn.Module:
        if pretrained:
            raise FileNotFoundError("An error happened while trying to locate the file on the Hub.\nmore")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"no pretrained weights for vit_tiny_patch16_224 \(An error.*Hub\.\); check"):
        Backbone("vit_tiny_patch16_224", pretrained=True)


@pytest.mark.parametrize("form", ["safetensors", "prefixed", "nested", "lightning"])
def test_weights_from_a_file(form: str, tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=7, **TINY)
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "prefixed":
        torch.save({f"module.model.{key}": value for key, value in state.items()}, path)
    elif form == "nested":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        inner = {f"network.backbone.vit.{key}": value for key, value in state.items()}
        torch.save({"state_dict": {**inner, "network.decoder.embed.weight": torch.ones(2)}, "global_step": 5}, path)
    ours = Backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, weights=str(path), options=TINY)
    for key, value in ours.timm_state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_weights_are_resized_and_a_last_norm_is_found(tmp_path: Path) -> None:
    """A model that pools by the mean keeps its last norm as ``fc_norm``."""
    source = timm.create_model("deit3_small_patch16_224", img_size=64, patch_size=8, global_pool="avg", **TINY)
    torch.nn.init.normal_(source.fc_norm.weight)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    ours = Backbone("deit3_small_patch16_224", img_size=32, patch_size=8, weights=str(tmp_path / "w.pt"), options=TINY)
    torch.testing.assert_close(ours.vit.norm.weight, source.fc_norm.weight, rtol=0, atol=0)
    assert ours.vit.pos_embed.shape == (1, 16, 48)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    wide = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=4)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    sizes = {"img_size": 32, "patch_size": 8, "options": TINY}
    with pytest.raises(ValueError, match=r"other.pt lacks \d+ of \d+ tensors .*cls_token"):
        Backbone("vit_tiny_patch16_224", weights=str(tmp_path / "other.pt"), **sizes)
    with pytest.raises(ValueError, match=r"text.pt is not a checkpoint that can be read safely"):
        Backbone("vit_tiny_patch16_224", weights=str(tmp_path / "text.pt"), **sizes)
    with pytest.raises(ValueError, match=r"wide.pt: cls_token has shape \[1, 1, 96\], the model \[1, 1, 48\]"):
        Backbone("vit_tiny_patch16_224", weights=str(tmp_path / "wide.pt"), **sizes)


def test_attributes() -> None:
    ours = backbone("vit_base_patch16_siglip_224")
    assert (ours.embed_dim, ours.num_heads, ours.patch_size, ours.img_size) == (48, 4, 8, 32)
    assert (ours.grid_size, ours.num_patches, ours.num_prefix_tokens) == ((4, 4), 16, 0)
    assert ours.pixel_mean == (0.5, 0.5, 0.5) == ours.pixel_std
    assert ours.no_weight_decay() == {"vit.pos_embed", "text.position", "text.modality"}
    assert ours.token_embedding.weight.shape == (50, 48)
    with pytest.raises(ValueError, match="no token embedding"):
        _ = backbone(vocab_size=None).token_embedding
