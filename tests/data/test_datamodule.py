import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from odd import DECODER
from pairs import TINY, caption
from server import FileServer
from toy_stream import ToyImage, ToyText, jpeg, number, write_shards
from webdataset import TarWriter

import mmssl
from mmssl.data import datamodule, loader
from mmssl.data.datamodule import DataModule
from mmssl.data.tar import ShardError
from mmssl.types import Batch, Prepare


class Recorder(LightningModule):
    """Notes what it is trained on; counts optimizer steps as the objectives do."""

    def __init__(self, prepare: Prepare | None = None, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.half, self.stop_after = prepare or ToyText(), stop_after
        self.seen: list[tuple[int, list[str], int]] = []
        self.validated: list[str] = []

    def prepare(self, train: bool) -> Prepare:
        return self.half

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        content = batch.text.hidden if batch.text is not None else batch.image.pixels.int()  # type: ignore[union-attr]
        self.seen.append((batch.index, batch.keys, int(content.sum())))
        return self.weight * 1.0

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.trainer.datamodule.trained(batch.index + 1)  # type: ignore[attr-defined]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.valid is not None
        self.validated += [key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{**quiet, "enable_checkpointing": False, "default_root_dir": str(folder), **options})


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return write_shards(tmp_path / "texts", 50)


@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "fork"), (3, "fork"), (1, "spawn"), (3, "spawn")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact_across_an_epochs_end(
    tmp_path: Path, texts: str, workers: int, start: Any, accumulate: int
) -> None:
    def data() -> DataModule:
        return DataModule(texts, val=texts, batch_size=8, num_workers=workers, seed=5, multiprocessing_context=start)

    def run(module: Recorder, steps: int, **options: Any) -> Trainer:
        made = trainer(tmp_path, max_steps=steps, accumulate_grad_batches=accumulate, limit_val_batches=2)
        made.fit(module, data(), **options)
        return made

    whole, first, second = Recorder(), Recorder(), Recorder()
    run(whole, 10)
    checkpoint = str(tmp_path / "a.ckpt")
    run(first, 3).save_checkpoint(checkpoint)  # 50 samples, 8 a batch: the epoch ends in batch 6
    state = torch.load(checkpoint, weights_only=True)["DataModule"]
    assert state["batches"] == 3 * accumulate
    assert set(state) == {"order", "seed", "batches", "batch_size", "lanes", "sources"}
    run(second, 10, ckpt_path=checkpoint)
    assert [index for index, _, _ in whole.seen] == list(range(10 * accumulate))
    assert first.seen + second.seen == whole.seen


def test_a_new_lightning_epoch_goes_on(tmp_path: Path, texts: str) -> None:
    module = Recorder()
    made = trainer(tmp_path, max_steps=9, limit_train_batches=3)
    made.fit(module, DataModule(texts, batch_size=8, num_workers=1))
    assert [index for index, _, _ in module.seen] == list(range(9))


def test_validate_test_and_predict(tmp_path: Path, texts: str) -> None:
    data = DataModule("not-there.tar", val=texts, batch_size=8, num_workers=1)
    for run in ("validate", "test", "predict"):
        module = Recorder()
        getattr(trainer(tmp_path), run)(module, data)
        assert sorted(map(number, module.validated)) == list(range(50))
    few = DataModule(texts, val=texts, batch_size=8, num_workers=0, val_samples=5, val_batch_size=2)
    module = Recorder()
    trainer(tmp_path).validate(module, few)
    assert [number(key) for key in module.validated] == [0, 10, 20, 30, 40]


def test_training_alone_and_images(tmp_path: Path) -> None:
    module = Recorder(ToyImage())
    pattern = write_shards(tmp_path / "pictures", 20, pictures=True)
    trainer(tmp_path, max_steps=2).fit(module, DataModule(pattern, batch_size=4, num_workers=0))
    assert len(module.seen) == 2


def test_mixture(tmp_path: Path) -> None:
    sources = {
        name: {"shards": write_shards(tmp_path / name, 20, prefix=name), "weight": weight}
        for name, weight in (("a", 3.0), ("b", 1.0))
    }
    module = Recorder()
    trainer(tmp_path, max_steps=40).fit(module, DataModule(sources, batch_size=4, num_workers=0))  # type: ignore[arg-type]
    assert sum(keys[0].rpartition("/")[2].startswith("a") for _, keys, _ in module.seen) == 30


