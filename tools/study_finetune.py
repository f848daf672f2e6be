"""Does pretraining pay?  Fine-tuning from a pretrained backbone against training from scratch, with few labels.

    python -m pip install -e '.[bench]'
    python tools/make_demo_data.py --out data/demo --if-missing
    OMP_NUM_THREADS=1 python tools/study_finetune.py

Three tasks (``--tasks``):

    digits  scikit-learn's digits: 1,797 pictures of 8 x 8 pixels, real handwriting (UCI's optical recognition of
            handwritten digits).  A fifth of each class is the test set.
    demo    5,000 training pictures of the demo's data, glyphs in colour on colour; the class is both colours, one of 43
            pairs.  The test set is the demo's validation: characters that no training picture shows.
    pairs   all 52,515 training pictures of the demo with captions, of which every second is another picture's, of other
            colours; the class is whether they belong together.  The test set is made of the validation in the same way.

A small model is pretrained without labels: for the digits a masked autoencoder on a task's training pictures, for the
two others configs/demo/mmm.yaml's recipe, on all training pictures and their captions, which name the colours.  Then
classifiers are trained on 1 %, 10 % and all of the labels, equally many steps for every arm, several seeds (which draw
the labels, the beginning and the order).  The learning rate of each arm is chosen once, by a run on 10 % of the labels,
measured on training pictures outside of these.

Writes the pretraining run and study.json of every task into --out, study.png of all that are there, and prints a table.
"""

import argparse
import io
import json
import logging
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from lightning import Callback, Trainer, seed_everything
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

import mmssl
from mmssl.cli.launch import TRAINER_DEFAULTS
from mmssl.data.shards import ShardSet
from mmssl.training.checkpoint import AtomicCheckpointIO, Checkpoints

DEMO = Path("data/demo")
NAME = "vit_tiny_patch16_224"
CROP: dict[str, Any] = {"crop_scale": (0.6, 1.0), "flip": False}  # digits and letters have no mirror images
PARTS = (0.01, 0.1, 1.0)
RATES = (1e-3, 3e-3)
ARMS: dict[str, dict[str, Any]] = {
    "from scratch": {"backbone_name": NAME},
    "fine-tuned": {"backbone": ""},
    "linear probe": {"backbone": "", "mode": "linear_probe", "head_norm": True},
}


class Labelled(NamedTuple):
    """Pictures as files of one ``kind`` (an extension), their classes, and captions where there are any."""

    kind: str
    pictures: Sequence[bytes]
    labels: NDArray[np.int64]
    texts: Sequence[bytes] | None = None


class Task(NamedTuple):
    """``load`` gives the pictures to train on and those to test on, ``pretraining`` the objective and its data, of a
    shard of the pictures to train on and a number of steps."""

    load: Callable[[], tuple[Labelled, Labelled]]
    unit: str  # what a label is a label of
    classifier: Callable[..., mmssl.ImageClassifier | mmssl.PairClassifier]
    backbone: dict[str, Any]
    pretraining: Callable[["Task", str, int], tuple[mmssl.MAE | mmssl.MMM, mmssl.DataModule]]
    pretrain_steps: int
    steps: int = 1000  # of a classifier
    reads_text: bool = False


