"""``mmssl export``: the folder opens in plain timm and in mmssl.load_backbone, and is whole or absent."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from pairs import TINY, caption, picture
from runs import SMALL, save_untrained, train
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

import mmssl
from mmssl import export as module
from mmssl.cli import main
from mmssl.data.images import decode_image
from mmssl.export import write_export
from mmssl.pretrained.whole import CheckpointError


@pytest.fixture(scope="module")
def exported(joint_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    assert main(["export", str(joint_run), "--out", str(folder)]) == 0
    return folder


def pixels(size: int = 32) -> torch.Tensor:
    return torch.stack([decode_image(picture(i, size)) for i in range(4)])


def normalised(model: mmssl.Pretrained, size: int = 32) -> torch.Tensor:
    return (pixels(size).float() / 255 - model.mean) / model.std


def assert_equal(one: mmssl.Pretrained, other: mmssl.Pretrained) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- it opens


def test_a_round_trip_is_equal_to_the_bit(joint_run: Path, exported: Path):
    before, after = mmssl.load_backbone(joint_run), mmssl.load_backbone(exported)
    assert_equal(before, after)
    texts = [caption(i) for i in range(4)]
    with torch.no_grad():
        assert torch.equal(before.encode_pair(pixels(), texts).tokens, after.encode_pair(pixels(), texts).tokens)
    assert after.tokenizer.to_json() == (joint_run / "tokenizer.json").read_text()
    assert after.about["step"] == 4
    assert_equal(mmssl.load_backbone(exported / "model.safetensors"), after)


def test_an_export_can_be_exported(exported: Path, tmp_path: Path):
    write_export(exported, tmp_path / "again")
    for name in ("model.safetensors", "text.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_plain_timm_opens_the_image_side(exported: Path):
    ours = mmssl.load_backbone(exported)
    plain = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert plain.load_state_dict(load_file(exported / "model.safetensors"), strict=True)
    with torch.no_grad():
        theirs = plain.forward_features(normalised(ours))
        assert torch.allclose(theirs, ours.encode_image(pixels()).tokens, rtol=0, atol=1e-6)
        assert torch.allclose(plain(normalised(ours)), ours.encode_image(pixels()).pooled, rtol=0, atol=1e-6)
    classifier = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=3)
    assert torch.equal(classifier.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    transform = resolve_model_data_config(plain)
    assert transform["input_size"] == (3, 32, 32)
    assert tuple(transform["mean"]) == ours.backbone.pixel_mean
    assert create_transform(**transform) is not None


def test_plain_timm_opens_it_at_another_resolution(exported: Path):
    ours = mmssl.load_backbone(exported, img_size=48)
    plain = timm.create_model(f"local-dir:{exported}", pretrained=True, img_size=48).eval()
    with torch.no_grad():
        theirs = plain.forward_features(normalised(ours, 48))
        assert torch.allclose(theirs, ours.encode_image(pixels(48)).tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_siglip_224", {"num_heads": 4}),
        ("vit_small_patch14_reg4_dinov2", {"num_heads": 4}),
        ("vit_base_patch16_clip_224", {"num_heads": 4}),
        ("deit3_small_patch16_224", {"num_heads": 4}),
        ("vit_base_patch16_rpn_224", {"num_heads": 4}),
        ("eva02_tiny_patch14_224", {"num_heads": 4}),
        ("vit_small_patch16_dinov3", {"num_heads": 4}),
        ("vit_small_patch16_rope_mixed_224", {"num_heads": 4}),
    ],
)
def test_every_family_of_timm(tmp_path: Path, name: str, options: dict[str, Any]):
    """Prefix tokens, rotary positions, norms and pooling differ; both sizes must agree with plain timm."""
    small = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 2, **options}}
    run = mmssl.MAE(backbone=name, backbone_options=small, decoder_embed_dim=32, decoder_depth=1)
    folder = tmp_path / "out"
    write_export(save_untrained(run, tmp_path / "a.ckpt"), folder)
    for size in (32, 48):
        ours = mmssl.load_backbone(folder, img_size=size)
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()
        with torch.no_grad():
            encoded = ours.encode_image(pixels(size))
            theirs = plain.forward_features(normalised(ours, size))
            assert torch.allclose(theirs, encoded.tokens, rtol=0, atol=1e-6)
            assert torch.allclose(plain(normalised(ours, size)), encoded.pooled, rtol=0, atol=1e-6)


def test_a_fine_tuned_model_is_exported_like_any(joint_run: Path, tmp_path: Path):
    tuned = mmssl.PairClassifier(num_classes=3, backbone=str(joint_run))
    with torch.no_grad():
        tuned.network.backbone.vit.cls_token += 1
    path = save_untrained(tuned, tmp_path / "a.ckpt")
    shutil.copy(joint_run / "tokenizer.json", tmp_path / "tokenizer.json")
    write_export(path, tmp_path / "out")
    assert_equal(mmssl.load_backbone(tmp_path / "out"), mmssl.load_backbone(path))
    assert torch.equal(
        mmssl.load_backbone(tmp_path / "out").backbone.vit.cls_token, tuned.network.backbone.vit.cls_token
    )


@pytest.mark.parametrize(
    ("task", "kinds"), [("TextClassifier", ("text",)), ("PairClassifier", ("image", "text", "pair"))]
)
def test_what_it_was_trained_on_outlives_fine_tuning(
    task: str, kinds: tuple[str, ...], tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
):
    """A text model that was fine-tuned on texts knows no more of pictures than before."""
    language = mmssl.MLM(tokenizer=tokenizer_path, backbone="vit_tiny_patch16_224", backbone_options=TINY)
    (tmp_path / "mlm").mkdir()
    (tmp_path / "mlm" / "config.yaml").write_text("model: {class_path: mmssl.MLM}")
    for folder in (tmp_path, tmp_path / "mlm"):
        shutil.copy(tokenizer_path, folder / "tokenizer.json")
    first = getattr(mmssl, task)(num_classes=2, backbone=str(save_untrained(language, tmp_path / "mlm" / "a.ckpt")))
    second = mmssl.TextClassifier(num_classes=2, backbone=str(save_untrained(first, tmp_path / "first.ckpt")))
    resumed = mmssl.TextClassifier(
        num_classes=2, tokenizer=tokenizer_path, backbone_name="vit_tiny_patch16_224", backbone_options=TINY
    )
    content = torch.load(save_untrained(second, tmp_path / "second.ckpt"), weights_only=True)
    resumed.on_load_checkpoint(content)
    path = save_untrained(resumed, tmp_path / "resumed.ckpt")
    written: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "write_onnx", lambda model, folder, kinds, pool: written.append(kinds))
    write_export(path, tmp_path / "out", onnx=True)
    write_export(tmp_path / "out", tmp_path / "again", onnx=True)
    assert written == [kinds, kinds]
    card = (tmp_path / "again" / "README.md").read_text()
    assert ("untrained" in card) == (kinds == ("text",))
    tag = "image-feature-extraction" if "image" in kinds else "feature-extraction"
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == tag


def test_an_image_model_has_no_text_files(image_run: Path, tmp_path: Path):
    write_export(image_run, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert mmssl.load_backbone(tmp_path / "out").tokenizer is None


@pytest.fixture(scope="module")
def averaged_run(pair_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 8 steps, validated with the average of its weights at 4 and 8."""
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    run = train(tmp_path_factory.mktemp("ema") / "run", "MAE", pair_shards, [average], lr=0.01, **SMALL)
    assert main(["fit", "--run", str(run), "--resume", "--trainer.max_steps", "8"]) == 0
    return run


