"""What all ranks do together: hear each other, and fail together."""

from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmssl.pretrained.whole import CheckpointError, damage_of


def hear_all(mine: Any, group: Any = None) -> list[Any]:
    """Every rank's object, by rank; all ranks of the group call this together.  One process hears itself."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return every


def fail_together(mine: str | None, group: Any = None, cause: BaseException | None = None) -> None:
    """Raise on every rank what any rank had to say: a rank that fails alone leaves the others waiting for it.

    Raises:
        CheckpointError: with the message of the first rank that has one.
    """
    raise_first(hear_all(mine, group), cause)


def raise_first(said: list[str | None], cause: BaseException | None = None) -> None:
    """The half of :func:`fail_together` behind the exchange.

    Raises:
        CheckpointError: with the first message, by rank.
    """
    for rank, message in enumerate(said):
        if message is not None:
            error = CheckpointError(message if rank == 0 or len(set(said)) == 1 else f"rank {rank}: {message}")
            error.told_by_rank_0 = dist.is_initialized() and dist.get_rank() > 0
            raise error from cause


_PATIENCE = timedelta(seconds=3)  # how far apart ranks may fail for the same reason


def rank_0_says(line: str) -> bool:
    """Whether rank 0 fails with the same line, so that this rank need not say it again.

    For an error that ends the process, and that other ranks may or may not meet as well: no collective, for those that
    do not would never answer.  Rank 0 leaves its line where the others find it, and stays until they have read it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    rank, name = dist.get_rank(), "mmssl/error"
    with suppress(RuntimeError):  # nobody comes: the others go on, or have left
        store = dist.distributed_c10d._get_default_store()
        if rank == 0:
            store.set(name, line)
            store.wait([f"{name}/{other}" for other in range(1, dist.get_world_size())], _PATIENCE)
            return False
        store.wait([name], _PATIENCE)
        same: bool = store.get(name).decode() == line
        store.set(f"{name}/{rank}", "")
        return same
    return False


def same_checkpoint(path: Path) -> Path:
    """The checkpoint that rank 0 means, for all ranks, which see it; rank 0 has read all of it to check it.

    Raises:
        CheckpointError: on every rank, if it is damaged or a rank does not see it.
    """
    path = Path(hear_all(str(path))[0])
    first = not dist.is_initialized() or dist.get_rank() == 0
    damage = damage_of(path, thorough=first)
    hint = "name another checkpoint" if first else "is the folder on a disk that all ranks see?"
    fail_together(damage and f"cannot load {path}: {damage}; {hint}")
    return path