def test_pairs_images_alone_and_texts_alone_in_one_run(tmp_path: Path, pair_shards: str, tokenizer_path: str) -> None:
    """Every source trains what it has; the same shards without ``only`` are refused, with what to set."""
    pictures = write_shards(tmp_path / "pictures", 16, pictures=True)
    with TarWriter(str(tmp_path / "texts.tar")) as writer:
        for i in range(16):
            writer.write({"__key__": f"{i}", "txt": caption(i)})
    sources: dict[str, Any] = {
        "pairs": {"shards": pair_shards},
        "pictures": {"shards": pictures, "only": "image"},  # that there are texts as well does not matter
        "texts": {"shards": str(tmp_path / "texts.tar"), "only": "text"},
    }
    module = mmssl.MMM(tokenizer_path, "vit_tiny_patch16_224", TINY, max_tokens=32, **DECODER)  # type: ignore[arg-type]
    held: dict[str, set[tuple[bool, bool]]] = {name: set() for name in sources}
    step = module.training_step

    def noted(batch: Batch, batch_idx: int) -> torch.Tensor:
        held[batch.source].add((batch.image is not None, batch.text is not None))
        return step(batch, batch_idx)

    module.training_step = noted  # type: ignore[method-assign]
    run = trainer(tmp_path, max_steps=9, log_every_n_steps=3)
    run.fit(module, DataModule(sources, batch_size=4, num_workers=0))
    assert held == {"pairs": {(True, True)}, "pictures": {(True, False)}, "texts": {(False, True)}}
    names = {name for name in run.logged_metrics if name.startswith("train/") and "loss" in name}
    assert names == {
        "train/loss",
        *(f"train/{source}/loss_{part}" for source, part in (("pairs", "text"), ("pairs", "image"))),
        "train/pictures/loss_image",
        "train/texts/loss_text",
    }
    assert all(torch.isfinite(value) for value in run.logged_metrics.values())
    del sources["texts"]["only"]
    with pytest.raises(ShardError, match=r"has no image .*MMM needs image and text .*give the source only: text"):
        trainer(tmp_path, max_steps=1).fit(module, DataModule(sources, batch_size=4, num_workers=0))
    with pytest.raises(ValueError, match="source 'pairs' has only: image, but Recorder needs text"):
        trainer(tmp_path, max_steps=1).fit(
            Recorder(), DataModule({"pairs": {"shards": pair_shards, "only": "image"}}, batch_size=4, num_workers=0)
        )