def scores(source: Path, out: Path, **options: Any) -> str:
    """What the card of an export says of scores."""
    write_export(source, out, **options)
    return (out / "README.md").read_text().split("## Scores")[1].split("## Recipe")[0]


@pytest.mark.parametrize("name", ["step=00000004.ckpt", "best.ckpt"])
def test_the_scores_are_those_of_the_weights(averaged_run: Path, tmp_path: Path, name: str):
    if name == "best.ckpt":
        shutil.copytree(averaged_run, tmp_path / "run")
        averaged_run = tmp_path / "run"
        shutil.copy(averaged_run / "checkpoints" / "step=00000004.ckpt", averaged_run / "checkpoints" / name)
    with (averaged_run / "metrics.csv").open(newline="") as file:
        values = {int(row["step"]): f"{float(row['val/loss']):.4g}" for row in csv.DictReader(file) if row["val/loss"]}
    assert values.keys() == {4, 8}
    assert values[4] != values[8]
    assert f"- val/loss: {values[4]} (step 4)\n" in scores(averaged_run / "checkpoints" / name, tmp_path / "4")
    assert f"- val/loss: {values[8]} (step 8)\n" in scores(averaged_run, tmp_path / "8")


def test_scores_of_an_average_are_no_scores_of_the_online_weights(averaged_run: Path, image_run: Path, tmp_path: Path):
    said = "of the average of the weights"
    assert said in scores(averaged_run, tmp_path / "online")
    assert said not in scores(averaged_run, tmp_path / "ema", weights="ema")
    assert said not in scores(image_run, tmp_path / "plain")


