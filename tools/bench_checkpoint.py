"""What saving costs: how long training stands still, how long until it is on the disk, how much memory on top.

    python tools/bench_checkpoint.py [MEGABYTES] [FOLDER]

Linux only (memory is read from /proc).  Two processes stand for two ranks; the state is weights and two averages as
AdamW keeps them.  Every number of memory is the rank's peak while it saves or loads, less what it had before, as a
multiple of the checkpoint's size.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmssl.cli.consolidate import consolidate
from mmssl.training.checkpoint import AtomicCheckpointIO
from mmssl.training.host_copy import HostCopy, gathered
from mmssl.training.sharded import write_sharded

TENSORS = 24


def memory(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def state(megabytes: float, world: int) -> dict[str, Any]:
    """A checkpoint's content of that size over all ranks."""
    rows = int(megabytes * 1e6 / 4 / 3 / TENSORS / 1024)
    mesh = init_device_mesh("cpu", (world,)) if world > 1 else None

    def tensor() -> torch.Tensor:
        if mesh is None:
            return torch.rand(rows, 1024)
        return distribute_tensor(torch.rand(rows, 1024), mesh, [Shard(0)])

    weights = {f"network.{i}": tensor() for i in range(TENSORS)}
    moments = {i: {"exp_avg": tensor(), "exp_avg_sq": tensor()} for i in range(TENSORS)}
    groups = [{"params": list(range(TENSORS)), "lr": 0.1}]
    return {"state_dict": weights, "optimizer_states": [{"state": moments, "param_groups": groups}], "global_step": 1}


def measured(name: str, bytes_of_one: float, rank: int, stall: Callable[[], Any], rest: Callable[[Any], Any]) -> None:
    """Print the seconds of ``stall`` and of both, and the memory; ``rest`` takes what ``stall`` gave."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = memory("VmRSS"), time.perf_counter()
    result = stall()
    stalled = time.perf_counter() - begun
    rest(result)
    whole = time.perf_counter() - begun
    more = (memory("VmHWM") - before) / bytes_of_one
    print(
        f"{name:44} rank {rank}: stall {stalled:6.2f} s, done in {whole:6.2f} s, memory {more:5.2f} x\n",
        end="",
        flush=True,
    )


def one_process(megabytes: float, folder: Path) -> None:
    content, io, size = state(megabytes, 1), AtomicCheckpointIO(), megabytes * 1e6
    path = folder / "step=00000001.ckpt"
    measured("one file, at once", size, 0, lambda: io.save_checkpoint(content, path), lambda _: None)
    copy = HostCopy()
    for turn in ("first", "later"):
        name = f"one file, in the background ({turn})"
        measured(name, size, 0, lambda: copy(content), lambda copied: io.save_checkpoint(copied, path))


def two_ranks(megabytes: float, folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    content, size = state(megabytes, 2), megabytes * 1e6
    path, file = folder / "sharded.ckpt", folder / "full.ckpt"
    measured("two ranks, sharded, at once", size, rank, lambda: write_sharded(content, path), lambda _: None)
    copy = HostCopy()
    for turn in ("first", "later"):
        name = f"two ranks, sharded, in the background ({turn})"
        measured(name, size, rank, lambda: copy(content), lambda copied: write_sharded(copied, path))

    def write(whole: dict[str, Any]) -> None:
        if rank == 0:
            AtomicCheckpointIO().save_checkpoint(whole, file)
        dist.barrier()

    measured("two ranks, FSDP with checkpoint: full", size, rank, lambda: gathered(content, rank == 0), write)


def main(megabytes: float, folder: Path) -> None:
    torch.set_num_threads(1)

    def together() -> None:
        sharded, out = str(folder / "sharded.ckpt"), str(folder / "one.ckpt")
        measured("mmssl consolidate", megabytes * 1e6, 0, lambda: consolidate(sharded, out), id)

    jobs: list[list[Callable[[], None]]] = [
        [lambda: one_process(megabytes, folder)],
        [lambda rank=rank: two_ranks(megabytes, folder, rank) for rank in range(2)],  # type: ignore[misc]
        [together],
    ]
    for job in jobs:
        children = []
        for work in job:
            child = os.fork()
            if child == 0:
                work()
                sys.stdout.flush()
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            raise SystemExit(1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 600, Path(name))
