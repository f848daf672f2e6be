"""An exported folder in Hugging Face transformers: the image side as timm's, the whole as MmsslModel, the tokenizer."""

import builtins
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
from pairs import caption, picture
from PIL import Image as PILImage
from runs import save_untrained
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import mmssl
from mmssl.data.tokenizer import TextTokenizer, train_tokenizer
from mmssl.export import write_export
from mmssl.pretrained.whole import CheckpointError

TEXTS = [caption(i) for i in range(4)]
ODD = [
    *(caption(i) for i in range(20)),
    *(
        "",
        " ",
        "[MASK] a [CLS] red [PAD] [SEP]",
        "<mask> x </s>",
        "##ing Ġthe ▁the don't",
        "...!?",
        "  tab\tnew\nline  ",
    ),
    *(
        "Ünïcödé 漢字テスト 🙂🏳️‍🌈 \u200b zero",
        "a\u0301 é ÅÅ ﬁ ½ ™",
        "مرحبا بالعالم",
        "\ufeffbom",
        "x" * 300,
        "red " * 60,
    ),
]


@pytest.fixture(autouse=True)
def warnings_of_transformers(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """transformers tells of missing or unexpected weights in its log, and goes on."""
    transformers.utils.logging.enable_propagation()
    yield
    transformers.utils.logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [line for line in said if "weights" in line or "initialized" in line or "UNEXPECTED" in line], said


@pytest.fixture(scope="module")
def exported(joint_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers") / "out"
    write_export(joint_run, folder)
    return folder


def opened(count: int = 4) -> list[PILImage.Image]:
    return [PILImage.open(io.BytesIO(picture(i, 40))) for i in range(count)]


def whole(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def inputs(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(of pictures, of texts), from what the folder's own processors make of them."""
    texts = AutoTokenizer.from_pretrained(folder)(TEXTS, truncation=True, padding=True, return_tensors="pt")
    return dict(AutoImageProcessor.from_pretrained(folder)(opened())), dict(texts)


def assert_equal(theirs: Any, ours: Any) -> None:
    assert torch.allclose(theirs.last_hidden_state, ours.tokens, rtol=0, atol=1e-6)
    assert torch.allclose(theirs.pooler_output, ours.pooled, rtol=0, atol=1e-6)
    assert torch.equal(theirs.attention_mask.bool(), ours.valid)


# ---- the image side, without code


@pytest.mark.parametrize("run", ["joint_run", "image_run"])
def test_the_image_side_opens_as_timms(run: str, tmp_path: Path, request: pytest.FixtureRequest):
    write_export(request.getfixturevalue(run), tmp_path / "out")
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is transformers.TimmWrapperModel
    assert not any(info.values())
    ours = mmssl.load_backbone(tmp_path / "out")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(opened())["pixel_values"]
    with torch.no_grad():
        theirs, mine = model(pixels), ours.encode_image(opened())
    assert torch.allclose(theirs.last_hidden_state, mine.tokens, rtol=0, atol=1e-6)
    assert torch.allclose(theirs.pooler_output, mine.pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (61, 47), (47, 61), (300, 211)])
def test_the_image_processor_sees_what_mmssl_sees(exported: Path, size: tuple[int, int]):
    """Pillow's bicubic there, torch's here: at most one of 255 levels apart, and seldom."""
    noise = torch.randint(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=torch.uint8)
    image = PILImage.fromarray(noise.numpy()).resize(size, PILImage.Resampling.BICUBIC)
    ours = mmssl.load_backbone(exported)
    theirs = AutoImageProcessor.from_pretrained(exported)(image)["pixel_values"]
    levels = (theirs * ours.std + ours.mean) * 255
    apart = (levels - ours.pixels(image)).abs()
    assert apart.max() < 1.01
    assert (apart > 0.5).float().mean() < 0.05


def test_pipelines(exported: Path):
    ours = mmssl.load_backbone(exported)
    image, words = opened()[0], TEXTS[0]
    plain = transformers.pipeline("image-feature-extraction", model=str(exported), pool=True)
    own = transformers.pipeline("feature-extraction", model=str(exported), trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(torch.tensor(plain(image)), ours.encode_image(image).pooled, rtol=0, atol=1e-5)
        assert torch.allclose(torch.tensor(own(words)), ours.encode_text(words).tokens, rtol=0, atol=1e-5)


# ---- the tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "foreign"])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, kind: str):
    path = tmp_path / "tokenizer.json"
    if kind == "foreign":  # RoBERTa's names, no wrapping in <s> ... </s>, and a limit of its own
        words = sorted({word for text in ODD for word in text.split()} - {"<mask>", "</s>"})
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        backend.enable_truncation(7)
        backend.save(str(path))
    else:
        train_tokenizer([text for text in ODD if text.strip()], 400, path, model=kind)
    small = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 1, "num_heads": 3}}
    module = mmssl.MMM(
        tokenizer=str(path), max_tokens=12, backbone="vit_tiny_patch16_224", backbone_options=small,
        decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4,
    )  # fmt: skip
    write_export(save_untrained(module, tmp_path / "a.ckpt"), tmp_path / "out")
    ours, theirs = mmssl.load_backbone(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.is_fast
    assert theirs.model_max_length == 12
    tokenizer = TextTokenizer(path)
    for text in ODD:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids.tolist(), text
    batch = theirs(ODD, truncation=True, padding=True, return_tensors="pt")
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["input_ids"].shape == (len(ODD), 12)
    lengths = ours.text(ODD).cu_seqlens.diff()
    assert torch.equal(batch["attention_mask"].sum(1), lengths)
    assert torch.equal(batch["input_ids"][batch["attention_mask"] == 1], ours.text(ODD).input_ids)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_id).all()
    assert (batch["input_ids"].gather(1, lengths[:, None].long() - 1) == tokenizer.sep_id).all()
    special = (theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)
    known = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert special == known


# ---- the whole model


@pytest.mark.parametrize("pool", [None, "cls", "mean"])
def test_the_whole_model_is_equal(exported: Path, pool: Any):
    model, info = whole(exported, output_loading_info=True)
    assert not any(info.values())
    assert not model.training
    assert all(name.startswith(("mmssl.backbone.vit.", "mmssl.backbone.text.")) for name in model.state_dict())
    ours, (image, text) = mmssl.load_backbone(exported), inputs(exported)
    with torch.no_grad():
        assert_equal(model(**image, pool=pool), ours.encode_image(opened(), pool))
        assert_equal(model(**text, pool=pool), ours.encode_text(TEXTS, pool))
        assert_equal(model(**image, **text, pool=pool), ours.encode_pair(opened(), TEXTS, pool))
        alone = model(input_ids=text["input_ids"][:1, :7])  # no mask: nothing is padding
        assert alone.attention_mask.tolist() == [[1] * 7]
        assert isinstance(model(**text, return_dict=False), tuple)


def test_padding_to_a_fixed_length_changes_nothing(exported: Path):
    model, tokenizer = whole(exported), AutoTokenizer.from_pretrained(exported)
    wide = tokenizer(TEXTS[:1], truncation=True, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = model(**wide)
        ours = mmssl.load_backbone(exported).encode_text(TEXTS[0])
    assert output.last_hidden_state.shape[1] == 12
    assert torch.equal(output.attention_mask, wide["attention_mask"])
    length = ours.tokens.shape[1]
    assert torch.allclose(output.last_hidden_state[:, :length], ours.tokens, rtol=0, atol=1e-6)
    assert not output.last_hidden_state[:, length:].any()


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",
        "vit_small_patch16_dinov3",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_rope_mixed_224",
    ],
)
def test_families_with_other_prefixes_and_rotary_positions(tmp_path: Path, tokenizer_path: str, name: str):
    """transformers builds on the meta device: buffers that no file holds must be made anew."""
    small = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 2, "num_heads": 4}}
    module = mmssl.MMM(
        backbone=name, backbone_options=small, tokenizer=tokenizer_path, max_tokens=12,
        decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4,
    )  # fmt: skip
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.json")
    write_export(save_untrained(module, tmp_path / "a.ckpt"), tmp_path / "out")
    model, ours, (image, text) = (
        whole(tmp_path / "out"),
        mmssl.load_backbone(tmp_path / "out"),
        inputs(tmp_path / "out"),
    )
    with torch.no_grad():
        assert_equal(model(**image, **text), ours.encode_pair(opened(), TEXTS))
        theirs = AutoModel.from_pretrained(tmp_path / "out")(**image)
        assert torch.allclose(theirs.pooler_output, ours.encode_image(opened()).pooled, rtol=0, atol=1e-6)


