"""Make the demo's shards offline, from what mmssl's dependencies ship.

    python tools/make_demo_data.py --out data/demo --seed 0

Pairs: every glyph of the DejaVu and STIX fonts inside matplotlib that has a Unicode name, as a small colour picture
with a caption (demo_data/captions.py has the rule).  Text: Python's documentation and the docstrings of installed
packages.  Written in the img2dataset layout with webdataset's own writer:

    pairs-{train,val}-000000.tar ...   .jpg .txt .json .cls    no character of val is in train, in any font
    text-{train,val}-000000.tar ...    .txt .json              no document of val is in train
    labels.json                        the names of the .cls integers
    tokenizer.json                     WordPiece, trained on the captions and the text of train
    complete.json                      settings and counts; written last, so a folder without it is unfinished

The same seed, options and package versions give the same bytes.
"""

import argparse
import functools
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

MARKER = "complete.json"
PAIRS_PER_SHARD = 1000
TEXTS_PER_SHARD = 2000
_OURS = re.compile(r"(pairs|text)-(train|val)-\d{6}\..*|labels\.json|tokenizer\.json(\.partial)?|complete\.json")


class UserError(Exception):
    """Printed as one line."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmake_demo_data: stopped; the folder is unfinished, run again with --force", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the demo's shards.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of colours, places, order and split (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=48, help="side of a picture in pixels (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=None, help="at most so many pairs, train and val together")
    parser.add_argument("--draws", type=int, default=1, help="pictures per glyph of train (default: %(default)s)")
    parser.add_argument(
        "--format", choices=("jpg", "png"), default="jpg", help="of the pictures (default: %(default)s)"
    )
    parser.add_argument("--vocab_size", type=int, default=4000, help="of the tokenizer (default: %(default)s)")
    parser.add_argument(
        "--val", type=float, default=0.04, help="validation's part of characters (default: %(default)s)"
    )
    parser.add_argument("--texts", type=int, default=None, help="at most so many pieces of text")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    parser.add_argument("--force", action="store_true", help="write over a folder that exists")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if the folder is complete")
    return parser


def _run(options: argparse.Namespace) -> int:
    _check(options)
    settings = {
        k: getattr(options, k) for k in ["seed", "size", "pairs", "draws", "format", "vocab_size", "val", "texts"]
    }
    if not _ready(options, settings):
        return 0
    try:
        import matplotlib
        import webdataset  # noqa: F401  (its import takes seconds: once here, not in every worker)
        from demo_data import glyphs
    except ImportError as error:
        raise UserError(f"{error.name} is not installed. Install mmssl: pip install -e .") from error
    fonts = glyphs.font_files(Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    if not fonts:
        raise UserError(f"matplotlib in {matplotlib.get_data_path()} has no DejaVu and STIX fonts; install it by pip")
    started = time.perf_counter()
    counts: dict[str, Any] = {}
    workers = options.workers or _cores()
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        chosen = _stage("glyphs", counts, lambda: _choose(pool, fonts, options))
        captions = _stage("pairs", counts, lambda: _write_pairs(pool, chosen, options))
        texts = _stage("text", counts, lambda: _write_text(pool, options))
    _stage("tokenizer", counts, lambda: _train_tokenizer([*captions, *texts], options))
    (options.out / "labels.json").write_text(_labels(), encoding="utf-8")
    counts["seconds"] = round(time.perf_counter() - started, 1)
    marker = options.out / (MARKER + ".partial")
    marker.write_text(json.dumps({"settings": settings, "counts": counts}, indent=1) + "\n", encoding="utf-8")
    os.replace(marker, options.out / MARKER)
    size = sum(path.stat().st_size for path in options.out.iterdir()) / 1e6
    print(f"{options.out}: {size:.0f} MB in {counts['seconds']} s")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, least in (("size", 16), ("draws", 1), ("pairs", 1), ("texts", 1), ("workers", 1), ("vocab_size", 300)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small; give at least {least}")
    if not 0 < options.val < 0.5:
        raise UserError(f"--val {options.val} is not between 0 and 0.5")


def _ready(options: argparse.Namespace, settings: dict[str, Any]) -> bool:
    """Make the folder ready to be written; False if it is complete already and that is enough."""
    out = options.out
    if out.is_dir() and any(out.iterdir()):
        marker = out / MARKER
        found = json.loads(marker.read_text(encoding="utf-8"))["settings"] if marker.exists() else None
        if options.if_missing and found == settings:
            print(f"{out} is complete")
            return False
        if options.if_missing and found is not None and not options.force:
            different = ", ".join(f"{k} {found.get(k)} not {v}" for k, v in settings.items() if found.get(k) != v)
            raise UserError(f"{out} was made with other settings ({different}); add --force or give another --out")
        if not options.force and not (options.if_missing and found is None):
            state = "exists" if found else "exists and is unfinished"
            raise UserError(f"{out} {state}; add --force to write it anew, or give another --out")
        strangers = sorted(path.name for path in out.iterdir() if not _OURS.fullmatch(path.name))
        if strangers:
            raise UserError(f"{out} holds files that are not demo data ({strangers[0]}); give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).unlink(missing_ok=True)  # first: from here on the folder is unfinished
        for path in out.iterdir():
            path.unlink()
        (out / f"{MARKER}.partial").touch()
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another --out") from error
    return True


def _choose(pool: ProcessPoolExecutor, fonts: list[str], options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """The glyphs to draw, per split, in the order in which they are written."""
    from demo_data import glyphs

    from mmssl.draws import Draws

    surveys = dict(zip(fonts, _progress(pool.map(glyphs.survey, fonts), len(fonts), "fonts"), strict=True))
    found = glyphs.with_styles(surveys)
    order = Draws(0x70616972, options.seed).permutation(len(found))
    chosen: dict[str, list[Any]] = {"train": [], "val": []}
    for i in order[: options.pairs]:
        glyph = found[i]
        split = "val" if glyphs.is_validation(glyph.codepoint, options.seed, options.val) else "train"
        chosen[split].append(glyph)
    tasks: dict[str, list[Any]] = {"val": [(glyph, 0) for glyph in chosen["val"]]}
    draws = [(glyph, k) for k in range(options.draws) for glyph in chosen["train"]]
    again = Draws(0x74726E, options.seed).permutation(len(draws))
    tasks["train"] = [draws[i] for i in again][: options.pairs]
    if not all(tasks.values()):
        raise UserError(f"--pairs {options.pairs} leaves no pairs for a split; give more")
    characters = len({glyph.codepoint for glyph in found})
    return {"fonts": len(fonts), "glyphs": len(found), "characters": characters}, tasks


def _write_pairs(pool: ProcessPoolExecutor, tasks: dict[str, list[Any]], options: argparse.Namespace) -> tuple:
    jobs = [
        (str(options.out / f"pairs-{split}-{n:06d}.tar"), n, part, options.size, options.format, options.seed)
        for split in ("train", "val")
        for n, part in enumerate(_parts(tasks[split], PAIRS_PER_SHARD))
    ]
    written = list(_progress(pool.map(_pairs_shard, jobs), len(jobs), "shards"))
    counts = {split: len(tasks[split]) for split in tasks}
    picture = round(sum(size for size, _ in written) / sum(counts.values()))
    captions = [
        caption for job, (_, of_it) in zip(jobs, written, strict=True) if "-train-" in job[0] for caption in of_it
    ]
    return counts | {"bytes_per_picture": picture, "MB": _megabytes(jobs)}, captions


def _pairs_shard(job: tuple) -> tuple[int, list[str]]:
    """Draw and write one shard; the bytes of its pictures, and its captions."""
    from demo_data import glyphs

    from mmssl.draws import Draws

    path, number, tasks, size, image_format, seed = job
    pictures = 0
    captions = []

    def samples() -> Iterator[dict[str, Any]]:
        nonlocal pictures
        for glyph, k in tasks:
            draws = Draws(seed, glyph.codepoint, _number(os.path.basename(glyph.font)), k)
            sample = glyphs.sample(glyph, size, image_format, draws)
            pictures += len(sample[image_format])
            captions.append(sample["txt"])
            yield sample

    _write_shard(path, number, samples())
    return pictures, captions


@functools.cache
def _number(name: str) -> int:
    from mmssl.draws import mix

    return mix(*name.encode())


def _write_text(pool: ProcessPoolExecutor, options: argparse.Namespace) -> tuple:
    from demo_data import prose

    from mmssl.draws import Draws

    documents = prose.source_files()
    found = pool.map(prose.pieces_of, [path for _, path in documents], chunksize=16)
    seen: set[bytes] = set()
    pieces: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for (document, _), texts in zip(documents, _progress(found, len(documents), "files"), strict=True):
        split = "val" if prose.is_validation(document, options.seed, options.val) else "train"
        for text in texts:
            fingerprint = prose.fingerprint(text)
            if fingerprint not in seen:
                seen.add(fingerprint)
                pieces[split].append((document, text))
    counts: dict[str, Any] = {}
    jobs: list[tuple] = []
    for split, all_of in pieces.items():
        order = Draws(0x74657874, options.seed, len(split)).permutation(len(all_of))
        share = options.texts and max(1, round(options.texts * (options.val if split == "val" else 1 - options.val)))
        kept = [all_of[i] for i in order[:share]]
        counts[split] = len(kept)
        counts[f"{split}_MB"] = round(sum(len(text) for _, text in kept) / 1e6, 2)
        jobs += [
            (str(options.out / f"text-{split}-{n:06d}.tar"), n, part)
            for n, part in enumerate(_parts(kept, TEXTS_PER_SHARD))
        ]
    for _ in pool.map(_text_shard, jobs):
        pass
    texts = [text for job in jobs if "-train-" in job[0] for _, text in job[2]]
    return counts | {"MB": _megabytes(jobs)}, texts


def _text_shard(job: tuple) -> None:
    path, number, pieces = job
    _write_shard(path, number, ({"txt": text, "json": {"source": document}} for document, text in pieces))


def _write_shard(path: str, number: int, samples: Iterable[dict[str, Any]]) -> None:
    """img2dataset's keys: five digits of the shard and four of the sample.  A fixed time makes the bytes repeatable."""
    import webdataset

    with webdataset.TarWriter(path, mtime=0, user="mmssl", group="mmssl") as shard:
        for i, sample in enumerate(samples):
            shard.write({"__key__": f"{number:05d}{i:04d}", **sample})


