"""``mmssl report RUN``: what a joint model has learnt, as a table, one PNG and one JSON."""

import argparse
import csv
import json
import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jsonargparse
import torch
import yaml
from lightning import LightningModule

from mmssl.data.members import sample_text
from mmssl.data.shards import ShardSet
from mmssl.data.tokenizer import whole_words
from mmssl.draws import Draws
from mmssl.evaluation.masked import ALL, MaskedScores, masked_prediction
from mmssl.pretrained.whole import latest_checkpoint, read_checkpoint
from mmssl.training.callbacks.pictures import draw_grid
from mmssl.training.tokenizer_file import tokenizer_of_run
from mmssl.types import BadSample, Batch, Prepare, Sample

# What the demo's captions say of their words; other names are shown as they are.
_TITLES = {
    "easy": "easy: colours",
    "middling": "middling: script, case, style",
    "hard": "hard: which letter or sign",
    "other": "function words",
}
_SPEEDS = {
    "samples_per_second": "{:.0f} pairs/s",
    "text_tokens_per_second": "{:.0f} text tokens/s",
    "step_seconds": "{:.3g} s a step",
    "data_wait_share": "{:.0%} of the time waiting for data",
}


def report(run: str, samples: int = 2000, rounds: int = 1, seed: int = 0, pictures: int = 8) -> None:
    """Measure a run's newest checkpoint on its validation pairs.

    Words are hidden as in training while the picture is whole, and guessed with the right picture and with another
    sample's; hidden patches are compared with painting the mean colour of the visible ones.  Writes report.json and
    report.png into the run's folder.

    Args:
        run: the run's folder.
        samples: how many validation pairs to use, spread evenly; all if there are fewer.
        rounds: how often each caption is hidden, with other words each time.
        seed: of what is hidden and of the wrong pictures.
        pictures: rows of the grid.

    Raises:
        ValueError: the folder holds no run of a joint model, or one without validation data; a number below 1.
    """
    started = time.monotonic()
    for name, value in {"samples": samples, "rounds": rounds, "pictures": pictures}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    folder = Path(run)
    sys.path.append(os.getcwd())  # as mmssl fit does, where a config may name a class of one's own
    module, config = load_run(folder)
    if {"image", "text"} != set(module.prepare(train=False).needs):
        raise ValueError(
            f"run {run} is a {type(module).__name__}; the report needs image-text pairs (mmssl.MMM). "
            "For other runs see metrics.csv in the folder, or mmssl validate"
        )
    data = config["data"].get("init_args", config["data"])  # with or without class_path
    if not data.get("val"):
        raise ValueError(f"run {run} has no validation data; give data.val in its config.yaml")
    module.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    shards = ShardSet(data["val"])
    count = min(samples, len(shards))
    chosen = _usable([shards.read(i * len(shards) // count) for i in range(count)], module.prepare(train=False))
    progress = _Progress(len(chosen) * rounds)
    with torch.autocast(module.device.type, torch.bfloat16):
        scores = masked_prediction(module, chosen, kinds_of_words, seed=seed, rounds=rounds, progress=progress)
        batch = _preview(module, chosen, pictures, seed)
        with torch.no_grad():
            grid = draw_grid(module.complete(batch), module.tokenizer)
    result = {
        "run": str(folder),
        "step": module.report_step,
        "pairs": len(chosen),
        "left_out": count - len(chosen),
        "words": {kind: score.summary() for kind, score in scores.words.items()},
        "patches": scores.patches.summary(),
        "speed": _speed(folder),
        "seconds": round(time.monotonic() - started, 1),
        "versions": _versions(),
    }
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    _draw(scores, grid, folder / "report.png")
    print(_table(result, folder, config))


def load_run(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The module of a run with its newest checkpoint's weights, and the run's resolved config.

    Raises:
        ValueError: no config.yaml or no checkpoint in the folder, or another tokenizer than the checkpoint's.
    """
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else None
    if not isinstance(config, dict) or not {"model", "data"} <= set(config):
        problem = "says nothing of a model and data" if path.is_file() else "is not there"
        raise ValueError(f"{folder} holds no run: config.yaml {problem}; name the folder given to mmssl fit --run")
    if not any((folder / "checkpoints").glob("*.ckpt")):
        raise ValueError(f"run {folder} has no checkpoint yet; it saves them as checkpoint.every_n_steps says")
    module = _build(config["model"], folder)
    checkpoint_path = latest_checkpoint(folder / "checkpoints")
    checkpoint = read_checkpoint(checkpoint_path)
    module.on_load_checkpoint(checkpoint)  # refuses another tokenizer
    module.load_state_dict(checkpoint["state_dict"])
    module.report_step = checkpoint["global_step"]
    return module, config


def _build(model: dict[str, Any], folder: Path) -> Any:
    """The module that a config describes, its arguments read as mmssl fit reads them (lists become tuples)."""
    arguments = dict(model.get("init_args") or {})
    if "tokenizer" in arguments:
        arguments["tokenizer"] = tokenizer_of_run(folder, arguments["tokenizer"])
    arguments.pop("init_from", None)
    if isinstance(options := arguments.get("backbone_options"), dict):
        # The checkpoint holds the weights: fetch none that it replaces at once.
        arguments["backbone_options"] = {k: v for k, v in options.items() if k not in ("pretrained", "weights")}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    try:
        parsed = parser.parse_object({"model": {**model, "init_args": arguments}})
    except argparse.ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.yaml'} does not fit this version of mmssl: {reason}") from error
    return parser.instantiate_classes(parsed).model


def kinds_of_words(sample: Sample) -> list[str]:
    """The kind of each whole word of a caption: from the sample's .json where it says so (the demo's does)."""
    count = len(whole_words(sample_text(sample)))
    try:
        said = json.loads(sample.members.get("json", b"{}"))
    except ValueError:  # not JSON, or not UTF-8
        said = {}
    words = said.get("words") if isinstance(said, dict) else None
    if isinstance(words, list) and len(words) == count and all(isinstance(w, list) and len(w) == 2 for w in words):
        return [str(kind) for _, kind in words]
    return ["words"] * count


def _usable(samples: list[Sample], prepare: Prepare) -> list[Sample]:
    """Without the samples that cannot be prepared, each of which is named."""
    usable = []
    for sample in samples:
        try:
            prepare.sample(sample, Draws(0), 0)
            usable.append(sample)
        except BadSample as error:
            print(f"report: {sample.shard}, sample {sample.key} is left out: {error}", file=sys.stderr, flush=True)
    if not usable:
        raise ValueError(f"none of {len(samples)} validation samples can be used; look at them with mmssl shards check")
    return usable


def _preview(module: Any, samples: list[Sample], rows: int, seed: int) -> Batch:
    prepare = module.prepare(train=False)
    rows = min(rows, len(samples))
    chosen = [samples[i * len(samples) // rows] for i in range(rows)]
    batch: Batch = prepare.collate([prepare.sample(s, Draws(seed, i), 0) for i, s in enumerate(chosen)])
    batch.keys = [s.key for s in chosen]
    return batch.to(module.device)


class _Progress:
    """A line every few seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.last = total, 0, time.monotonic()

    def __call__(self, n: int) -> None:
        self.done += n
        if time.monotonic() - self.last > 5:
            self.last = time.monotonic()
            print(f"report: {self.done} of {self.total} pairs", flush=True)


def _speed(folder: Path) -> dict[str, float]:
    """Medians of what the run logged about its speed."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    columns: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key.startswith("speed/") and value:
                    columns.setdefault(key.removeprefix("speed/"), []).append(float(value))
    return {key: round(median(values), 4) for key, values in columns.items()}


def _versions() -> dict[str, str]:
    names = ("mmssl", "torch", "lightning", "timm")
    return {name: version(name) for name in names} | {"python": sys.version.split()[0], "cores": str(os.cpu_count())}


def _rows(words: dict[str, Any]) -> list[tuple[str, Any]]:
    order = [ALL, *_TITLES, *sorted(set(words) - set(_TITLES) - {ALL})]
    return [(_TITLES.get(kind, kind), words[kind]) for kind in order if kind in words]


def _table(result: dict[str, Any], folder: Path, config: dict[str, Any]) -> str:
    width = max(len(title) for title, _ in _rows(result["words"])) + 2
    lines = [
        "",
        f"What {folder} has learnt after {result['step']} steps, on {result['pairs']} validation pairs",
        "",
        f"{'hidden words guessed':<{width}}{'right picture':>15}{'wrong picture':>15}{'gain':>12}{'words':>8}",
    ]
    lines += [
        f"{title:<{width}}{row['right_picture']:>13.1f} %{row['wrong_picture']:>13.1f} %{row['gain']:>+8.1f} pts"
        f"{row['words']:>8}"
        for title, row in _rows(result["words"])
    ]
    patches = result["patches"]
    if patches["patches"]:
        lines += [
            "",
            f"hidden patches, squared error: {patches['model']:.4f}, painting the mean colour: "
            f"{patches['mean_colour']:.4f}, ratio {patches['ratio']:.2f}",
        ]
    if speed := [form.format(result["speed"][key]) for key, form in _SPEEDS.items() if key in result["speed"]]:
        lines += ["", "training speed (medians): " + ", ".join(speed)]
    lines += [
        "",
        f"figures   {folder / 'report.json'}",
        f"picture   {folder / 'report.png'}",
        f"training  {folder / 'metrics.csv'}, {folder / 'pictures'}/, {folder / 'checkpoints'}/",
        "",
        "next:",
        *(f"  {line}" for line in _next(folder, config)),
    ]
    return "\n".join(lines)


def _next(folder: Path, config: dict[str, Any]) -> list[str]:
    """Commands that go on from this run, on its own data."""
    run = shlex.quote(str(folder))
    lines = [
        f"mmssl report {run} --rounds 3    # less noise in the table",
        f"mmssl export {run} --out {shlex.quote(f'exports/{folder.name}')}    # for timm, or for others",
    ]
    data = config["data"].get("init_args", config["data"])
    train = data.get("train")
    sources = list(train.values()) if isinstance(train, dict) else [{"shards": train}]
    pairs = [source["shards"] for source in sources if "only" not in source]
    plain = config["data"].get("class_path", "").rpartition(".")[2] in ("", "DataModule")
    if not plain or len(pairs) != 1:  # more than a command line says well: docs/finetune.md
        return lines
    options = {
        "run": f"runs/{folder.name}-retrieval",
        "model.init_args.backbone": str(folder),
        "model.init_args.warmup_steps": 100,
        "model.init_args.compile_blocks": config["model"].get("init_args", {}).get("compile_blocks", False),
        "trainer.max_steps": 1000,
        "data.train": pairs[0],
        "data.val": data["val"],
        **{f"data.{name}": data[name] for name in ("batch_size", "num_workers") if data.get(name) is not None},
    }
    told = [f"--{name} {shlex.quote(v if isinstance(v, str) else json.dumps(v))}" for name, v in options.items()]
    fit = "mmssl fit --config configs/finetune/retrieval.yaml"
    return [*lines, f"{fit} {' '.join(told[:2])} \\", f"    {' '.join(told[2:5])} \\", f"    {' '.join(told[5:])}"]


def _draw(scores: MaskedScores, grid: Any, path: Path) -> None:
    """One picture: the grid of completions above, the table as bars below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rows = _rows({kind: score.summary() for kind, score in scores.words.items()})
    figure = Figure(figsize=(grid.width / 100, 3.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.bar([i - 0.2 for i in places], [row["right_picture"] for _, row in rows], 0.4, label="right picture")
    axes.bar([i + 0.2 for i in places], [row["wrong_picture"] for _, row in rows], 0.4, label="wrong picture")
    axes.set_xticks(list(places), [title.replace(": ", ":\n") for title, _ in rows], fontsize=8)
    axes.set_ylabel("hidden words guessed, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    bars = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    whole = Image.new("RGB", (max(grid.width, bars.width), grid.height + bars.height), "white")
    whole.paste(grid, (0, 0))
    whole.paste(bars, (0, grid.height))
    whole.save(path)