def test_a_round_trip_after_fine_tuning(exported: Path, tmp_path: Path):
    """Every parameter learns; what is saved is an export again, for all three libraries."""
    model, (image, text) = whole(exported, drop_path_rate=0.1), inputs(exported)
    model.gradient_checkpointing_enable()
    model.train()
    assert model.mmssl.backbone.grad_checkpointing
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(**image, **text)
    (output.last_hidden_state.square().mean() + output.pooler_output.sum()).backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert still == []
    optimizer.step()

    model.eval().save_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "out")
    again = whole(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    ours, before = mmssl.load_backbone(tmp_path / "out"), mmssl.load_backbone(exported)
    with torch.no_grad():
        assert_equal(model(**image, **text), ours.encode_pair(opened(), TEXTS))
        assert not torch.allclose(ours.encode_text(TEXTS).pooled, before.encode_text(TEXTS).pooled, rtol=0, atol=1e-2)
        plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
        assert torch.allclose(plain(image["pixel_values"]), ours.encode_image(opened()).pooled, rtol=0, atol=1e-6)
        side = AutoModel.from_pretrained(tmp_path / "out")
        assert torch.allclose(side(**image).pooler_output, ours.encode_image(opened()).pooled, rtol=0, atol=1e-6)
    assert inputs(tmp_path / "out")[1]["input_ids"].equal(text["input_ids"])


def test_dtype_and_device(exported: Path, tmp_path: Path):
    model, (image, text) = whole(exported, dtype=torch.bfloat16, device_map="cpu"), inputs(exported)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        half = model(**image, **text).pooler_output
        full = whole(exported)(**image, **text).pooler_output
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), full, atol=0.1)
    model.save_pretrained(tmp_path / "out")
    assert whole(tmp_path / "out").dtype == torch.bfloat16
    on_meta = AutoModel.from_config(model.config, trust_remote_code=True)  # weights of its own, all of them drawn
    assert all(value.isfinite().all() for value in on_meta.state_dict().values())