def test_bad_samples_are_listed_in_the_runs_folder(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(10):
            writer.write({"__key__": f"{i:06d}", "jpg": jpeg(i)[: 200 if i == 3 else None], "txt": "x"})
    module = Recorder(ToyImage())
    data = DataModule(str(tmp_path / "a.tar"), batch_size=10, num_workers=0)
    trainer(tmp_path / "run", max_steps=1).fit(module, data)
    (line,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()[:1]
    assert json.loads(line)["key"] == "000003"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, r"data\.seed was 5 in the checkpoint, now 6.*set data\.seed: 5 to go on"),
        ({"batch_size": 16, "lanes": 8}, r"data\.batch_size was 8 in the checkpoint, now 16"),
        ({"lanes": 4}, r"data\.lanes was 8 in the checkpoint, now 4"),
        ({"train": "other"}, r"shards were .*\(50 samples in 3 shards\).* now .*\(40 samples in 3 shards\)"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(
    tmp_path: Path, texts: str, change: dict[str, Any], message: str
) -> None:
    if "train" in change:
        change = {"train": write_shards(tmp_path / "other", 40)}
    options = {"train": texts, "batch_size": 8, "num_workers": 0, "seed": 5}
    made = trainer(tmp_path, max_steps=1)
    made.fit(Recorder(), DataModule(**options))  # type: ignore[arg-type]
    made.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=2).fit(
            Recorder(),
            DataModule(**{**options, **change}),  # type: ignore[arg-type]
            ckpt_path=str(tmp_path / "a.ckpt"),
        )


def going_on(folder: Path, train: Any, steps: int, checkpoint: Path | None, **options: Any) -> list[list[str]]:
    """Train up to ``steps`` and save; the keys of each batch."""
    module = Recorder()
    made = trainer(folder, max_steps=steps)
    data = DataModule(train, batch_size=8, num_workers=0, seed=5, **options)
    made.fit(module, data, ckpt_path=None if checkpoint is None else str(checkpoint))
    made.save_checkpoint(folder / "a.ckpt")
    return [keys for _, keys, _ in module.seen]


def test_appended_shards_come_with_the_next_epoch(tmp_path: Path) -> None:
    one, two, saved = tmp_path / "shards" / "a", tmp_path / "shards" / "b", tmp_path / "a.ckpt"
    old, new = write_shards(one, 50), write_shards(two, 20, shards=2, prefix="new-")
    begun = going_on(tmp_path, old, 4, None)
    with pytest.raises(
        ValueError, match=r"2 shards were appended to source 'train' .*00000\.tar, 00001\.tar.*allow_app"
    ):
        going_on(tmp_path, [old, new], 30, saved)
    rest = going_on(tmp_path, [old, new], 30, saved, allow_appended=True)
    keys = [key for batch in begun + rest for key in batch]
    assert sorted(map(number, keys[:50])) == list(range(50))
    assert not any("new-" in key for key in keys[:50])
    for epoch in range(2):  # 70 samples each
        part = keys[50 + 70 * epoch : 120 + 70 * epoch]
        assert sorted(number(key) for key in part if "new-" not in key) == list(range(50))
        assert sorted(number(key) for key in part if "new-" in key) == list(range(20))
    # Once accepted, they belong to the run: no option is needed, and a stop makes no difference.
    going_on(tmp_path, old, 4, None)
    first = going_on(tmp_path, [old, new], 9, saved, allow_appended=True)
    assert first + going_on(tmp_path, [old, new], 30, saved) == rest
    with pytest.raises(ValueError, match=r"shards were .*70 samples in 5 shards.* now .*50 samples in 3 shards"):
        going_on(tmp_path, old, 40, saved, allow_appended=True)


def test_appended_at_the_very_end_of_an_epoch(tmp_path: Path) -> None:
    old, new = write_shards(tmp_path / "a", 40), write_shards(tmp_path / "b", 20, shards=1, prefix="new-")
    going_on(tmp_path, old, 5, None)
    rest = going_on(tmp_path, [old, new], 5 + 15, tmp_path / "a.ckpt", allow_appended=True)
    assert sorted(key for batch in rest for key in batch if "new-" in key) == sorted(
        f"00000.tar/new-{i:06d}" for i in [*range(20), *range(20)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard, other: other.replace(shard), "changed: 00001.tar; restore them"),
        (lambda shard, other: shard.unlink(), "gone: 00001.tar; restore them"),
        (lambda shard, other: shard.rename(shard.with_name("x.tar")), "gone: 00001.tar; new: x.tar; restore them"),
    ],
)
def test_changed_shards_are_named(tmp_path: Path, change: Any, message: str) -> None:
    write_shards(tmp_path / "in", 50)
    write_shards(tmp_path / "other", 9, shards=1)
    going_on(tmp_path, str(tmp_path / "in"), 2, None)
    change(tmp_path / "in" / "00001.tar", tmp_path / "other" / "00000.tar")
    with pytest.raises(ValueError, match=f"samples would be repeated and left out; {message}"):
        going_on(tmp_path, str(tmp_path / "in"), 4, tmp_path / "a.ckpt")


def test_shards_in_another_order_are_named(tmp_path: Path) -> None:
    paths = [str(tmp_path / "in" / f"0000{i}.tar") for i in range(3)]
    write_shards(tmp_path / "in", 50)
    going_on(tmp_path, paths, 2, None)
    with pytest.raises(ValueError, match=r"in another order: 00000\.tar, 00002\.tar; restore them"):
        going_on(tmp_path, paths[::-1], 4, tmp_path / "a.ckpt")


def test_an_earlier_order_is_refused(tmp_path: Path, texts: str) -> None:
    going_on(tmp_path, texts, 2, None)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del saved["DataModule"]["order"]
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="order of samples is version 1, this mmssl makes version 2"):
        going_on(tmp_path, texts, 4, tmp_path / "a.ckpt")


