"""``mmssl.load_backbone``: what it loads computes what was trained, from every kind of source, and refuses the rest."""

import copy
import inspect
import io
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from pairs import caption, picture
from PIL import Image as PILImage
from runs import save_untrained, train
from torch import Tensor

import mmssl
from mmssl.cli import main
from mmssl.data.crops import ResizeCenterCrop
from mmssl.data.images import decode_image, load_image
from mmssl.draws import Draws
from mmssl.pretrained import sharded
from mmssl.pretrained.sources import find_source
from mmssl.pretrained.whole import CheckpointError
from mmssl.report import load_run

COUNT = 5


@pytest.fixture(scope="module")
def loaded(joint_run: Path) -> mmssl.Pretrained:
    return mmssl.load_backbone(joint_run)


def pictures(size: int = 32) -> list[bytes]:
    return [picture(i, size) for i in range(COUNT)]


def texts() -> list[str]:
    return [caption(i) for i in range(COUNT)]


def uint8(size: int = 32) -> Tensor:
    return torch.stack([decode_image(data) for data in pictures(size)])


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("*.ckpt"))[-1]


# ---- the features are those of training


def test_features_are_those_of_the_trained_module(joint_run: Path, loaded: mmssl.Pretrained):
    module, _ = load_run(joint_run)
    module.eval()
    network = module.network
    prepare = module.prepare(train=False)
    samples = [[load_image(data, ResizeCenterCrop(32), Draws(0)) for data in pictures()]]
    pixels = network.pixels(torch.stack(samples[0]))
    ids = [module.tokenizer.encode(text).ids for text in texts()]
    with torch.no_grad():
        image = network.backbone(pixels)
        ours = loaded.encode_image(pictures())
        assert torch.equal(ours.tokens, torch.cat([image.prefix, image.patches], 1))
        assert torch.equal(ours.pooled, image.prefix[:, 0])
        assert ours.valid.all()
        assert torch.allclose(loaded.encode_image(pictures(), "mean").pooled, image.patches.mean(1), atol=1e-6)

        words = loaded.encode_text(texts())
        pair = loaded.encode_pair(pictures(), texts())
        for i, row in enumerate(ids):
            row = row if len(row) <= 12 else np.r_[row[:11], row[-1]]
            alone = loaded.text(texts()[i])
            assert alone.input_ids.tolist() == row.tolist()
            expected = network.backbone(text=alone).text
            assert torch.allclose(words.tokens[i, : len(row)], expected, atol=1e-5)
            assert torch.allclose(words.pooled[i], expected[0], atol=1e-5)
            both = network.backbone(pixels[i : i + 1], None, alone)
            whole = torch.cat([both.prefix[0], both.patches[0], both.text])
            assert torch.allclose(pair.tokens[i][pair.valid[i]], whole, atol=1e-5)
            mean = torch.cat([both.patches[0], both.text]).mean(0)
            assert torch.allclose(loaded.encode_pair(pictures(), texts(), "mean").pooled[i], mean, atol=1e-5)
    assert prepare.image.transform == ResizeCenterCrop(loaded.img_size)
    assert not torch.allclose(pair.pooled, ours.pooled, atol=1e-3), "the text is seen by the picture"


def test_features_are_timms_own(image_run: Path):
    loaded = mmssl.load_backbone(image_run)
    vit = loaded.backbone.vit
    pixels = (uint8().float() / 255 - loaded.mean) / loaded.std
    with torch.no_grad():
        assert torch.allclose(loaded.encode_image(uint8()).tokens, vit.forward_features(pixels), atol=1e-6)
    with pytest.raises(ValueError, match="knows no text"):
        loaded.encode_text("a text")


def test_padding_changes_nothing(loaded: mmssl.Pretrained):
    with torch.no_grad():
        together_text, together_pair = loaded.encode_text(texts()), loaded.encode_pair(pictures(), texts())
        assert together_text.valid.sum(1).unique().numel() > 1, "the texts must differ in length"
        assert together_text.tokens[~together_text.valid].count_nonzero() == 0
        for i in range(COUNT):
            for pool in ("cls", "mean"):
                alone = loaded.encode_text(texts()[i], pool)
                assert torch.allclose(loaded.encode_text(texts(), pool).pooled[i], alone.pooled[0], atol=1e-5)
            assert torch.allclose(together_text.tokens[i][together_text.valid[i]], alone.tokens[0], atol=1e-5)
            pair = loaded.encode_pair(pictures()[i], texts()[i])
            assert torch.allclose(together_pair.tokens[i][together_pair.valid[i]], pair.tokens[0], atol=1e-5)


