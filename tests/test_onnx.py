"""``mmssl export --onnx``: what onnxruntime computes of real pictures and texts is what ``encode_*`` gives."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pairs import caption, picture
from runs import save_untrained
from tokenizers import Tokenizer

import mmssl
from mmssl.cli import main
from mmssl.data.images import decode_image
from mmssl.export import write_export
from mmssl.pretrained import onnx as module
from mmssl.pretrained.graphs import ImageGraph, Kind, export_graph
from mmssl.pretrained.onnx import write_onnx

SMALL = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 2, "num_heads": 4}}


def pixels(count: int) -> torch.Tensor:
    return torch.stack([decode_image(picture(i)) for i in range(count)])


def ids(tokenizer: Path, texts: list[str], room: int) -> dict[str, np.ndarray]:
    """What plain ``tokenizers`` makes of texts."""
    plain = Tokenizer.from_file(str(tokenizer))
    plain.enable_padding(pad_id=plain.token_to_id("[PAD]"))
    plain.enable_truncation(room)
    rows = plain.encode_batch(texts)
    return {
        "input_ids": np.array([row.ids for row in rows]),
        "attention_mask": np.array([row.attention_mask for row in rows]),
    }


def run(path: Path, **inputs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, pooled = onnxruntime.InferenceSession(path).run(["tokens", "pooled"], inputs)
    return torch.from_numpy(tokens), torch.from_numpy(pooled)


def assert_equal(found: tuple[torch.Tensor, torch.Tensor], expected: Any) -> None:
    torch.testing.assert_close(found[0], expected.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected.pooled, rtol=1e-5, atol=1e-5)


def untrained(objective: Any, name: str, tokenizer: str, folder: Path) -> Path:
    head = {} if objective is mmssl.MLM else {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
    run = objective(backbone=name, backbone_options=SMALL, tokenizer=tokenizer, max_tokens=12, **head)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(Path(tokenizer).read_text())
    (folder / "config.yaml").write_text(f"model: {{class_path: mmssl.{objective.__name__}}}")
    return save_untrained(run, folder / "a.ckpt")


@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_a_joint_model_with_experts(onnx_export: Path, count: int):
    backbone, texts = mmssl.load_backbone(onnx_export), [caption(i) for i in range(count)]
    texts[-1] = "blue"
    words = ids(onnx_export / "tokenizer.json", texts, 12)
    assert_equal(run(onnx_export / "image.onnx", pixels=pixels(count).numpy()), backbone.encode_image(pixels(count)))
    assert_equal(run(onnx_export / "text.onnx", **words), backbone.encode_text(texts))
    found = run(onnx_export / "pair.onnx", pixels=pixels(count).numpy(), **words)
    assert_equal(found, backbone.encode_pair(pixels(count), texts))
    if count > 1:
        assert not found[0][-1, -4:].any(), "the tokens of padding are not zero"


def test_a_row_of_padding_alone_is_zero(onnx_export: Path):
    words = ids(onnx_export / "tokenizer.json", [caption(0), caption(1)], 12)
    whole = run(onnx_export / "text.onnx", **words)
    words["attention_mask"][1] = 0
    tokens, pooled = run(onnx_export / "text.onnx", **words)
    assert not tokens[1].any()
    assert not pooled[1].any()
    assert torch.equal(tokens[0], whole[0][0])


def test_the_files_say_what_they_take_and_not_who_made_them(onnx_export: Path):
    session = onnxruntime.InferenceSession(onnx_export / "pair.onnx")
    assert {x.name: (x.shape, x.type) for x in session.get_inputs()} == {
        "pixels": (["batch", 3, 32, 32], "tensor(uint8)"),
        "input_ids": (["batch", "length"], "tensor(int64)"),
        "attention_mask": (["batch", "length"], "tensor(int64)"),
    }
    assert session.get_modelmeta().custom_metadata_map == {"max_text_tokens": "12"}
    for path in onnx_export.glob("*.onnx"):
        assert str(Path(mmssl.__file__).parent).encode() not in path.read_bytes()
    with pytest.raises(Exception, match="12 by 13"):
        run(onnx_export / "text.onnx", input_ids=np.ones((1, 13), np.int64), attention_mask=np.ones((1, 13), np.int64))


@torch.no_grad()
def test_text_alone(tokenizer_path: str, tmp_path: Path):
    """No picture was ever trained on, so there is no file for them; no class token, so pictures would be averaged."""
    path = untrained(mmssl.MLM, "vit_base_patch16_siglip_224", tokenizer_path, tmp_path / "run")
    write_export(path, tmp_path / "out", onnx=True, onnx_pool="mean")
    assert [file.name for file in (tmp_path / "out").glob("*.onnx")] == ["text.onnx"]
    texts = [caption(i) for i in range(3)]
    found = run(tmp_path / "out" / "text.onnx", **ids(tmp_path / "out" / "tokenizer.json", texts, 12))
    assert_equal(found, mmssl.load_backbone(path).encode_text(texts, pool="mean"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_base_patch16_siglip_224", "image"),  # no class token: the mean
        ("eva02_tiny_patch14_224", "pair"),  # rotary positions
    ],
)
@torch.no_grad()
def test_families_of_timm(tokenizer_path: str, tmp_path: Path, name: str, kind: Kind):
    backbone = mmssl.load_backbone(untrained(mmssl.MMM, name, tokenizer_path, tmp_path / "run"))
    for parameter in backbone.parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=0.5)  # layer scale begins near 0, which would hide every error
    write_onnx(backbone, tmp_path, [kind])
    texts = [caption(0), "grey", caption(4)]
    if kind == "image":
        assert_equal(run(tmp_path / "image.onnx", pixels=pixels(3).numpy()), backbone.encode_image(pixels(3)))
    else:
        found = run(tmp_path / "pair.onnx", pixels=pixels(3).numpy(), **ids(Path(tokenizer_path), texts, 12))
        assert_equal(found, backbone.encode_pair(pixels(3), texts))


@torch.no_grad()
def test_weights_beyond_what_one_file_holds(image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_INLINE", 0)
    write_export(image_run, tmp_path / "out", onnx=True)
    assert (tmp_path / "out" / "image.onnx").stat().st_size < (tmp_path / "out" / "image.onnx.data").stat().st_size
    expected = mmssl.load_backbone(image_run).encode_image(pixels(2))
    assert_equal(run(tmp_path / "out" / "image.onnx", pixels=pixels(2).numpy()), expected)


# ---- whole or absent


@pytest.mark.parametrize("how", ["wrong graph", "exporter fails", "no package", "pool alone", "no class token"])
def test_nothing_is_written(
    tokenizer_path: str, joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, how: str
):
    source, options, home = joint_run, ["--onnx"], tmp_path / "home"
    home.mkdir()
    if how == "wrong graph":
        monkeypatch.setattr(ImageGraph, "forward", lambda self, pixels: self.model(255 - pixels)[1::-1])
        said = "image.onnx gives other tokens than torch"
    elif how == "exporter fails":

        def fail(*args: Any, **options: Any) -> None:
            raise AttributeError("no such operator\nand a long report")

        monkeypatch.setattr(torch.onnx, "export", fail)
        said = "cannot write image.onnx of VisionTransformer (no such operator)"
    elif how == "no package":
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else name)
        said = "--onnx needs onnxscript, which is not installed; pip install 'mmssl[onnx]'"
    elif how == "pool alone":
        options, said = ["--onnx_pool", "mean"], "give --onnx as well"
    else:
        source = untrained(mmssl.MMM, "vit_base_patch16_siglip_224", tokenizer_path, tmp_path / "run")
        options, said = ["--onnx", "--onnx_pool", "cls"], "no class token"
    assert main(["export", str(source), "--out", str(home / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mmssl: error: ")
    assert said in error
    assert list(home.iterdir()) == []


def test_a_graph_of_what_is_not_there(image_run: Path):
    backbone = mmssl.load_backbone(image_run)
    with pytest.raises(ValueError, match="knows no text"):
        export_graph(backbone, "pair")
    with pytest.raises(ValueError, match=r"call \.eval\(\) before"):
        export_graph(backbone.train(), "image")
    assert backbone.backbone.vit.training