def test_the_smallest_change_of_a_weight_is_refused(tmp_path: Path) -> None:
    def sources(weight: float) -> dict[str, Any]:
        both = {name: write_shards(tmp_path / name, 20) for name in ("a", "b")} if weight == 1 / 3 else {}
        shards = both or {name: str(tmp_path / name) for name in ("a", "b")}
        return {"a": {"shards": shards["a"]}, "b": {"shards": shards["b"], "weight": weight}}

    going_on(tmp_path, sources(1 / 3), 2, None)
    with pytest.raises(ValueError, match=r"were a x 1\.0, b x 0\.3333333333333333 in .* b x 0\.3333333: samples"):
        going_on(tmp_path, sources(0.3333333), 4, tmp_path / "a.ckpt")


def test_a_preview_leaves_the_validation_as_it_is(tmp_path: Path, texts: str) -> None:
    data = DataModule(texts, val=texts, batch_size=8, num_workers=0)
    trainer(tmp_path, max_steps=1).fit(Recorder(), data)
    assert data._val is not None
    shards = data._val.samples.sources[0].shards
    assert shards.group == 8  # neighbours of a batch, fetched together
    preview = data.preview(5)
    assert preview is not None
    assert preview.size == 5
    assert shards.group == 8


def test_every_source_has_an_epoch_counter(tmp_path: Path) -> None:
    sources = {
        "long": {"shards": write_shards(tmp_path / "a", 60), "weight": 3},
        "short": {"shards": write_shards(tmp_path / "b", 10)},
    }
    data = DataModule(sources, batch_size=4, num_workers=0)  # type: ignore[arg-type]
    trainer(tmp_path, max_steps=40).fit(Recorder(), data)
    assert data.epochs == {"long": 30 * 4 / 60, "short": 10 * 4 / 10}


def test_shards_must_hold_what_the_objective_needs(tmp_path: Path, texts: str) -> None:
    def fit(train: str, prepare: Prepare) -> None:
        data = DataModule(train, batch_size=4, num_workers=0)
        trainer(tmp_path, max_steps=1).fit(Recorder(prepare), data)

    with pytest.raises(ShardError, match=r"00000\.tar: has no image \(found: txt\); Recorder needs image") as caught:
        fit(texts, ToyImage())
    assert "\n" not in str(caught.value)
    pictures = str(tmp_path / "p.tar")
    with TarWriter(pictures) as writer:
        writer.write({"__key__": "a", "jpg": jpeg(0), "json": {"url": "x"}})
    with pytest.raises(ShardError, match=r"p\.tar: has no \.txt, and sample a no caption in its json"):
        fit(pictures, ToyText())
    with pytest.raises(ShardError, match=r"nothing\.tar: not found"):
        fit(str(tmp_path / "nothing.tar"), ToyText())
    with pytest.raises(ValueError, match=r"data\.val is not set"):
        trainer(tmp_path).validate(Recorder(), DataModule(texts, batch_size=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_batch_size": 0}, "val_batch_size is 0"),
        ({"lanes": 3}, "lanes is 3"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"prefetch_factor": 0}, "prefetch_factor is 0"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"train": {}}, "train names no source"),
        ({"train": {"a": {"shard": "x"}}}, "source 'a' has"),
        ({"train": {"a": {"shards": "x", "weight": 0.0}}}, "source 'a' has weight 0"),
        ({"train": {"a": {"shards": "x", "only": "sound"}}}, "source 'a' has only: sound; give image or text"),
    ],
)
def test_constructor_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataModule(**{"train": "a.tar", "batch_size": 8, **options})


