"""``mmssl report`` on a small run that the real command trained, and every way in which it must refuse."""

import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from pairs import COLOURS, TINY, caption, picture
from PIL import Image as PILImage

from mmssl.cli import main
from mmssl.data.tokenizer import whole_words
from mmssl.report import kinds_of_words, load_run
from mmssl.types import Sample

KINDS = ("easy", "middling", "hard", "other", "rare")
TITLES = ["easy: colours", "middling: script, case, style", "hard: which letter or sign", "function words", "rare"]


def words_of(text: str) -> list[list[str]]:
    """Each word with its kind, as the demo's .json has it."""
    return [[w, "easy" if w in COLOURS else KINDS[1 + i % 4]] for i, w in enumerate(whole_words(text))]


@pytest.fixture(scope="module")
def val_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("val") / "val.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(20):
            text = caption(i)
            writer.write({"__key__": f"{i:04d}", "png": picture(i), "txt": text, "json": {"words": words_of(text)}})
        # Alike in training, so one bad sample must not cost a person the report.
        writer.write({"__key__": "0020", "png": picture(20)[:40], "txt": caption(20), "json": {"words": []}})
    return str(path)


def config(tokenizer: str, shards: str, val: str | None, **model: Any) -> dict[str, Any]:
    arguments = {
        "tokenizer": tokenizer,
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": {**TINY, "drop_path_rate": 0.1},
        "text_mask_ratio": [0.5, 0.3],
        "max_tokens": 32,
        "norm_pix_loss": False,
        "decoder_embed_dim": 32,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
        "pad_to_multiple_of": 64,
        **model,
    }
    return {
        "model": {"class_path": "mmssl.MMM", "init_args": arguments},
        "data": {"train": shards, "val": val, "batch_size": 8, "num_workers": 0, "val_samples": 10},
        "trainer": {
            "max_steps": 4,
            "accumulate_grad_batches": 2,
            "val_check_interval": 4,
            "log_every_n_steps": 2,
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {
                    "class_path": "mmssl.training.callbacks.pictures.Pictures",
                    "init_args": {"every_n_steps": 2, "samples": 3},
                }
            ],
        },
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str, pair_shards: str, val_shards: str) -> Path:
    """A folder of runs with one in it, "joint"; its tokenizer is gone from where it was trained with."""
    home = tmp_path_factory.mktemp("runs")
    tokenizer = shutil.copy(tokenizer_path, home / "moved.json")
    (home / "c.yaml").write_text(yaml.safe_dump(config(str(tokenizer), pair_shards, val_shards)))
    assert main(["fit", "--config", str(home / "c.yaml"), "--run", str(home / "joint")]) == 0
    Path(tokenizer).unlink()
    return home