def digits() -> tuple[Labelled, Labelled]:
    """scikit-learn's digits; every class gives a fifth to the test."""
    pictures, labels = load_digits(return_X_y=True)
    files = [_png((picture.reshape(8, 8) * 255 / 16).round().astype(np.uint8)) for picture in pictures]
    generator = np.random.default_rng(0)
    members = [generator.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    test = np.sort(np.concatenate([m[: len(m) // 5] for m in members]))
    parts = (np.setdiff1d(np.arange(len(labels)), test), test)
    train, held_out = (Labelled("png", [files[i] for i in part], labels[part]) for part in parts)
    return train, held_out


def demo() -> tuple[Labelled, Labelled]:
    """The demo's pictures, labelled by the colours of ink and paper."""
    parts = [ShardSet(str(DEMO / shards)) for shards in ("pairs-train-00000[0-4].tar", "pairs-val-*.tar")]
    members = [[part.read(i).members for i in range(len(part))] for part in parts]
    about = [[json.loads(m["json"]) for m in part] for part in members]
    names = sorted({(a["ink"], a["paper"]) for a in about[0]})
    train, held_out = (
        Labelled("jpg", [m["jpg"] for m in part], np.array([names.index((a["ink"], a["paper"])) for a in of_it]))
        for part, of_it in zip(members, about, strict=True)
    )
    return train, held_out


def pairs() -> tuple[Labelled, Labelled]:
    """The demo's pairs; every second picture has the caption of another one, of other colours."""
    found = []
    for seed, shards in enumerate(("pairs-train-*.tar", "pairs-val-*.tar")):
        part, generator = ShardSet(str(DEMO / shards)), np.random.default_rng(seed)
        members = [part.read(i).members for i in range(len(part))]
        colours = [(about["ink"], about["paper"]) for about in (json.loads(m["json"]) for m in members)]
        partners = list(range(len(members)))
        for i in range(0, len(members), 2):
            while colours[partners[i]] == colours[i]:
                partners[i] = int(generator.integers(len(members)))
        texts = [members[partner]["txt"] for partner in partners]
        found.append(Labelled("jpg", [m["jpg"] for m in members], np.arange(len(members)) % 2, texts))
    return found[0], found[1]


def _mae(task: Task, shard: str, steps: int) -> tuple[mmssl.MAE, mmssl.DataModule]:
    module = mmssl.MAE(
        NAME,
        task.backbone,
        mask_ratio=0.6,
        norm_pix_loss=False,
        decoder_embed_dim=64,
        decoder_depth=1,
        decoder_num_heads=4,
        lr=1.5e-3,
        warmup_steps=min(200, steps // 4),
        **CROP,
    )
    return module, mmssl.DataModule(shard, batch_size=64, lanes=1, num_workers=0)


def _mmm(task: Task, shard: str, steps: int) -> tuple[mmssl.MMM, mmssl.DataModule]:
    """As configs/demo/mmm.yaml, but for the sizes of model and pictures."""
    module = mmssl.MMM(
        tokenizer=str(DEMO / "tokenizer.json"),
        backbone=NAME,
        backbone_options=task.backbone,
        text_mask_ratio=0.4,
        image_mask_ratio=0.4,
        text_masking="whole_word",
        image_weight=3.0,
        max_tokens=32,
        norm_pix_loss=False,
        decoder_embed_dim=64,
        decoder_depth=1,
        decoder_num_heads=4,
        crop_scale=(1.0, 1.0),
        flip=False,
        pad_to_multiple_of=64,
        lr=1.5e-3,
        warmup_steps=min(150, steps // 4),
        weight_decay=0.05,
    )
    return module, mmssl.DataModule(str(DEMO / "pairs-train-*.tar"), batch_size=32, num_workers=0)


def _tiny(img_size: int, patch_size: int) -> dict[str, Any]:
    options = {"embed_dim": 64, "depth": 4, "num_heads": 4}
    return {"img_size": img_size, "patch_size": patch_size, "options": options}


_PICTURES = partial(mmssl.ImageClassifier, **CROP)
_PAIRS = partial(mmssl.PairClassifier, crop_scale=(1.0, 1.0), max_tokens=32, pad_to_multiple_of=64)
TASKS = {
    "digits": Task(digits, "digits", _PICTURES, _tiny(16, 4), _mae, 8000),
    "demo": Task(demo, "glyphs", _PICTURES, _tiny(32, 8), _mmm, 2800),
    "pairs": Task(pairs, "pairs", _PAIRS, _tiny(32, 8), _mmm, 2800, steps=600, reads_text=True),
}


def main(out: Path, tasks: Sequence[str], steps: int | None, pretrain_steps: int | None, seeds: int) -> None:
    """Run the study of every task; writes and prints what came out."""
    _quiet()
    for name in tasks:
        task = TASKS[name]
        result = study(out / name, task, steps or task.steps, pretrain_steps or task.pretrain_steps, seeds)
        (out / name / "study.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{name}:\n\n{table(result)}\n", flush=True)
    done = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/study.json"))}
    draw(done, out / "study.png")


def study(out: Path, task: Task, steps: int, pretrain_steps: int, seeds: int) -> dict[str, Any]:
    """Pretrain, choose rates, train and test all classifiers; returns what study.json holds."""
    began, clock = time.process_time(), time.monotonic()
    train, test = task.load()
    test_shard = write(out / "test.tar", test, np.arange(len(test.labels)))
    everything = write(out / "train.tar", train, np.arange(len(train.labels)))
    pretrained = pretrain(out / "pretrained", everything, task, pretrain_steps)
    pretraining = time.process_time() - began
    print(f"pretrained in {pretraining:.0f} s of processor time", flush=True)
    arms = {arm: said | _start(task, pretrained, said) for arm, said in ARMS.items()}
    run = Runs(out, task, steps, int(train.labels.max()) + 1)

    some = choose(train.labels, 0.1, seed=1000)
    tuning = write(out / "tune-train.tar", train, some)
    held_out = write(out / "tune-val.tar", train, np.setdiff1d(np.arange(len(train.labels)), some)[:2000])
    rates = {}
    for arm, arguments in arms.items():
        scores = {lr: run.classify(arguments, tuning, held_out, 1000, lr)[0] for lr in RATES}
        rates[arm] = max(scores, key=lambda lr: scores[lr])
        print(f"{arm}: " + ", ".join(f"{score:.1f} % at {lr:g}" for lr, score in scores.items()), flush=True)

    rows: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    losses: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    counts = {}
    for part in PARTS:
        for seed in range(seeds):
            chosen = choose(train.labels, part, seed)
            counts[str(part)] = len(chosen)
            subset = write(out / "subset.tar", train, chosen)
            for arm, arguments in arms.items():
                score, loss = run.classify(arguments, subset, test_shard, seed, rates[arm])
                rows[arm].setdefault(str(part), []).append(round(score, 2))
                losses[arm].setdefault(str(part), []).append(round(loss, 3))
                print(f"{part:.0%} of the labels, seed {seed}, {arm}: {score:.1f} %, loss {loss:.3f}", flush=True)
    return {
        "accuracy": rows,
        "last_train_loss": losses,
        "labels": counts,
        "unit": task.unit,
        "test_pictures": len(test.labels),
        "rates": rates,
        "steps": steps,
        "pretrain_steps": pretrain_steps,
        "processor_seconds": {"pretraining": round(pretraining), "all": round(time.process_time() - began)},
        "clock_seconds": round(time.monotonic() - clock),
        "machine": {"threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("mmssl", "torch", "lightning", "timm", "scikit-learn")},
        "python": sys.version.split()[0],
    }


def choose(labels: NDArray[np.int64], part: float, seed: int) -> NDArray[np.int64]:
    """Indices of so large a part of the pictures, the classes as equal in number as can be."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    turns = np.empty(len(shuffled), np.int64)  # the how-manieth of its class each one is
    for c in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == c)
        turns[members] = np.arange(len(members))
    order = np.argsort(turns, kind="stable")
    return shuffled[order[: round(part * len(labels))]]


def write(path: Path, data: Labelled, chosen: NDArray[np.int64]) -> str:
    """A shard of pictures, captions and .cls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in (path, Path(f"{path}.idx")):
        old.unlink(missing_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for i in chosen.tolist():
            text = {} if data.texts is None else {"txt": data.texts[i]}
            writer.write({"__key__": f"{i:05d}", data.kind: data.pictures[i], **text, "cls": str(data.labels[i])})
    return str(path)


def pretrain(folder: Path, shard: str, task: Task, steps: int) -> str:
    """Without labels; returns the run's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    seed_everything(0, verbose=False)
    module, data = task.pretraining(task, shard, steps)
    callbacks = [Checkpoints(every_n_steps=steps, keep=1)]
    trainer(folder, steps, callbacks=callbacks, plugins=[AtomicCheckpointIO()]).fit(module, data)
    return str(folder)


def _start(task: Task, pretrained: str, said: dict[str, Any]) -> dict[str, Any]:
    tokenizer = {"tokenizer": str(DEMO / "tokenizer.json")} if task.reads_text else {}
    return {"backbone": pretrained} if "backbone" in said else {"backbone_options": task.backbone, **tokenizer}


class Runs(NamedTuple):
    """What all classifiers of a task share."""

    out: Path
    task: Task
    steps: int
    classes: int

    def classify(self, arguments: dict[str, Any], shard: str, test: str, seed: int, lr: float) -> tuple[float, float]:
        """(accuracy in per cent after so many steps on the shard, mean training loss of the last tenth of them)."""
        seed_everything(seed, verbose=False)
        module = self.task.classifier(
            num_classes=self.classes, lr=lr, weight_decay=0.05, warmup_steps=self.steps // 10, **arguments
        )
        data = mmssl.DataModule(shard, test, batch_size=32, val_batch_size=360, lanes=1, seed=seed, num_workers=0)
        losses = Losses()
        run = trainer(self.out / "runs", self.steps, enable_checkpointing=False, callbacks=[losses])
        run.fit(module, data)
        (scores,) = run.validate(module, datamodule=data, verbose=False)
        return 100 * scores["val/accuracy"], statistics.mean(losses.seen[-max(1, self.steps // 10) :])


class Losses(Callback):
    """Keeps the training loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


def trainer(folder: Path, steps: int, **more: Any) -> Trainer:
    options = {
        **TRAINER_DEFAULTS,
        "limit_val_batches": None,
        "val_check_interval": steps * 2,  # measured once, at the end
        "num_sanity_val_steps": 0,
        "log_every_n_steps": steps * 2,
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": str(folder),
    }
    return Trainer(**{**options, **more})


def table(result: dict[str, Any]) -> str:
    """Mean and standard deviation of the accuracy, and the mean of the last training loss, in Markdown."""
    heads = [f"{float(part):.0%} ({count:,})" for part, count in result["labels"].items()]
    lines = ["| labels | " + " | ".join(heads) + " | train loss at the end |"]
    lines.append("| --- |" + " ---: |" * (len(heads) + 1))
    for arm, scores in result["accuracy"].items():
        cells = [f"{statistics.mean(s):.1f} ± {_spread(s):.1f}" for s in scores.values()]
        losses = ", ".join(f"{statistics.mean(s):.2f}" for s in result["last_train_loss"][arm].values())
        lines.append(f"| {arm} | " + " | ".join([*cells, losses]) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The table's numbers, a panel for every task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.4), dpi=110, layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        places = list(result["labels"].values())
        for arm, scores in result["accuracy"].items():
            means = [statistics.mean(s) for s in scores.values()]
            axes.errorbar(places, means, [_spread(s) for s in scores.values()], marker="o", capsize=3, label=arm)
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{n:,}" for n in places])
        axes.set_title(name)
        axes.set_xlabel(f"labelled {result['unit']}")
        axes.set_ylabel("test accuracy, %")
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _spread(scores: list[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def _png(grey: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(grey).save(data, "PNG")
    return data.getvalue()


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study-finetune"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, help="of every classifier (default: 1000, pairs 600)")
    parser.add_argument("--pretrain_steps", type=int, help="of every pretraining (default: digits 8000, others 2800)")
    parser.add_argument("--seeds", type=int, default=3)
    main(**vars(parser.parse_args()))