def test_a_trainer_trains_and_saves_it(exported: Path, tmp_path: Path):
    class WithHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = whole(exported), torch.nn.Linear(48, 4)

        def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            pooled = self.body(pixel_values, input_ids, attention_mask).pooler_output
            logits = self.head(pooled)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    image, text = inputs(exported)
    rows = [{**{k: v[i % 4] for k, v in (image | text).items()}, "labels": i % 4} for i in range(16)]
    torch.manual_seed(0)
    model = WithHead()
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path / "t"), max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=5, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    model.body.save_pretrained(tmp_path / "out")
    assert torch.equal(whole(tmp_path / "out").state_dict()["mmssl.backbone.text.position"],
                       model.body.state_dict()["mmssl.backbone.text.position"])  # fmt: skip


def test_a_repository_of_the_hub(exported: Path, monkeypatch: pytest.MonkeyPatch):
    from mmssl.pretrained.huggingface import MmsslModel

    asked = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append((repository, options["revision"], options["token"]))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = MmsslModel.from_pretrained("someone/backbone", revision="v1", token="t")
    assert asked == [("someone/backbone", "v1", "t")]
    assert model.name_or_path == "someone/backbone"
    _, text = inputs(exported)
    with torch.no_grad():
        assert_equal(model(**text), mmssl.load_backbone(exported).encode_text(TEXTS))