def copy_of(trained: Path, to: Path, change: Any = None) -> Path:
    run = to / "run"
    shutil.copytree(trained / "joint", run)
    if change is not None:
        content = yaml.safe_load((run / "config.yaml").read_text())
        change(content)
        (run / "config.yaml").write_text(yaml.safe_dump(content))
    return run


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error."""
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mmssl: error: ")
    assert said.err.count("\n") == 1
    assert "MMSSL_TRACEBACK" not in said.err
    return said.err


def test_report_of_a_small_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(trained, tmp_path)
    assert main(["report", str(run), "--samples", "100", "--rounds", "3", "--pictures", "4"]) == 0
    said = capsys.readouterr()
    figures = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert figures["step"] == 4
    assert figures["pairs"] == 20  # of 21, one of which is damaged
    assert set(figures["words"]) == {"all words", *KINDS}
    every, kinds = figures["words"]["all words"], [figures["words"][kind] for kind in KINDS]
    assert every["words"] == sum(kind["words"] for kind in kinds)
    for row in (every, *kinds):
        assert row["words"] > 0
        assert row["gain"] == pytest.approx(row["right_picture"] - row["wrong_picture"])
        assert 0 <= row["right_picture"] <= 100
    assert figures["patches"]["patches"] == 20 * 12
    ratio = figures["patches"]["model"] / figures["patches"]["mean_colour"]
    assert figures["patches"]["ratio"] == pytest.approx(ratio)
    assert {"samples_per_second", "data_wait_share", "step_seconds"} <= set(figures["speed"])
    assert set(figures["versions"]) >= {"mmssl", "torch", "lightning", "timm", "python"}

    table = said.out
    assert [table.index(title) for title in ["all words", *TITLES]] == sorted(
        table.index(title) for title in ["all words", *TITLES]
    )
    line = next(line for line in table.splitlines() if line.startswith("easy: colours"))
    easy = figures["words"]["easy"]
    assert line.split()[2:] == [
        *(f"{easy['right_picture']:.1f}", "%", f"{easy['wrong_picture']:.1f}", "%"),
        *(f"{easy['gain']:+.1f}", "pts", str(easy["words"])),
    ]
    assert f"ratio {ratio:.2f}" in table
    for file in ("report.json", "report.png", "metrics.csv", "pictures", "checkpoints"):
        assert str(run / file) in table
        assert (run / file).exists()
    speed = figures["speed"]
    assert f"{speed['samples_per_second']:.0f} pairs/s, {speed['text_tokens_per_second']:.0f} text tokens/s" in table
    assert all(len(line) <= 120 for line in table.partition("\nnext:")[0].splitlines() if str(run) not in line)

    picture = PILImage.open(run / "report.png")
    assert picture.width >= 3 * 118 + 520
    assert picture.height > 4 * 118 + 250  # four rows and the bars below
    assert len(np.unique(np.asarray(picture)[-300:].reshape(-1, 3), axis=0)) > 3  # bars of two colours, and text


def test_what_it_names_next_works(trained: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Every command runs as it is printed, but for fewer steps of the longest: on this run and its own data."""
    run = copy_of(trained, tmp_path / "runs of mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[1] / "configs")
    assert main(["report", str(run), "--samples", "8"]) == 0
    told = capsys.readouterr().out.partition("\nnext:\n")[2].replace("\\\n", "")
    commands = [shlex.split(line, comments=True) for line in told.splitlines()]
    assert [command[:2] for command in commands] == [["mmssl", name] for name in ("report", "export", "fit")]
    fewer = ["--trainer.max_steps=2", "--model.init_args.warmup_steps=1", "--trainer.val_check_interval=2"]
    commands[2] += [*fewer, "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
    for command in commands:
        assert main(command[1:]) == 0, command
    assert (tmp_path / "exports/run/model.safetensors").is_file()
    assert (tmp_path / "runs/run-retrieval/checkpoints/best.ckpt").is_file()


def test_of_other_data_it_names_what_a_line_can_say(trained: Path, tmp_path: Path, capsys: Any) -> None:
    """Two sources of pairs do not fit one option, and FilesData reads no shards."""

    def two(content: dict[str, Any]) -> None:
        train = content["data"]["train"]
        content["data"]["train"] = {
            "a": {"shards": train},
            "b": {"shards": train},
            "c": {"shards": "x", "only": "text"},
        }

    run = copy_of(trained, tmp_path, two)
    assert main(["report", str(run), "--samples", "8"]) == 0
    told = capsys.readouterr().out.partition("\nnext:\n")[2]
    assert [line.split()[:3] for line in told.splitlines()] == [["mmssl", n, str(run)] for n in ("report", "export")]


def test_the_same_seed_gives_the_same_figures(trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    figures = []
    for seed in ("0", "0", "1"):
        torch.manual_seed(len(figures))
        assert main(["report", str(run), "--samples", "12", "--seed", seed]) == 0
        content = json.loads((run / "report.json").read_text())
        figures.append((content["words"], content["patches"]))
    assert figures[0] == figures[1] != figures[2]


def test_weights_are_the_checkpoints(trained: Path) -> None:
    """A ratio that moves over the run, the run's own tokenizer, dropped paths: the config is read as fit reads it."""
    module, _ = load_run(trained / "joint")
    (newest,) = (trained / "joint" / "checkpoints").glob("*00000004.ckpt")
    saved = torch.load(newest, weights_only=True)["state_dict"]
    assert all(torch.equal(weight, saved[name]) for name, weight in module.state_dict().items())
    assert module.text_mask_ratio == (0.5, 0.3)
    assert module.prepare(train=False).text.ratio == (0.5, 0.3)


def test_no_weights_are_fetched_only_to_be_overwritten(trained: Path, tmp_path: Path) -> None:
    def pretrained(content: dict[str, Any]) -> None:
        options = content["model"]["init_args"]["backbone_options"]
        options |= {"pretrained": True, "weights": "/nowhere/weights.safetensors"}

    load_run(copy_of(trained, tmp_path, pretrained))


def test_data_written_as_a_class(trained: Path, tmp_path: Path) -> None:
    def as_class(content: dict[str, Any]) -> None:
        content["data"] = {"class_path": "mmssl.DataModule", "init_args": content["data"]}

    assert main(["report", str(copy_of(trained, tmp_path, as_class)), "--samples", "8"]) == 0


def test_normalised_patches_leave_the_squared_error_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def normalise(content: dict[str, Any]) -> None:
        content["model"]["init_args"]["norm_pix_loss"] = True

    run = copy_of(trained, tmp_path, normalise)
    assert main(["report", str(run), "--samples", "8"]) == 0
    figures = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    assert figures["patches"]["patches"] == 0
    assert figures["patches"]["ratio"] is None
    assert "ratio" not in capsys.readouterr().out


def test_what_cannot_be_reported_on(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in refusal(capsys, str(tmp_path / "nothing"))

    run = copy_of(trained, tmp_path, lambda content: content["data"].update(val=None))
    assert "data.val" in refusal(capsys, str(run))
    for name in ("--samples", "--rounds", "--pictures"):
        assert f"{name[2:]} is 0" in refusal(capsys, str(run), name, "0")

    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        checkpoint.unlink()
    line = refusal(capsys, str(run))
    assert "no checkpoint" in line
    assert "--resume" not in line

    (run / "config.yaml").write_text("colour: blue\n")
    assert "no run" in refusal(capsys, str(run))


def test_a_run_without_text_is_refused(
    tmp_path: Path, pair_shards: str, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config(tokenizer_path, pair_shards, pair_shards)
    options = {k: content["model"]["init_args"][k] for k in ("backbone", "backbone_options", "decoder_embed_dim")}
    content["model"] = {"class_path": "mmssl.MAE", "init_args": {**options, "decoder_depth": 1, "decoder_num_heads": 4}}
    content["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    (tmp_path / "mae.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(tmp_path / "mae.yaml"), "--run", str(tmp_path / "mae")]) == 0
    line = refusal(capsys, str(tmp_path / "mae"))
    assert "is a MAE" in line
    assert "mmssl.MMM" in line


@pytest.mark.parametrize(
    ("members", "kinds"),
    [
        ({"txt": b" a red square"}, ["words"] * 3),
        ({"txt": b"a red", "json": b'{"words": [["a", "other"], ["red", "easy"]]}'}, ["other", "easy"]),
        ({"txt": b"a red", "json": b'{"words": 2, "caption": "another"}'}, ["words"] * 2),
        ({"txt": b"a red", "json": b'{"words": [["a", "x"]]}'}, ["words"] * 2),  # of another text
        ({"txt": b"a red", "json": b"not json"}, ["words"] * 2),
        ({"txt": b"a red", "json": b"[1, 2]"}, ["words"] * 2),
        ({"json": b'{"caption": "a red square"}'}, ["words"] * 3),
    ],
)
def test_kinds_of_words(members: dict[str, bytes], kinds: list[str]) -> None:
    assert kinds_of_words(Sample("0", "memory.tar", members)) == kinds


def test_metrics_of_a_run(trained: Path) -> None:
    """The names that the documentation gives, at the steps that were asked for, and only there."""
    with (trained / "joint" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("loss", "loss_text", "loss_image", "text_accuracy")
    expected = {f"{stage}/{name}" for stage in ("train", "val") for name in names} | {"train/grad_norm", "train/lr"}
    expected |= {f"speed/{name}" for name in ("samples_per_second", "step_seconds", "data_wait_seconds")}
    expected |= {"speed/data_wait_share", "speed/text_tokens_per_second", "step"}
    assert expected <= set(rows[0])
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [2, 4]
    assert [int(row["step"]) for row in rows if row["train/lr"]] == [2, 4]
    assert sum(bool(row["val/loss"]) for row in rows) == 2
    for row in rows:
        for stage in ("train", "val"):
            if row[f"{stage}/loss"]:
                parts = float(row[f"{stage}/loss_text"]) + float(row[f"{stage}/loss_image"])
                assert float(row[f"{stage}/loss"]) == pytest.approx(parts, rel=1e-5)