def test_a_text_without_numbers_harms_no_other(joint_run: Path):
    model = mmssl.load_backbone(joint_run)
    long, short = caption(5), "red"
    assert model.tokenizer is not None
    (only, *_) = set(model.tokenizer.encode(long).ids.tolist()) - set(model.tokenizer.encode(short).ids.tolist())
    with torch.no_grad():
        model.backbone.text.token_embedding.weight[only] = float("nan")
        both = model.encode_text([short, long], pool="mean")
        alone = model.encode_text(short, pool="mean")
    assert both.pooled[1].isnan().all()
    torch.testing.assert_close(both.pooled[:1], alone.pooled, atol=1e-5, rtol=1e-5)
    assert (both.tokens[0, ~both.valid[0]] == 0).all()


def test_pictures_in_every_form_and_size(loaded: mmssl.Pretrained):
    with torch.no_grad():
        for size in (32, 57):
            expected = loaded.encode_image(pictures(size)).tokens
            opened = [PILImage.open(io.BytesIO(data)) for data in pictures(size)]
            for form in (opened, uint8(size), list(uint8(size)), uint8(size).contiguous()):
                assert torch.allclose(loaded.encode_image(form).tokens, expected, atol=1e-5)
            assert torch.allclose(loaded.encode_image(opened[0]).tokens, expected[:1], atol=1e-5)
    tall = PILImage.new("RGBA", (20, 300), (0, 0, 0, 0))  # transparent: white, as in training
    assert loaded.pixels(tall).shape == (1, 3, 32, 32)
    assert loaded.pixels(tall).min() == 255
    assert loaded.encode_pair(opened[0], "a red square").tokens.shape[0] == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.encode_image([]), "no picture"),
        (lambda m: m.encode_image(torch.rand(1, 3, 32, 32)), "uint8"),
        (lambda m: m.encode_image(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)), r"\[1, 1, 32, 32\]"),
        (lambda m: m.encode_image([picture(0), b"nothing"]), "picture 1 cannot be used: not_an_image"),
        (lambda m: m.encode_text([]), "no text"),
        (lambda m: m.encode_pair(pictures(), texts()[:2]), "5 pictures came with 2 texts"),
    ],
)
def test_bad_input_is_told(loaded: mmssl.Pretrained, call: Any, said: str):
    with pytest.raises(ValueError, match=said):
        call(loaded)


def test_a_backbone_without_class_token_pools_by_the_mean(tmp_path: Path):
    options = {"img_size": 32, "patch_size": 8, "options": {"embed_dim": 48, "depth": 1, "num_heads": 4}}
    module = mmssl.MAE(backbone="vit_base_patch16_siglip_224", backbone_options=options, decoder_embed_dim=32)
    loaded = mmssl.load_backbone(save_untrained(module, tmp_path / "plain.ckpt"))
    encoded = loaded.encode_image(uint8())
    assert encoded.tokens.shape == (COUNT, 16, 48)
    assert torch.allclose(encoded.pooled, encoded.tokens.mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="no class token"):
        loaded.encode_image(uint8(), "cls")


# ---- as a module


COMPILED = """
import sys, torch, mmssl
model = mmssl.load_backbone(sys.argv[1])
pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
text = model.text(["a red square", "a green square with blue paper under it"])
with torch.no_grad():
    expected, pair = model(pixels), model(pixels, text)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(whole(pixels).tokens, expected.tokens, atol=1e-5)
    broken = torch.compile(model, backend="aot_eager")  # packing looks at the lengths: the graph breaks there
    assert torch.allclose(broken(pixels, text).tokens, pair.tokens, atol=1e-5)
"""


def test_it_compiles(joint_run: Path):
    """In a process without the tests' type checker, which no compiler sees through."""
    subprocess.run([sys.executable, "-c", COMPILED, str(joint_run)], check=True)