def test_a_repository_in_the_hubs_cache(exported: Path, tmp_path: Path):
    """As huggingface_hub lays it down: AutoModel finds the code in it, and the code the weights."""
    snapshot, commit = tmp_path / "models--someone--backbone" / "snapshots", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(exported, snapshot / commit)
    (snapshot.parent / "refs").mkdir()
    (snapshot.parent / "refs" / "main").write_text(commit)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    model = AutoModel.from_pretrained("someone/backbone", trust_remote_code=True, **options)
    text = AutoTokenizer.from_pretrained("someone/backbone", **options)(
        TEXTS, truncation=True, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert_equal(model(**text), mmssl.load_backbone(exported).encode_text(TEXTS))
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {
        "AutoModel": "modeling_mmssl.MmsslModel"
    }


# ---- what is refused


def test_what_does_not_fit_is_one_line(exported: Path, image_run: Path, tmp_path: Path):
    from mmssl.pretrained.huggingface import MmsslModel

    model, (image, text) = whole(exported), inputs(exported)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "give pixels, text or both"),
        ({"input_ids": torch.ones(1, 13, dtype=torch.int64)}, "truncation=True"),
        ({**text, "attention_mask": text["attention_mask"].flip(1)}, "padding_side='right'"),
        ({**text, "attention_mask": text["attention_mask"] * 0}, "without a token"),
        ({**image, "input_ids": text["input_ids"][:3]}, "4 pictures came with 3 texts"),
        ({"pixel_values": image["pixel_values"][..., :16, :16]}, "takes 32 x 32"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "uint8; give what AutoImageProcessor"),
    ]
    for arguments, said in wrong:
        with pytest.raises(ValueError, match=said) as raised:
            model(**arguments)
        assert "\n" not in str(raised.value)
    write_export(image_run, tmp_path / "image")
    with pytest.raises(ValueError, match="knows no text"):
        MmsslModel.from_pretrained(tmp_path / "image")(**text)
    with pytest.raises(ValueError, match="neither a folder"):
        MmsslModel.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("newer", "newer mmssl"),
        ("older", "export the run again"),
        ("cut", "damaged or cut short"),
        ("no file", "damaged or cut short|no such file"),
        ("fewer", "1 tensors are missing"),
        ("more", "1 tensors are missing or have no place"),
    ],
)
def test_a_spoiled_folder_is_one_line(exported: Path, tmp_path: Path, how: str, said: str):
    folder = shutil.copytree(exported, tmp_path / "out")
    config, path = json.loads((folder / "config.json").read_text()), folder / "text.safetensors"
    state = load_file(path)
    if how == "newer":
        config["mmssl"]["format"] = 2
    elif how == "older":
        del config["mmssl"]["text"]
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "no file":
        path.unlink()
    else:
        changed = (
            {k: v for k, v in state.items() if k != "text.position"}
            if how == "fewer"
            else {**state, "x": torch.ones(1)}
        )
        save_file(changed, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, CheckpointError), match=said) as raised:
        whole(folder)
    assert "\n" not in str(raised.value)


def test_an_export_from_before_these_files_loads(exported: Path, tmp_path: Path):
    folder = shutil.copytree(exported, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"], config["mmssl"]["text"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "modeling_mmssl.py"):
        (folder / name).unlink()
    old, new = mmssl.load_backbone(folder), mmssl.load_backbone(exported)
    with torch.no_grad():
        assert torch.equal(old.encode_text(TEXTS).pooled, new.encode_text(TEXTS).pooled)
    assert type(AutoModel.from_pretrained(folder)) is transformers.TimmWrapperModel


def test_without_mmssl_the_whole_model_says_so(exported: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("mmssl"):
            raise ModuleNotFoundError("No module named 'mmssl'")
        return real(name, *arguments)

    code = compile((exported / "modeling_mmssl.py").read_text(), "modeling_mmssl.py", "exec")
    monkeypatch.delitem(sys.modules, "mmssl.pretrained.huggingface", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs the package mmssl \(No module named 'mmssl'\)") as raised:
        exec(code, {})
    assert "\n" not in str(raised.value)
