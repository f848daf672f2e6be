"""`mmssl predict` and `mmssl validate` on a finished run, through the real command."""

import csv
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from lightning import LightningModule, Trainer
from pairs import caption
from test_module import pair_config

from mmssl.cli import main
from mmssl.data.tokenizer import TextTokenizer
from mmssl.training.callbacks.predictions import Predictions, PredictionsError


def test_predict_writes_every_hidden_word(
    tmp_path: Path, tokenizer_path: str, pair_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(pair_config(tmp_path, tokenizer_path, pair_shards))
    assert main(["fit", "--config", config, "--run", "run", "--trainer.max_steps", "3"]) == 0
    # Ten samples in batches of twelve: the two that pad the batch must not be written.
    assert main(["predict", "--run", "run"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/predictions/words-0.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 10
    tokenizer = TextTokenizer(tokenizer_path)
    for line in lines:
        tokens = line["seen"].split(" ")
        assert line["hidden"]
        for entry in line["hidden"]:
            assert tokens[entry["position"]] not in ("[CLS]", "[SEP]")
            tokens[entry["position"]] = entry["truth"]
        number = int(line["key"].split("/")[1])
        assert tokens == [tokenizer.token(i) for i in tokenizer.encode(caption(number)).ids]
    assert (tmp_path / "run/predictions/batch-00000-0.png").is_file()

    assert main(["validate", "--run", "run"]) == 0
    with (tmp_path / "run/validate.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        fitted = [r for r in csv.DictReader(file) if r.get("val/loss")]
    assert float(row["val/loss"]) == pytest.approx(float(fitted[-1]["val/loss"]), rel=1e-6)


def test_an_earlier_prediction_of_more_ranks_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    mine = ["words-0.jsonl", "batch-00003-0.png"]
    of_none = ["words-2.jsonl", "labels-11.jsonl", "batch-00000-2.png"]
    kept = ["words-1.jsonl", "batch-00000-1.png", "notes.txt", "plot-7.png", "words-x.jsonl"]
    for name in [*mine, *of_none, *kept]:
        (folder / name).write_text("")

    def start(rank: int) -> set[str]:
        trainer = Mock(
            spec=Trainer, default_root_dir=str(tmp_path), global_rank=rank, is_global_zero=rank == 0, world_size=2
        )
        Predictions().on_predict_start(trainer, Mock(spec=LightningModule))
        return {path.name for path in folder.iterdir()}

    assert start(0) == set(kept)
    assert start(1) == {"notes.txt", "plot-7.png", "words-x.jsonl"}


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "predictions").write_text("in the way")
    trainer = Mock(spec=Trainer, default_root_dir=str(tmp_path), global_rank=0, is_global_zero=True, world_size=1)
    with pytest.raises(PredictionsError, match=r"cannot write predictions to .*File exists"):
        Predictions().on_predict_start(trainer, Mock(spec=LightningModule))