def test_a_half_written_line_of_metrics_is_passed_over(image_run: Path, tmp_path: Path):
    run = shutil.copytree(image_run, tmp_path / "run")
    (run / "metrics.csv").write_text("step,val/loss,val/loss_image\n2,0.12,0.3\n3,1e-,0.4,7\nx\n4,0.1")
    said = scores(run, tmp_path / "out")
    assert "- val/loss: 0.12 (step 2)\n- val/loss_image: 0.4 (step 3)\n" in said
    (run / "metrics.csv").write_text("")
    assert "None was logged" in scores(run, tmp_path / "none")


def test_no_path_of_the_machine_is_exported(image_run: Path, tmp_path: Path):
    home = tmp_path / "somebody" / "secret"
    (home / "weights").mkdir(parents=True)
    options = {"weights": str(home / "weights" / "vit.safetensors"), **TINY}
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, **TINY["options"])
    save_file(plain.state_dict(), options["weights"])
    begun = {"backbone": "vit_tiny_patch16_224", "decoder_embed_dim": 32, "decoder_depth": 1}
    one = save_untrained(mmssl.MAE(backbone_options=options, **begun), home / "one.ckpt")
    two = save_untrained(mmssl.MAE(backbone_options=TINY, init_from=str(one), **begun), home / "two.ckpt")
    tuned = save_untrained(mmssl.ImageClassifier(num_classes=2, backbone=str(two)), home / "tuned.ckpt")
    for source, name in ((one, "vit.safetensors"), (two, "one.ckpt"), (tuned, "vit_tiny_patch16_224")):
        folder = tmp_path / source.stem
        write_export(source, folder)
        for path in (folder / "README.md", folder / "config.json"):
            content = path.read_text()
            assert "somebody" not in content
            assert "secret" not in content
            assert name in content
        assert_equal(mmssl.load_backbone(folder), mmssl.load_backbone(source))


def test_names_that_are_no_paths_stay():
    recipe = {
        "init_from": "owner/name",
        "again": "hf://owner/name",
        "monitor": "val/loss",
        "file": "~/a",
        "at": "s3://b/c/d",
    }
    kept = {**recipe, "file": "a", "at": "d"}
    assert module.without_paths({"x": [recipe, 1, None]}) == {"x": [kept, 1, None]}
    assert module.without_paths(r"C:\Users\me\run") == "run"


def test_the_card_says_where_it_comes_from(exported: Path):
    card = (exported / "README.md").read_text()
    front, recipe = card.split("---")[1], card.split("```yaml")[1].split("```")[0]
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert yaml.safe_load(front)["pipeline_tag"] == "image-feature-extraction"
    assert "custom_code" in yaml.safe_load(front)["tags"]
    assert yaml.safe_load(recipe)["image_mask_ratio"] == 0.75
    for fact in ("mmssl.MMM", "64 samples in 2 shards", "val/loss: ", "online", "12 tokens"):
        assert fact in card


# ---- whole or absent


def test_nothing_is_overwritten(joint_run: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "out").mkdir()
    assert main(["export", str(joint_run), "--out", str(tmp_path / "out")]) == 2
    assert "exists, and nothing is overwritten" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert main(["export", str(joint_run)]) == 2
    assert "give --out" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["save_file", "_card"])
