"""MAE against Hugging Face's ViTMAEForPreTraining with the same weights and the same hidden patches."""

import numpy as np
import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import mmssl
from mmssl.objectives.base import check_image_masking
from mmssl.types import Batch, Image


def _copy_block(source: torch.nn.Module, target: torch.nn.Module) -> None:
    attention = source.attention
    target.attn.qkv.weight.copy_(torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]))
    target.attn.qkv.bias.copy_(torch.cat([p.bias for p in (attention.q_proj, attention.k_proj, attention.v_proj)]))
    target.attn.proj.load_state_dict(attention.o_proj.state_dict())
    target.norm1.load_state_dict(source.layernorm_before.state_dict())
    target.norm2.load_state_dict(source.layernorm_after.state_dict())
    target.mlp.fc1.load_state_dict(source.mlp.fc1.state_dict())
    target.mlp.fc2.load_state_dict(source.mlp.fc2.state_dict())


@torch.no_grad()
def copy_weights(source: ViTMAEForPreTraining, module: mmssl.MAE) -> None:
    vit, decoder = module.network.backbone.vit, module.network.decoder
    vit.cls_token.copy_(source.vit.embeddings.cls_token)
    vit.pos_embed.copy_(source.vit.embeddings.position_embeddings)
    vit.patch_embed.proj.load_state_dict(source.vit.embeddings.patch_embeddings.projection.state_dict())
    for ours, theirs in zip(vit.blocks, source.vit.layers, strict=True):
        _copy_block(theirs, ours)
    vit.norm.load_state_dict(source.vit.layernorm.state_dict())
    theirs = source.decoder
    decoder.embed.load_state_dict(theirs.decoder_embed.state_dict())
    decoder.mask_token.copy_(theirs.mask_token.view_as(decoder.mask_token))
    for ours_block, theirs_block in zip(decoder.blocks, theirs.decoder_layers, strict=True):
        _copy_block(theirs_block, ours_block)
    decoder.norm.load_state_dict(theirs.decoder_norm.state_dict())
    decoder.predict.load_state_dict(theirs.decoder_pred.state_dict())


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_and_gradients_equal_hugging_face(norm_pix_loss: bool) -> None:
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        norm_pix_loss=norm_pix_loss,
        initializer_range=0.2,
    )
    theirs = ViTMAEForPreTraining(config)
    # transformers 5 zeroes both position tables when it builds without a checkpoint; its own method brings the
    # decoder's back (published checkpoints hold those numbers), the encoder's are drawn and copied.
    for parameter in (theirs.decoder.decoder_pos_embed, theirs.decoder.mask_token):
        parameter._is_hf_initialized = False
    theirs.decoder.initialize_weights(16)
    assert theirs.decoder.decoder_pos_embed.abs().max() == 1
    torch.nn.init.normal_(theirs.vit.embeddings.position_embeddings)
    ours = mmssl.MAE(
        backbone="vit_tiny_patch16_224",
        backbone_options={"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 2, "num_heads": 3}},
        norm_pix_loss=norm_pix_loss,
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=4,
    )
    copy_weights(theirs, ours)
    # Hugging Face hides the patches with the largest noise: one noise gives both the same hidden patches.
    noise = torch.rand(3, 16)
    order = noise.argsort(dim=1)
    visible, hidden = order[:, :4].sort().values, order[:, 4:].sort().values
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(0, ["a", "b", "c"], image=Image(pixels, visible, hidden))

    out = theirs(ours.network.pixels(pixels), noise=noise)
    out.loss.backward()
    total, count = ours.compare(ours(batch), batch)["image"]
    (total / count).backward()

    assert count == 3 * 12
    torch.testing.assert_close(total / count, out.loss, rtol=1e-5, atol=1e-5)
    pairs = [
        (ours.network.backbone.vit.cls_token.grad, theirs.vit.embeddings.cls_token.grad),
        (
            ours.network.backbone.vit.patch_embed.proj.weight.grad,
            theirs.vit.embeddings.patch_embeddings.projection.weight.grad,
        ),
        (ours.network.backbone.vit.blocks[0].mlp.fc1.weight.grad, theirs.vit.layers[0].mlp.fc1.weight.grad),
        (
            ours.network.backbone.vit.blocks[1].attn.qkv.weight.grad[:48],
            theirs.vit.layers[1].attention.q_proj.weight.grad,
        ),
        (ours.network.backbone.vit.norm.weight.grad, theirs.vit.layernorm.weight.grad),
        (ours.network.decoder.mask_token.grad.view(-1), theirs.decoder.mask_token.grad.view(-1)),
        (ours.network.decoder.blocks[1].mlp.fc2.weight.grad, theirs.decoder.decoder_layers[1].mlp.fc2.weight.grad),
        (ours.network.decoder.predict.weight.grad, theirs.decoder.decoder_pred.weight.grad),
    ]
    for mine, reference in pairs:
        assert reference.abs().max() > 1e-6
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_patches_go_there_and_back() -> None:
    pixels = mmssl.MAE(backbone_options={"img_size": 32, "options": {"depth": 1}}, decoder_depth=1).network.pixels
    picture = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(pixels.unpatchify(pixels.patchify(picture), 32), picture)
    first = picture[0, :, :16, :16].permute(1, 2, 0).reshape(-1)  # row, column, channel
    torch.testing.assert_close(pixels.patchify(picture)[0, 0], first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio of the image is 0.0"),
        ({"mask_ratio": 1.0}, "mask_ratio of the image is 1.0"),
        ({"backbone_options": {"image_size": 32}}, "backbone_options has no 'image_size'; did you mean 'img_size'"),
        ({"backbone_options": {"img_size": 100}}, "100"),
        ({"backbone": "vit_bas_patch16_224"}, "vit_base_patch16_224"),
        ({"backbone": "resnet50"}, "resnet50"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_errors_say_what_and_what_to_do(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        mmssl.MAE(**{"backbone": "vit_tiny_patch16_224", **arguments})
    assert "\n" not in str(caught.value)


def test_completion_shows_the_visible_patches_unchanged(make_batch: object, tiny: dict[str, object]) -> None:
    module = mmssl.MAE(backbone="vit_tiny_patch16_224", backbone_options=tiny, decoder_embed_dim=32, decoder_depth=1)
    batch = make_batch(module, 2)  # type: ignore[operator]
    with torch.no_grad():
        shown = module.complete(batch)
    patchify = module.network.pixels.patchify
    original, seen, completed = (patchify(x) for x in (shown.original, shown.visible, shown.completed))
    for row, (visible, hidden) in enumerate(zip(batch.image.visible, batch.image.hidden, strict=True)):
        np.testing.assert_allclose(seen[row, visible], original[row, visible], atol=1e-6)
        np.testing.assert_allclose(completed[row, visible], original[row, visible], atol=1e-6)
        assert (seen[row, hidden] - 0.5).abs().max() < 1e-6


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(ValueError, match="image masking 'blok' is unknown; use one of random, block, multi_block"):
        check_image_masking((4, 4), 0.5, "blok")


def test_a_picture_of_one_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="one single patch"):
        check_image_masking((1, 1), 0.5, "random")