def _train_tokenizer(texts: list[str], options: argparse.Namespace) -> tuple:
    from mmssl.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(texts, options.vocab_size, options.out / "tokenizer.json")
    return {"vocab_size": tokenizer.vocab_size}, None


def _labels() -> str:
    from demo_data.captions import SCRIPTS

    return json.dumps({"cls": list(SCRIPTS)}, indent=1) + "\n"


def _stage(name: str, counts: dict[str, Any], work: Callable[[], tuple[dict[str, Any], Any]]) -> Any:
    started = time.perf_counter()
    try:
        numbers, result = work()
    except BrokenProcessPool as error:
        raise UserError(f"{name}: a worker was killed, perhaps for memory; run again with --workers 1") from error
    except OSError as error:
        raise UserError(f"{name}: {error.strerror} ({error.filename}); free space or give another --out") from error
    seconds = time.perf_counter() - started
    counts[name] = numbers | {"seconds": round(seconds, 1)}
    print(f"{name}: {', '.join(f'{k} {v}' for k, v in numbers.items())} in {seconds:.1f} s", flush=True)
    return result


def _progress(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
    """A bar on a terminal, elsewhere a plain line every five seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, unit=unit, leave=False)
        return
    last = time.perf_counter()
    for done, item in enumerate(items, 1):
        if time.perf_counter() - last > 5:
            last = time.perf_counter()
            print(f"  {done} of {total} {unit}", flush=True)
        yield item


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _megabytes(jobs: list[tuple]) -> int:
    return round(sum(os.path.getsize(job[0]) for job in jobs) / 1e6)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    gc.disable()  # syntax trees are large and hold no cycles
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends the pool


if __name__ == "__main__":
    sys.exit(main())
