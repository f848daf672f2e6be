"""``init_from``: pretraining begins from timm's or MAE's file, or from an earlier run, and says what it took."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pairs import TINY, caption
from runs import SMALL, save_untrained, train
from safetensors.torch import save_file
from torch import Tensor

import mmssl
from mmssl.backbone import Backbone
from mmssl.data.tokenizer import train_tokenizer
from mmssl.pretrained.start import start_from
from mmssl.pretrained.whole import CheckpointError
from mmssl.report import load_run

VIT = "vit_tiny_patch16_224"


def official_mae(path: Path, img_size: int = 32) -> dict[str, Tensor]:
    """A file as facebookresearch/mae's main_pretrain.py writes it: its names, its decoder, its command line."""
    vit = timm.create_model(VIT, num_classes=0, img_size=img_size, patch_size=8, **TINY["options"])
    state = {name: torch.randn_like(value) for name, value in vit.state_dict().items()}
    decoder = {
        "mask_token": torch.randn(1, 1, 32),
        "decoder_embed.weight": torch.randn(32, 48),
        "decoder_pos_embed": torch.randn(1, 17, 32),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(96, 32),
        "decoder_norm.weight": torch.randn(32),
        "decoder_pred.weight": torch.randn(192, 32),
    }
    arguments = argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75, epochs=800)
    torch.save({"model": {**state, **decoder}, "optimizer": {}, "epoch": 799, "scaler": {}, "args": arguments}, path)
    return state


@pytest.mark.parametrize("form", ["mae", "safetensors", "timm's folder"])
def test_a_file_of_image_weights(tmp_path: Path, capsys: Any, form: str, tokenizer_path: str):
    state = official_mae(tmp_path / "mae.pth")
    path = tmp_path / "mae.pth"
    if form != "mae":
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    if form == "timm's folder":
        (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    module = mmssl.MMM(
        tokenizer=tokenizer_path, backbone=VIT, backbone_options={**TINY, "experts": True}, init_from=str(path), **SMALL
    )
    ours = module.network.backbone.state_dict()
    assert all(torch.equal(ours[f"vit.{name}"], value) for name, value in state.items())
    assert torch.equal(ours["vit.blocks.1.text_expert.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    said = capsys.readouterr().out
    assert f"started from {path}: {len(state)} tensors taken, 0 resized" in said
    assert "text.token_embedding.weight" in said
    assert "norm2.weight from the picture's" in said
    assert ("decoder_pos_embed" in said or "mask_token" in said) == (form == "mae")


def test_another_picture_size_is_resampled(tmp_path: Path):
    state = official_mae(tmp_path / "mae.pth", img_size=48)
    backbone = Backbone(VIT, **TINY)
    account = start_from(backbone, str(tmp_path / "mae.pth"))
    assert account.resized == ["vit.pos_embed [1, 37, 48] -> [1, 17, 48]"]
    assert account.new == []
    plain = timm.create_model(VIT, num_classes=0, img_size=32, patch_size=8, **TINY["options"])
    expected = timm.models.vision_transformer.checkpoint_filter_fn({"pos_embed": state["pos_embed"]}, plain)
    assert torch.equal(backbone.vit.pos_embed, expected["pos_embed"])


def test_an_earlier_run_with_another_size_tokenizer_and_length(joint_run: Path, tmp_path: Path, capsys: Any):
    before = mmssl.load_backbone(joint_run)
    path = tmp_path / "other.json"
    train_tokenizer([caption(i) + " zebra quilt" for i in range(60)], 90, path)
    options = {**TINY, "img_size": 48, "experts": True, "options": {**TINY["options"], "depth": 3}}
    module = mmssl.MMM(
        tokenizer=str(path), backbone=VIT, backbone_options=options, max_tokens=20, init_from=str(joint_run), **SMALL
    )
    after, old, new = module.network.backbone, before.tokenizer, module.tokenizer
    assert old is not None
    names = {old.token(i): i for i in range(old.vocab_size)}
    shared = [i for i in range(new.vocab_size) if new.token(i) in names]
    assert 5 < len(shared) < new.vocab_size
    theirs = before.backbone.text.token_embedding.weight[[names[new.token(i)] for i in shared]]
    assert torch.equal(after.text.token_embedding.weight[shared], theirs)
    assert torch.equal(after.text.position[:12], before.backbone.text.position)
    for part in ("blocks.1.text_expert.mlp.fc1.weight", "blocks.0.attn.qkv.weight", "cls_token"):
        assert torch.equal(after.vit.state_dict()[part], before.backbone.vit.state_dict()[part])
    assert after.vit.pos_embed.shape == (1, 37, 48)
    said = capsys.readouterr().out
    assert "step 4, online weights" in said
    assert "vit.pos_embed [1, 17, 48] -> [1, 37, 48]" in said
    assert f"{len(shared)} of {new.vocab_size} tokens taken by name" in said
    assert "text.position 12 -> 20 rows: the first 12 taken, 8 new" in said
    assert "vit.blocks.2.norm1.weight" in said


def test_the_same_run_again_takes_everything(joint_run: Path):
    before = mmssl.load_backbone(joint_run)
    twin = Backbone(VIT, **TINY, experts=True, vocab_size=before.tokenizer.vocab_size, max_text_tokens=12)
    account = start_from(twin, str(joint_run), before.tokenizer)
    assert (account.resized, account.new, account.left_out) == ([], [], [])
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in before.backbone.state_dict().items())
    pictures = Backbone(VIT, **TINY)
    account = start_from(pictures, str(joint_run))
    assert account.new == []
    assert "text.position" in account.left_out


def test_a_resumed_run_needs_its_beginning_no_more(tmp_path: Path, pair_shards: str, capsys: Any):
    from mmssl.cli import main

    official_mae(tmp_path / "mae.pth")
    run = train(tmp_path / "run", "MAE", pair_shards, init_from=str(tmp_path / "mae.pth"), **SMALL)
    assert "tensors taken" in capsys.readouterr().out
    (tmp_path / "mae.pth").unlink()
    assert main(["fit", "--run", str(run), "--resume", "--trainer.max_steps", "6"]) == 0
    assert load_run(run)[0].report_step == 6
    assert main(["validate", "--run", str(run)]) == 0
    assert mmssl.load_backbone(run).about["step"] == 6


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("other width", "has shape"),
        ("no transformer", "holds no vision transformer"),
        ("code", "cannot be read safely"),
        ("truncated", "damaged or cut short"),
        ("nothing", "there is no"),
    ],
)
def test_one_line_for_what_cannot_be_a_beginning(tmp_path: Path, how: str, said: str):
    path = tmp_path / "weights.pth"
    official_mae(path)
    if how == "no transformer":
        torch.save({"model": {"weight": torch.zeros(2)}}, path)
    elif how == "code":
        torch.save({"model": {}, "run": math.sin}, path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    elif how == "nothing":
        path.unlink()
    options = {**TINY, "options": {**TINY["options"], "embed_dim": 96}} if how == "other width" else TINY
    with pytest.raises((ValueError, CheckpointError), match=said) as raised:
        mmssl.MAE(backbone=VIT, backbone_options=options, init_from=str(path), **SMALL)
    assert "\n" not in str(raised.value)


def other(**options: Any) -> Backbone:
    return Backbone(VIT, **{**TINY, "options": {**TINY["options"], **options}})


def test_another_number_of_heads_is_refused(image_run: Path):
    """Of the same shapes, but another function."""
    assert start_from(other(), str(image_run)).differs == []
    with pytest.raises(
        ValueError, match=r"^init_from: .*step=00000004.ckpt .* has 3 heads, the model 4; .* num_heads: 3"
    ):
        start_from(other(num_heads=4), str(image_run))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"act_layer": "relu"}, "blocks.mlp.act: GELU there, ReLU here"),
        ({"norm_layer": "rmsnorm"}, "norm: LayerNorm there, RmsNorm here"),
        ({"qk_norm": True}, "blocks.attn.q_norm: Identity there, LayerNorm here"),
    ],
)
def test_what_changes_the_function_without_the_shapes_is_said(image_run: Path, options: dict[str, Any], said: str):
    account = start_from(other(**options), str(image_run))
    assert said in account.differs
    assert "  differs   " in str(account)
    assert said.partition(":")[0] in str(account)


