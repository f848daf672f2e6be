"""The sample stream's speed on this machine, against webdataset as open_clip uses it and against a bare loop.

    OMP_NUM_THREADS=1 python tools/bench_stream.py [--folder /tmp/mmssl-bench] [--rounds 7] [--memory 100000] [--quick]

All rows of a table read the same shards in one run and take turns, round by round; the figures are medians of the
rounds, in parentheses the smallest and largest.  "Per core" divides by processor time, that of the workers included:
other processes disturb it less than wall time.  Prints Markdown; docs/speed.md holds such a print.

Rows: webdataset is open_clip's pipeline (PIL, torchvision, float32 normalised on the host).  mmssl is our stream with
MAE's half: masks are drawn too, pictures leave as uint8 and are normalised on the device; "normalised on the host" is
the same with the float32 of webdataset's row.  The bare loop decodes, crops and resizes the same files' bytes, already
in memory, with boxes drawn beforehand.
"""

import argparse
import datetime
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import make_demo_data
import torch
import webdataset
from bench_data import rivals
from bench_data.photos import SIDES, photograph
from bench_data.processes import children, cpu_seconds, processor, resident

SIDE = 224
SCALES = {"crop 0.9 to 1 (open_clip)": (0.9, 1.0), "crop 0.2 to 1 (MAE)": (0.2, 1.0)}
Rival = Callable[[], Iterator[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "mmssl-bench", help="for the shards"
    )
    parser.add_argument("--photos", type=int, default=2000, help="number of pictures like photographs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=12, help="batches of pictures in a round")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="also through this many workers")
    parser.add_argument("--memory", type=int, default=100_000, help="samples of the memory test; 0 leaves it out")
    parser.add_argument("--quick", action="store_true", help="tiny data, two rounds: that it runs, not how fast")
    args = parser.parse_args()
    if args.quick:
        args.photos, args.batch, args.rounds, args.batches, args.workers, args.memory = 32, 4, 2, 2, [1], 64
    torch.set_num_threads(1)
    photos, pairs, texts = make_data(args.folder, args.photos, args.quick)
    print(f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    packages = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print("`" + " ".join(["python tools/bench_stream.py", *sys.argv[1:]]) + "`")
    size = sum(os.path.getsize(path) for path in photos) / args.photos / 1024
    print(
        f"\nPhotographs: 375 to 512 pixels a side, {size:.0f} KB in the tar, to {SIDE} pixels; batches of {args.batch}."
    )
    for crop, scale in SCALES.items():
        ways = image_rivals(photos, args.batch, SIDE, scale, min(args.photos, 1000))
        table(f"Photographs, {crop}, in one process", "images", compare(ways, args.rounds, args.batches))
    ways = image_rivals(pairs, args.batch, 48, (0.2, 1.0), 1000)
    table(
        "The demo's pictures (48 to 48 pixels), in one process", "images", compare(ways, args.rounds, 4 * args.batches)
    )
    for workers in args.workers:
        ways = image_rivals(photos, args.batch, SIDE, SCALES["crop 0.2 to 1 (MAE)"], 0, workers)
        title = f"Photographs, crop 0.2 to 1 (MAE), {workers} worker{'s' * (workers > 1)}"
        table(title, "images", compare(ways, args.rounds, args.batches, workers))
    batch = 4 * args.batch
    ways = {
        "webdataset": lambda: rivals.webdataset_text(texts, batch, 0),
        "mmssl": lambda: rivals.mmssl_stream(texts, rivals.RawText(), batch, 0),
    }
    table("Text, decoded only, in one process", "texts", compare(ways, args.rounds, 4 * args.batches))
    many_shards(args.folder, (16, 20) if args.quick else (1000, 1000), args.rounds, 4 * args.batches)
    if args.memory:
        memory(photos, args.batch, args.memory)


def make_data(folder: Path, photos: int, quick: bool) -> tuple[list[str], list[str], list[str]]:
    """Shards of photographs, of the demo's pairs and of its texts; made unless they are there."""
    own, demo = folder / f"photos-{photos}", folder / "demo"
    write(own, photos, SIDES)
    if quick:  # a stand-in, since the demo's glyphs take a while
        demo = folder / "demo-quick"
        write(demo, 64, (48, 48))
        pairs = texts = sorted(map(str, demo.glob("*.tar")))
    else:
        if make_demo_data.main(["--out", str(demo), "--pairs", "8000", "--if-missing"]):
            raise SystemExit(1)
        pairs, texts = (sorted(map(str, demo.glob(f"{kind}-train-*.tar"))) for kind in ("pairs", "text"))
    return sorted(map(str, own.glob("*.tar"))), pairs, texts


def many_shards(folder: Path, size: tuple[int, int], rounds: int, batches: int) -> None:
    """The same tiny texts in very many shards and in four: 64 lanes, so that a rank has most of the shards at hand."""
    shards, each = size
    ways: dict[str, Rival] = {}
    for count in (4, shards):
        own = folder / f"texts-{count}-{shards * each}"
        write_texts(own, count, shards * each // count)
        paths = sorted(map(str, own.glob("*.tar")))
        ways[f"mmssl, {count:,} shards"] = functools.partial(
            rivals.mmssl_stream, paths, rivals.RawText(), 256, 0, lanes=64
        )
    title = f"{shards * each:,} texts of 20 bytes in few and in many shards, 64 lanes, in one process"
    table(title, "texts", compare(ways, rounds, batches))


def write_texts(folder: Path, shards: int, samples: int) -> None:
    """Shards of so many texts each, unless they are there."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(shard * samples, (shard + 1) * samples):
                writer.write({"__key__": f"{number:09d}", "txt": "a text of some size."})
    (folder / "complete").touch()


def write(folder: Path, photos: int, sides: tuple[int, int]) -> None:
    """Four shards in the img2dataset layout."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        made = pool.map(functools.partial(photograph, sides=sides), range(photos), chunksize=8)
        for shard in range(4):
            with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
                for number in range(shard * photos // 4, (shard + 1) * photos // 4):
                    text = f"a picture like a photograph, number {number}, of shapes that cover each other"
                    members = {"jpg": next(made), "txt": text, "json": {"caption": text}}
                    writer.write({"__key__": f"{number:09d}", **members})
    (folder / "complete").touch()


def image_rivals(
    shards: list[str], batch: int, side: int, scale: tuple[float, float], bare: int, workers: int = 0
) -> dict[str, Rival]:
    prepare = rivals.mae(side, scale)
    ways: dict[str, Rival] = {
        "webdataset, PIL, torchvision": lambda: rivals.webdataset_images(shards, batch, side, scale, workers),
        "mmssl": lambda: rivals.mmssl_stream(shards, prepare, batch, workers),
        "mmssl, normalised on the host": lambda: rivals.mmssl_stream(
            shards, rivals.FloatImages(prepare), batch, workers
        ),
    }
    if bare:
        ways["bare loop"] = lambda: rivals.bare_loop(shards, batch, side, scale, bare)
    return ways


def compare(
    ways: dict[str, Rival], rounds: int, batches: int, workers: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """By way and round: (seconds, processor seconds) for a thousand samples."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    running = {} if workers else {name: way() for name, way in ways.items()}
    for turn in range(rounds + (not workers)):
        for name, way in ways.items():
            if workers:
                # Workers of another way would work on beside these: start them anew, and empty the queue they filled.
                running = {name: way()}
                for _ in range(4 * workers):
                    next(running[name])
            wall, cpu, done = time.perf_counter(), cpu_seconds(), 0
            for _ in range(batches * max(1, workers)):
                done += next(running[name])
            if turn or workers:  # without workers the first round warms up
                scale = 1000 / done
                spent = max(cpu_seconds() - cpu, 1e-3)  # tiny rounds of workers may stay below their count's step
                times[name].append((scale * (time.perf_counter() - wall), scale * spent))
            if workers:
                running[name].close()  # type: ignore[attr-defined]
    return times


def table(title: str, what: str, times: dict[str, list[tuple[float, float]]]) -> None:
    """Medians with the smallest and largest; ratios round by round, of processor time, against the first row."""
    print(f"\n**{title}**\n\n| | {what}/s | {what}/s per core | against the first | against the bare loop |")
    print("|---|---|---|---|---|")
    first, bare = next(iter(times.values())), times.get("bare loop")
    for name, rounds in times.items():
        cells = [spread([1000 / wall for wall, _ in rounds], 0), spread([1000 / cpu for _, cpu in rounds], 0)]
        for other in (first, bare):
            ratios = [theirs / ours for (_, theirs), (_, ours) in zip(other or [], rounds, strict=False) if ours]
            cells.append(spread(ratios, 2) if ratios else "")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{v:,.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def memory(shards: list[str], batch: int, samples: int) -> None:
    """Resident memory of the one worker that reads so many samples."""
    running = rivals.mmssl_stream(shards, rivals.mae(SIDE, (0.2, 1.0)), batch, 1)
    before = set(children())
    marks = [0.02, 0.25, 0.5, 0.75, 1.0]
    done = next(running)
    (worker,) = set(children()) - before
    print(f"\n**Memory of a worker over {samples:,} samples**\n")
    print("| samples | resident, MB | of it its own, MB |\n|---|---|---|")
    for mark in marks:
        while done < mark * samples:
            done += next(running)
        whole, own = resident(worker)
        print(f"| {done:,} | {whole:.0f} | {own:.0f} |", flush=True)
    running.close()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
