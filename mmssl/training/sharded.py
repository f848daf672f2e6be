"""Sharded checkpoints, written by all ranks together: a folder with a file of each rank's, whole or absent.

    step=00001000.ckpt/
      __0_0.distcp ...   every rank's part of the tensors, as torch.distributed.checkpoint writes it
      .metadata          its table of contents
      meta.pt            everything else (loops, schedules, random generators, hyperparameters), and each tensor's place
      checksums.json     size and CRC-32 of each of these files

It is written under a temporary name beside its place and renamed by rank 0 when every rank's part is on the disk.
Every step of that is agreed on, so what fails on one rank fails on all, and none waits for one that gave up.
"""

import json
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmssl.pretrained.sharded import CHECKSUMS, META, PLACES, TABLE, checksum, read_table
from mmssl.pretrained.whole import CheckpointError, first_line
from mmssl.training.in_place import put_in_place, sync_folder, why_not_plain, why_not_written, write_plain
from mmssl.training.together import hear_all, raise_first

# What is distributed even where a rank holds it whole: the rest is rank 0's, in META.
DISTRIBUTED = ("state_dict", "current_model_state", "optimizer_states")
SECONDS_TO_APPEAR = 15  # until a file that another node wrote is seen through a network file system's cache
T = TypeVar("T")


def write_sharded(content: dict[str, Any], path: Path, group: Any = None) -> None:
    """Write a checkpoint whose tensors are spread over the ranks; all ranks of ``group`` call this together.

    Args:
        content: what Lightning puts together on each rank; sharded tensors are DTensors.
        path: the folder, the same on all ranks and on a disk that all of them see.
        group: a process group for CPU tensors (gloo) that nobody else uses meanwhile.

    Raises:
        CheckpointError: on every rank, if it could not be written on any.  What stood at ``path`` is still there.
    """
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    temporary = _begun(path, group)
    try:
        parts: list[Any] = []
        _all_or_none(path, group, lambda: parts.extend(split(content)))
        meta, tensors = parts
        _all_or_none(path, group, lambda: _write_part(tensors, temporary, group))
        listed = _all_or_none(path, group, lambda: _finish_part(meta, temporary, rank))
        _all_or_none(path, group, lambda: _commit(listed, temporary, path) if rank == 0 else None)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(a copy of the containers without the distributed tensors but with their places, those tensors by name)."""
    places: dict[str, list[Any]] = {}
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, place: list[Any]) -> Any:
        if isinstance(value, Tensor) and (isinstance(value, DTensor) or (place and place[0] in DISTRIBUTED)):
            name = ".".join(map(str, place))
            if name in tensors:
                raise CheckpointError(f"cannot save: two tensors go by the name {name}")
            places[name], tensors[name] = place, value.detach()
            return None
        if isinstance(value, dict):
            inner = {key: walk(item, [*place, key]) for key, item in value.items()}
            return {key: item for key, item in inner.items() if ".".join(map(str, [*place, key])) not in tensors}
        if isinstance(value, list):
            return [walk(item, [*place, number]) for number, item in enumerate(value)]
        return value

    meta = walk(content, [])
    return {**meta, PLACES: places}, tensors


def _begun(path: Path, group: Any) -> Path:
    """A fresh folder beside ``path``, by rank 0's choice."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")

    def make() -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return str(temporary)

    first = not dist.is_initialized() or dist.get_rank(group) == 0
    return Path(_all_or_none(path, group, lambda: make() if first else "")[0])


def _all_or_none(path: Path, group: Any, work: Callable[[], T]) -> list[T]:
    """What ``work`` gave on every rank; if it failed on one, all raise."""
    result, message, cause = None, None, None
    try:
        result = work()
    # Whatever it is: the others wait to be told, and all raise it below.  torch's own is no Exception.
    except (Exception, dcp.api.CheckpointException) as error:  # noqa: BLE001
        message, cause = _why(error, path), error
    heard = hear_all((message, result), group)
    raise_first([said for said, _ in heard], cause)
    return [found for _, found in heard]


def _why(error: BaseException, path: Path) -> str:
    failures = getattr(error, "failures", None)  # of torch's, by rank
    if failures:
        rank = min(failures)
        return _why(failures[rank][0], path) + (f" (rank {rank})" if len(failures) == 1 else "")
    if isinstance(error, CheckpointError):
        return first_line(error)
    if isinstance(error, pickle.PickleError):
        return why_not_plain(error, path)
    if not isinstance(error, OSError | RuntimeError | ValueError):  # not the disk's doing
        return f"cannot save {path}: {type(error).__name__}: {first_line(error)}"
    return (
        f"cannot save {path}: {why_not_written(error)}; earlier checkpoints are untouched, "
        "free some space or make the folder writable, then go on with --resume"
    )


def _write_part(tensors: dict[str, Tensor], temporary: Path, group: Any) -> None:
    dcp.save(
        tensors,
        storage_writer=dcp.FileSystemWriter(temporary),
        # What all ranks hold is rank 0's: as in a single file, should it differ.
        planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        process_group=group,
        no_dist=not dist.is_initialized(),
    )


def _finish_part(meta: dict[str, Any], temporary: Path, rank: int) -> dict[str, list[int]]:
    """Checksums of the files that this rank wrote, read back from the disk's cache."""
    own = list(temporary.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        write_plain(meta, temporary / META)
        read_table(temporary)
        own += [temporary / META, temporary / TABLE]
    return {path.name: checksum(path) for path in own}


def _commit(listed: list[dict[str, list[int]]], temporary: Path, path: Path) -> None:
    files = {name: value for part in listed for name, value in part.items()}
    until = time.monotonic() + SECONDS_TO_APPEAR
    while missing := [name for name, (size, _) in files.items() if _size(temporary / name) != size]:
        if time.monotonic() > until:
            raise OSError(f"rank 0 does not see {missing[0]} of another rank; is the folder on a shared disk?")
        time.sleep(0.1)
    with open(temporary / CHECKSUMS, "w") as file:
        json.dump({"crc32": "of each file: [bytes, CRC-32]", "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    put_in_place(temporary, path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
