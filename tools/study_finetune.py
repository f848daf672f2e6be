"""Does pretraining pay?  Fine-tuning from a pretrained backbone against training from scratch, with few labels.

    python -m pip install -e '.[bench]'
    OMP_NUM_THREADS=1 python tools/study_finetune.py

The data are scikit-learn's digits: 1,797 pictures of 8 x 8 pixels, real handwriting (UCI's optical recognition of
handwritten digits).  A fifth of each class is the test set.  A small masked autoencoder is pretrained on the other
pictures without their labels; then a classifier is trained on 1 %, 10 % and all of their labels, equally many steps for
every arm, several seeds (which draw the labels, the beginning and the order).  The learning rate of each arm is chosen
once, by a run on 10 % of the labels, measured on training pictures outside of these.

Writes shards, the pretraining run, study.json and study.png into --out, and prints a table.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from lightning import Trainer, seed_everything
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

import mmssl
from mmssl.cli.launch import TRAINER_DEFAULTS
from mmssl.training.checkpoint import AtomicCheckpointIO, Checkpoints

NAME = "vit_tiny_patch16_224"
BACKBONE = {"img_size": 16, "patch_size": 4, "options": {"embed_dim": 64, "depth": 4, "num_heads": 4}}
CROP = {"crop_scale": (0.6, 1.0), "flip": False}  # digits have no mirror images
PARTS = (0.01, 0.1, 1.0)
RATES = (1e-3, 3e-3)
ARMS: dict[str, dict[str, Any]] = {
    "from scratch": {"backbone_name": NAME, "backbone_options": BACKBONE},
    "fine-tuned": {"backbone": ""},
    "linear probe": {"backbone": "", "mode": "linear_probe", "head_norm": True},
}


def main(out: Path, pretrain_steps: int, steps: int, seeds: int, pretrained: str | None) -> dict[str, Any]:
    """Run the study; returns what study.json holds."""
    began = time.monotonic()
    _quiet()
    pictures, labels = load_digits(return_X_y=True)
    train, test = split(labels)
    shards = {
        "test": write(out / "test.tar", pictures, labels, test),
        "train": write(out / "train.tar", pictures, labels, train),
    }
    if pretrained is None:
        pretrained = pretrain(out / "pretrained", shards["train"], pretrain_steps)
    arms = {arm: {**said, **({"backbone": pretrained} if "backbone" in said else {})} for arm, said in ARMS.items()}
    pretraining = time.monotonic() - began

    some = choose(labels, train, 0.1, seed=1000)
    tuning = write(out / "tune-train.tar", pictures, labels, some)
    held_out = write(out / "tune-val.tar", pictures, labels, np.setdiff1d(train, some))
    rates = {}
    for arm, arguments in arms.items():
        scores = {lr: classify(arguments, tuning, held_out, steps, 1000, lr, out) for lr in RATES}
        rates[arm] = max(scores, key=lambda lr: scores[lr])
        print(f"{arm}: " + ", ".join(f"{score:.1f} % at {lr:g}" for lr, score in scores.items()), flush=True)

    rows: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    counts = {}
    for part in PARTS:
        for seed in range(seeds):
            chosen = choose(labels, train, part, seed)
            counts[str(part)] = len(chosen)
            subset = write(out / "subset.tar", pictures, labels, chosen)
            for arm, arguments in arms.items():
                score = classify(arguments, subset, shards["test"], steps, seed, rates[arm], out)
                rows[arm].setdefault(str(part), []).append(round(score, 2))
                print(f"{part:.0%} of the labels, seed {seed}, {arm}: {score:.1f} %", flush=True)
    result = {
        "accuracy": rows,
        "labels": counts,
        "test_pictures": len(test),
        "rates": rates,
        "steps": steps,
        "pretrain_steps": pretrain_steps,
        "seconds": {"pretraining": round(pretraining), "all": round(time.monotonic() - began)},
        "machine": {"threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("mmssl", "torch", "lightning", "timm", "scikit-learn")},
        "python": sys.version.split()[0],
    }
    (out / "study.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, out / "study.png")
    print("\n" + table(result))
    return result


def split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indices to train on, indices to test on): every class gives a fifth to the test."""
    generator = np.random.default_rng(0)
    test = []
    for c in range(10):
        members = generator.permutation(np.flatnonzero(labels == c))
        test.append(members[: len(members) // 5])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def choose(labels: NDArray[np.int64], train: NDArray[np.int64], part: float, seed: int) -> NDArray[np.int64]:
    """So large a part of the training pictures, the classes as equal in number as can be."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(train)
    turns = np.empty(len(shuffled), np.int64)  # the how-manieth of its class each one is
    for c in range(10):
        members = np.flatnonzero(labels[shuffled] == c)
        turns[members] = np.arange(len(members))
    order = np.argsort(turns, kind="stable")
    return shuffled[order[: round(part * len(train))]]


def write(path: Path, pictures: NDArray[np.float64], labels: NDArray[np.int64], chosen: NDArray[np.int64]) -> str:
    """A shard of .png and .cls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in (path, Path(f"{path}.idx")):
        old.unlink(missing_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for i in chosen.tolist():
            data = io.BytesIO()
            grey = (pictures[i].reshape(8, 8) * 255 / 16).round().astype(np.uint8)
            Image.fromarray(grey).save(data, "PNG")
            writer.write({"__key__": f"{i:04d}", "png": data.getvalue(), "cls": str(labels[i])})
    return str(path)


def pretrain(folder: Path, shard: str, steps: int) -> str:
    """A masked autoencoder of the pictures; returns its run's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    seed_everything(0)
    module = mmssl.MAE(
        NAME,
        BACKBONE,
        mask_ratio=0.6,
        norm_pix_loss=False,
        decoder_embed_dim=64,
        decoder_depth=1,
        decoder_num_heads=4,
        lr=1.5e-3,
        warmup_steps=min(200, steps // 4),
        **CROP,
    )
    data = mmssl.DataModule(shard, batch_size=64, num_workers=0)
    callbacks = [Checkpoints(every_n_steps=steps, keep=1)]
    trainer(folder, steps, callbacks=callbacks, plugins=[AtomicCheckpointIO()]).fit(module, data)
    return str(folder)


def classify(arguments: dict[str, Any], shard: str, test: str, steps: int, seed: int, lr: float, out: Path) -> float:
    """Accuracy in per cent after so many steps on the shard."""
    seed_everything(seed)
    module = mmssl.ImageClassifier(
        num_classes=10, lr=lr, weight_decay=0.05, warmup_steps=steps // 10, **CROP, **arguments
    )
    data = mmssl.DataModule(shard, test, batch_size=32, val_batch_size=360, lanes=1, seed=seed, num_workers=0)
    run = trainer(out / "runs", steps, enable_checkpointing=False)
    run.fit(module, data)
    (scores,) = run.validate(module, datamodule=data, verbose=False)
    return 100 * scores["val/accuracy"]


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
    """Mean and standard deviation of the accuracy, in Markdown."""
    heads = [f"{float(part):.0%} ({count})" for part, count in result["labels"].items()]
    lines = ["| labels | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for arm, scores in result["accuracy"].items():
        cells = [f"{statistics.mean(s):.1f} ± {statistics.stdev(s) if len(s) > 1 else 0:.1f}" for s in scores.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    places = list(result["labels"].values())
    for arm, scores in result["accuracy"].items():
        means = [statistics.mean(s) for s in scores.values()]
        spread = [statistics.stdev(s) if len(s) > 1 else 0 for s in scores.values()]
        axes.errorbar(places, means, spread, marker="o", capsize=3, label=arm)
    axes.set_xscale("log")
    axes.set_xticks(places, [str(n) for n in places])
    axes.set_xlabel("labelled digits")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study-finetune"))
    parser.add_argument("--pretrain_steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=200, help="of every classifier")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrained", help="a backbone to begin with, in place of pretraining one")
    main(**vars(parser.parse_args()))