def test_other_rotary_positions_and_pixels_are_said(tmp_path: Path):
    name = "eva02_tiny_patch14_224"
    small = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 1, "num_heads": 3}}
    path = save_untrained(mmssl.MAE(backbone=name, backbone_options=small, **SMALL), tmp_path / "a.ckpt")
    larger = {**small, "img_size": 48, "drop_path_rate": 0.1}
    assert start_from(Backbone(name, **larger), str(path)).differs == []
    options = {**small["options"], "rope_temperature": 50.0}
    assert start_from(Backbone(name, **{**small, "options": options}), str(path)).differs == [
        "rope.temperature: 10000.0 there, 50.0 here"
    ]
    path = save_untrained(mmssl.MAE(backbone=VIT, backbone_options=TINY, **SMALL), tmp_path / "b.ckpt")
    account = start_from(Backbone("deit_tiny_patch16_224", **TINY), str(path))
    assert account.differs == [
        "pixel mean: (0.5, 0.5, 0.5) there, (0.485, 0.456, 0.406) here",
        "pixel std: (0.5, 0.5, 0.5) there, (0.229, 0.224, 0.225) here",
    ]


def test_heads_of_a_file_of_weights_alone(tmp_path: Path):
    official_mae(tmp_path / "mae.pth")
    account = start_from(other(num_heads=4), str(tmp_path / "mae.pth"))
    assert account.unchecked == "the file does not say how many heads its model has; this one has 4"
    assert "unchecked" in str(account)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    torch.save({"state_dict": vit.state_dict(), "arch": "vit_tiny_patch16_224"}, tmp_path / "timm.pth")
    for path in (tmp_path / "model.safetensors", tmp_path / "timm.pth"):
        account = start_from(Backbone(VIT, options={"depth": 2}), str(path))
        assert (account.unchecked, account.differs) == ("", [])
        with pytest.raises(ValueError, match="has 3 heads, the model 6"):
            start_from(Backbone(VIT, options={"depth": 2, "num_heads": 6}), str(path))
    # Of another width than the model of that name: somebody's own, of which the name says nothing.
    save_file({**official_mae(tmp_path / "mae.pth")}, tmp_path / "model.safetensors")
    assert "heads" in start_from(other(num_heads=4), str(tmp_path / "model.safetensors")).unchecked


def test_two_beginnings_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="choose one"):
        mmssl.MAE(backbone=VIT, backbone_options={**TINY, "pretrained": True}, init_from="x", **SMALL)