def test_two_ranks_share_every_batch(tmp_path: Path, texts: str) -> None:
    """Two real processes under DDP train on what one process trains on, and resume on one."""
    script = f"""
import sys, torch; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from test_datamodule import *
module = Recorder()
made = trainer(Path({str(tmp_path)!r}), max_steps=4, devices=2, strategy="ddp")
made.fit(module, DataModule({texts!r}, val={texts!r}, batch_size=8, num_workers=1))
made.save_checkpoint({str(tmp_path / "two.ckpt")!r})
torch.save((module.seen, module.validated), {str(tmp_path)!r} + f"/rank{{made.global_rank}}.pt")
"""
    (tmp_path / "run.py").write_text(script)
    subprocess.run([sys.executable, str(tmp_path / "run.py")], check=True, capture_output=True, timeout=120)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    whole = Recorder()
    trainer(tmp_path, max_steps=4).fit(whole, DataModule(texts, batch_size=8, num_workers=0))
    for a, b, one in zip(parts[0][0], parts[1][0], whole.seen, strict=True):
        assert a[0] == b[0] == one[0]
        assert len(a[1]) == len(b[1]) == 4
        assert sorted(a[1] + b[1]) == sorted(one[1])
    again = Recorder()
    data = DataModule(texts, batch_size=8, num_workers=0)
    trainer(tmp_path, max_steps=6).fit(again, data, ckpt_path=str(tmp_path / "two.ckpt"))
    assert [index for index, _, _ in again.seen] == [4, 5]


def test_indexing_that_takes_long_is_told(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataModule(texts, batch_size=8)
    data.prepare_data()
    assert "indexing" not in capsys.readouterr().err
    monkeypatch.setattr(datamodule, "_TELL", 0.0)
    data.prepare_data()
    assert capsys.readouterr().err.splitlines()[-1] == "mmssl: indexing shards: 3 done, 50 samples"


def test_remote_shards_train_and_resume_as_local_ones(tmp_path: Path) -> None:
    """One line names them; the fingerprint is that of the local shards, so a run may move from disk to store."""
    (tmp_path / "served").mkdir()
    pattern = write_shards(tmp_path / "served", 50)
    whole = going_on(tmp_path, pattern, 12, None)
    with FileServer(tmp_path / "served") as server:
        options: dict[str, Any] = {"val": f"{server.url}/00000.tar", "cache_dir": str(tmp_path / "cache")}
        urls = f"{server.url}/{{00000..00002}}.tar"
        first = going_on(tmp_path, urls, 5, None, **options)
        again = going_on(tmp_path, urls, 9, tmp_path / "a.ckpt", **options)
    assert first + again + going_on(tmp_path, pattern, 12, tmp_path / "a.ckpt") == whole
    assert list((tmp_path / "cache").glob("*.mmssl"))


def test_too_many_bad_samples_stop_all_ranks_at_one_step(tmp_path: Path, tokenizer_path: str) -> None:
    """One in eight is bad; whatever each rank has met of them, both stop, with one message, and none waits for ever."""
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(64):
            writer.write({"__key__": f"{i:06d}", "txt": b"" if i % 8 == 3 else f"a red square {i}".encode()})
    (tmp_path / "run.py").write_text(f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from test_datamodule import *
from pairs import TINY, caption
import mmssl
from mmssl.data.budget import TooManyBadSamples
module = mmssl.MLM({tokenizer_path!r}, "vit_tiny_patch16_224", TINY, max_tokens=32)
made = trainer(Path({str(tmp_path)!r}), max_steps=50, devices=2, strategy="ddp", log_every_n_steps=2)
try:
    made.fit(module, mmssl.DataModule({str(tmp_path / "a.tar")!r}, batch_size=16, num_workers=1))
except TooManyBadSamples as error:
    print(f"<rank {{made.global_rank}}: {{made.global_step}}: {{error}}>", flush=True)
    raise
""")
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode != 0
    told = sorted(set(re.findall(r"<rank (\d): (\d+): (.*?)>", ended.stdout)))
    assert [rank for rank, _, _ in told] == ["0", "1"], ended.stderr[-3000:]
    assert told[0][1:] == told[1][1:]
    assert re.match(
        r"\d+ of \d+ samples cannot be used, over the budget of 1\.00% .*; worst shards: .*a\.tar: ", told[0][2]
    )


@pytest.mark.parametrize(
    ("workers", "asked", "threads"), [(1, None, 3), (3, None, 1), (9, None, 1), (0, None, 4), (1, "2", 4)]
)
def test_training_leaves_cores_to_its_workers(
    workers: int, asked: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(loader, "_cores", lambda processes: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    loader.leave_cores(workers, 1)
    assert (seen or [4]) == [threads]