def test_a_failure_leaves_nothing(joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, when, fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left"):
        write_export(joint_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_one_line(joint_run: Path, tmp_path: Path, capsys: Any):
    run = shutil.copytree(joint_run, tmp_path / "run")
    (run / "tokenizer.json").write_text((run / "tokenizer.json").read_text().replace("square", "sqware"))
    for checkpoint in (run / "checkpoints").iterdir():
        shutil.copy(checkpoint, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:9000])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    for source in (run, tmp_path / "cut.ckpt", tmp_path / "foreign.ckpt", tmp_path / "nothing"):
        assert main(["export", str(source), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("mmssl: error: ")
        assert "\n" not in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("newer", "newer mmssl"),
        ("plain timm", "no export of mmssl"),
        ("edited", "lacks backbone, weights"),
        ("cut weights", "damaged or cut short"),
        ("no text weights", "there is no such file"),
        ("no tokenizer", "no tokenizer"),
        ("other tokenizer", "not the tokenizer"),
        ("no json", "cannot be read"),
    ],
)
def test_a_spoiled_export_is_one_line(exported: Path, tmp_path: Path, how: str, said: str):
    folder = shutil.copytree(exported, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    if how == "newer":
        config["mmssl"]["format"] = 2
    elif how == "plain timm":
        del config["mmssl"]
    elif how == "edited":
        del config["mmssl"]["backbone"], config["mmssl"]["weights"]
    elif how == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    elif how == "no text weights":
        (folder / "text.safetensors").unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "other tokenizer":
        shutil.copy(exported / "tokenizer.json", folder / "tokenizer.json")
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace("square", "sqware"))
    (folder / "config.json").write_text("{" if how == "no json" else json.dumps(config))
    with pytest.raises((ValueError, CheckpointError), match=said) as raised:
        mmssl.load_backbone(folder)
    assert "\n" not in str(raised.value)


# ---- the hub


def test_an_id_of_the_hub_is_fetched(exported: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append(repository)
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_equal(mmssl.load_backbone("someone/backbone"), mmssl.load_backbone(exported))
    assert_equal(mmssl.load_backbone("hf://someone/other"), mmssl.load_backbone(exported))
    assert asked == ["someone/backbone", "someone/other"]


def test_without_a_network_the_hub_is_one_line():
    with pytest.raises(
        ValueError, match=r"neither a folder someone/backbone here nor a repository .*network"
    ) as raised:
        mmssl.load_backbone("someone/backbone")
    assert "\n" not in str(raised.value)


def test_a_mistyped_path_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub says of a repository that is not there what it says of one that may not be seen."""
    from huggingface_hub.errors import RepositoryNotFoundError

    class Response:
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    def refuse(*args: Any, **options: Any) -> None:
        said = "401 Client Error. (Request ID: x)\n\nRepository Not Found for url: ...\nPlease make sure ..."
        raise RepositoryNotFoundError(said, response=Response())

    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        ValueError, match=r"neither a folder runs/mistyped here nor a repository of that name"
    ) as raised:
        mmssl.load_backbone("runs/mistyped")
    assert "\n" not in str(raised.value)


def test_push(joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    calls: list[tuple[str, Any]] = []
    deleted: list[str] = []

    def upload(**options: Any) -> None:
        calls.append((options["repo_id"], options["folder_path"]))
        deleted.extend(options["delete_patterns"])

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **o: calls.append((name, o["private"])))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    command = ["export", str(joint_run), "--push", "someone/backbone", "--out"]
    assert main([*command, str(tmp_path / "dry"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert calls == []
    assert "would upload 7 files" in said
    assert "model.safetensors" in said
    assert main([*command, str(tmp_path / "real")]) == 0
    assert calls == [("someone/backbone", True), ("someone/backbone", tmp_path / "real")]
    there = [
        "image.onnx",
        "pair.onnx",
        "pair.onnx.data",
        "model.safetensors",
        "text.safetensors",
        "LICENSE",
        "a/b.onnx",
    ]
    assert list(filter_repo_objects(there, allow_patterns=deleted)) == ["image.onnx", "pair.onnx", "pair.onnx.data"]
    assert main(["export", str(joint_run), "--out", str(tmp_path / "no"), "--push", "nobody"]) == 2
    assert "owner/name" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_push_without_network_leaves_the_folder(joint_run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(*args: Any, **options: Any) -> None:
        raise HfHubHTTPError.__bases__[0]("no route to host")  # what the HTTP library raises, which is no OSError

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    assert main(["export", str(joint_run), "--out", str(tmp_path / "out"), "--push", "someone/backbone"]) == 2
    error = capsys.readouterr().err.strip()
    assert "no route to host" in error
    assert "\n" not in error
    assert mmssl.load_backbone(tmp_path / "out").about["step"] == 4
