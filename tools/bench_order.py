"""How long the order of samples takes to set up and to ask, at any size, without any data.

    python tools/bench_order.py                                   # the sizes of docs/data.md
    python tools/bench_order.py --samples 1000000000 --world 1024 --batch_size 16384

Every row runs in a process of its own and stands for one loader worker of one rank.  "memory" is how much the process's
largest resident size grew from before the set-up (after the imports) until after all batches.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import numpy as np

from mmssl.data.order import Order, check_world, choose_lanes

ROWS = [  # samples, batch_size, world
    (8_000, 64, 1),
    (1_000_000, 256, 1),
    (100_000_000, 4096, 64),
    (1_000_000_000, 16384, 1024),
    (1_000_000_000, 16384, 1),
]


def measure(samples: int, batch_size: int, world: int, workers: int, batches: int) -> dict[str, float]:
    """One row, in this process."""
    np.argsort(np.arange(1000))  # what NumPy loads at first use is not the order's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    lanes = choose_lanes(batch_size)
    check_world(lanes, world, batch_size)
    order = Order(samples, lanes=lanes, seed=1)
    order.batch(0, batch_size, world - 1, world)
    setup = time.perf_counter() - begin
    # From the last hundredth of epoch 3 on, as a worker does it: every W-th batch.
    first = 4 * samples // batch_size - samples // batch_size // 100
    begin = time.perf_counter()
    order.batch(first, batch_size, world - 1, world)
    resume = time.perf_counter() - begin
    begin = time.perf_counter()
    for number in range(first + 1, first + 1 + batches * workers, workers):
        order.batch(number, batch_size, world - 1, world)
    each = (time.perf_counter() - begin) / batches / (batch_size // world)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"setup": setup, "resume": resume, "each": each, "memory": grown / 1024, "lanes": lanes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2000, help="batches of this worker that are timed")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.samples, args.batch_size, args.world, args.workers, args.batches)))
        return
    rows = [(args.samples, args.batch_size, args.world)] if args.samples else ROWS
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.processor() or platform.machine()}")
    print(f"{args.workers} workers a rank, {args.batches} batches of one worker\n")
    print("| samples | global batch | ranks | lanes | set-up | first batch at 99 % | each sample | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for samples, batch_size, world in rows:
        options = ["--samples", samples, "--batch_size", batch_size, "--world", world]
        options += ["--workers", args.workers, "--batches", args.batches, "--here"]
        run = subprocess.run(
            [sys.executable, __file__, *map(str, options)], check=True, stdout=subprocess.PIPE, text=True
        )
        row = json.loads(run.stdout)
        print(
            f"| {samples:,} | {batch_size:,} | {world:,} | {row['lanes']} | {1e3 * row['setup']:.1f} ms "
            f"| {1e3 * row['resume']:.1f} ms | {1e6 * row['each']:.2f} µs | {row['memory']:.1f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