def test_it_moves(loaded: mmssl.Pretrained):
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    assert half.encode_pair(uint8(), texts()).pooled.dtype == torch.bfloat16
    meta = copy.deepcopy(loaded).to("meta")  # the one other device that every machine has
    assert meta.encode_image(uint8()).tokens.device.type == "meta"


def test_it_trains(loaded: mmssl.Pretrained):
    model = copy.deepcopy(loaded).train()
    model.encode_pair(uint8(), texts(), "mean").pooled.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "text_expert" in n)


def test_another_picture_size(joint_run: Path, loaded: mmssl.Pretrained):
    larger = mmssl.load_backbone(joint_run, img_size=48)
    assert larger.encode_image(uint8()).tokens.shape == (COUNT, 37, 48)
    before, after = loaded.backbone.vit.pos_embed, larger.backbone.vit.pos_embed
    assert torch.equal(before[:, 0], after[:, 0])
    assert torch.allclose(before[:, 1:].mean(1), after[:, 1:].mean(1), atol=0.05)
    assert larger.encode_text(texts()).pooled.allclose(loaded.encode_text(texts()).pooled)


def test_neither_lightning_nor_webdataset_is_imported(joint_run: Path):
    code = (
        "import sys, mmssl; m = mmssl.load_backbone(sys.argv[1]); m.encode_text('a red square')\n"
        "heavy = {'lightning', 'pytorch_lightning', 'webdataset', 'jsonargparse', 'matplotlib', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(joint_run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- sources


def test_a_checkpoint_alone_and_a_run_agree(joint_run: Path, loaded: mmssl.Pretrained, tmp_path: Path):
    from_file = mmssl.load_backbone(newest(joint_run))
    assert_equal(from_file, loaded)
    shutil.copy(newest(joint_run), tmp_path / "alone.ckpt")  # its tokenizer is where training had it
    assert_equal(mmssl.load_backbone(str(tmp_path / "alone.ckpt")), loaded)
    assert loaded.about["step"] == 4
    assert "64 samples" in loaded.about["data"]["train"]
    assert from_file.backbone.vit.blocks[-1].drop_path1.__class__.__name__ == "Identity"
    dropping = mmssl.load_backbone(joint_run, drop_path_rate=0.3)
    assert dropping.backbone.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_the_newest_whole_checkpoint_is_taken(joint_run: Path, tmp_path: Path, capsys: Any):
    run = shutil.copytree(joint_run, tmp_path / "run")
    good = newest(run)
    (run / "checkpoints" / "step=00000009.ckpt").write_bytes(good.read_bytes()[:5000])
    assert mmssl.load_backbone(run).about["step"] == 4
    assert "step=00000009.ckpt" in capsys.readouterr().err


def test_a_sharded_checkpoint(
    joint_run: Path, loaded: mmssl.Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    content = torch.load(newest(joint_run), weights_only=True)
    run = tmp_path / "run"
    folder = run / "checkpoints" / "step=00000004.ckpt"
    optimizer = {"state": {name: value.clone() for name, value in content["state_dict"].items()}}
    dcp.save({"state_dict": content.pop("state_dict"), "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True)
    shutil.copy(joint_run / "tokenizer.json", run / "tokenizer.json")
    content.pop("optimizer_states")
    torch.save(content, folder / "meta.pt")
    reads: Counter[str] = Counter()
    read = sharded.load_into
    with monkeypatch.context() as patched:
        patched.setattr(
            sharded, "load_into", lambda targets, *rest: (reads.update(list(targets)), read(targets, *rest))
        )
        assert_equal(mmssl.load_backbone(folder), loaded)
    assert {times for name, times in reads.items() if ".blocks." in name} == {1}
    assert len(reads) == len(loaded.backbone.state_dict())
    assert_equal(mmssl.load_backbone(run), loaded)

    (folder / "meta.pt").unlink()  # torch.distributed.checkpoint alone: the run's config says what to build
    with pytest.raises(ValueError, match="no word of which backbone"):
        mmssl.load_backbone(folder)
    shutil.copy(joint_run / "config.yaml", run / "config.yaml")
    assert_equal(mmssl.load_backbone(folder), loaded)

    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        mmssl.load_backbone(folder)


def test_a_checkpoint_that_two_ranks_sharded(joint_run: Path, loaded: mmssl.Pretrained, tmp_path: Path):
    """Tensors cut in two, unevenly where their first axis is odd, or left whole to one rank where it is one."""
    folder = tmp_path / "run" / "checkpoints" / "step=00000004.ckpt"
    folder.parent.mkdir(parents=True)
    shutil.copy(joint_run / "tokenizer.json", tmp_path / "run" / "tokenizer.json")
    script = str(Path(__file__).parent / "sharded_rank.py")
    command = [sys.executable, script]
    ranks = [subprocess.Popen([*command, str(rank), str(newest(joint_run)), str(folder)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert len(list(folder.glob("*.distcp"))) == 2
    assert_equal(mmssl.load_backbone(tmp_path / "run"), loaded)


def test_a_sharded_checkpoint_runs_no_code(joint_run: Path, tmp_path: Path):
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        mmssl.load_backbone(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_average_is_asked_for(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, joint_run: Path, recwarn: pytest.WarningsRecorder
):
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    run = train(tmp_path / "run", "MLM", pair_shards, [average], tokenizer=tokenizer_path, max_tokens=16)
    assert not [warning for warning in recwarn if "WeightAveraging" in str(warning.message)]  # it is at its place
    content = torch.load(newest(run), weights_only=True)
    key = "network.backbone.text.position"
    online, ema = mmssl.load_backbone(run), mmssl.load_backbone(run, weights="ema")
    assert torch.equal(online.backbone.text.position, content["current_model_state"][key])
    assert torch.equal(ema.backbone.text.position, content["state_dict"][key])
    assert not torch.equal(online.backbone.text.position, ema.backbone.text.position)
    with pytest.raises(ValueError, match="no EMA weights"):
        mmssl.load_backbone(joint_run, weights="ema")

    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--weights", "ema"]) == 0
    exported = mmssl.load_backbone(tmp_path / "out")  # it holds one kind
    assert exported.about["weights"] == "ema"
    assert torch.equal(exported.backbone.text.position, ema.backbone.text.position)


def assert_equal(one: mmssl.Pretrained, other: mmssl.Pretrained) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(one.encode_pair(uint8(), texts()).tokens, other.encode_pair(uint8(), texts()).tokens)


# ---- what cannot be loaded


def spoil(run: Path, how: str) -> Path:
    path = newest(run)
    content = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
        return path
    if how == "foreign":
        content = {"model": content["state_dict"]}
    elif how == "other model":
        content["state_dict"] = {"layer.weight": torch.zeros(1)}
    elif how == "lacks tensors":
        content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "blocks.1" not in k}
    elif how == "other options":
        content["hyper_parameters"]["backbone_options"]["options"]["embed_dim"] = 96
    elif how == "newer":
        content["mmssl_format"] = 99
    elif how == "no tokenizer":
        (run / "tokenizer.json").unlink()
        content["hyper_parameters"]["tokenizer"] = "gone.json"
    elif how == "other tokenizer":
        text = (run / "tokenizer.json").read_text()
        (run / "tokenizer.json").write_text(text.replace("square", "sqware"))
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "damaged or cut short"),
        ("foreign", "no checkpoint of mmssl: it has no state_dict"),
        ("other model", "no checkpoint of mmssl: it has no tensors of a backbone"),
        ("lacks tensors", "lacks .* tensors of vit_tiny_patch16_224"),
        ("other options", "has shape"),
        ("newer", "newer mmssl"),
        ("no tokenizer", "no tokenizer"),
        ("other tokenizer", "is not the tokenizer"),
    ],
)
def test_one_line_for_what_cannot_be_loaded(joint_run: Path, tmp_path: Path, how: str, said: str):
    run = shutil.copytree(joint_run, tmp_path / "run")
    with pytest.raises((ValueError, CheckpointError), match=said) as raised:
        mmssl.load_backbone(spoil(run, how))
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_one_line_where_there_is_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no"):
        mmssl.load_backbone(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds neither a run"):
        mmssl.load_backbone(tmp_path)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="damaged"):
        mmssl.load_backbone(tmp_path / "text.ckpt")
    with pytest.raises(ValueError, match="choose one of online, ema"):
        inspect.unwrap(find_source)(tmp_path, "best")  # unwrapped: the tests' type checker would answer first
