"""Which checkpoint is whole, and which is the newest: what training and loading both ask of files.

Without Lightning, so that a backbone can be loaded where it is not installed.
"""

import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_STEP = re.compile(r"step=(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or found.  The message says which, why and what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def damage_of(path: Path) -> str | None:
    """Why ``path`` is not a whole checkpoint, or None when it is.  Reads the whole file, once."""
    try:
        stat = path.stat()
    except OSError as error:
        return error.strerror or str(error)
    if path.is_dir():
        from mmssl.pretrained.sharded import damage_of_sharded  # here, for its imports take a while

        return damage_of_sharded(path)
    return _damage_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=32)  # one start asks twice: when it looks for the newest, and when it loads it
def _damage_of(path: Path, _mtime: int, size: int) -> str | None:
    if size == 0:
        return "the file is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        return f"the file is damaged or cut short ({first_line(error)})"
    if bad is not None:
        return f"the file is damaged (wrong checksum of {bad})"
    return None if any(name.endswith("data.pkl") for name in names) else "the file is not a checkpoint"


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint, from its name or else from its content; -1 when neither tells."""
    match = _STEP.search(path.name)
    if match:
        return int(match.group(1))
    if damage_of(path):
        return -1
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError):
        return -1
    return int(content.get("global_step", -1)) if isinstance(content, dict) else -1


def latest_checkpoint(folder: str | Path, say: Callable[[str], None] | None = None, set_aside: bool = False) -> Path:
    """The newest whole checkpoint of a run.

    Args:
        folder: A run folder, or its ``checkpoints`` folder.
        say: Called with one line for every damaged checkpoint that is passed over; default: standard error.
        set_aside: Rename damaged checkpoints to ``*.damaged`` so that they are out of the way.

    Raises:
        CheckpointError: There is no whole checkpoint.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    folder = Path(folder)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    # By step and name alone: another rank may rename a damaged one while this one looks.
    found = sorted(folder.glob("*.ckpt"), key=lambda path: (step_of(path), path.name), reverse=True)
    for path in found:
        damage = damage_of(path)
        if damage is None:
            return path
        say(f"mmssl: {path}: {damage}; falling back to the checkpoint before it")
        if set_aside:
            path.rename(path.with_name(path.name + ".damaged"))
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole; start a new run")
    raise CheckpointError(f"there is no checkpoint in {folder}; start without --resume, under another name")


FORMAT = 1  # of checkpoints and exports; raised when what older versions wrote reads differently


def check_format(found: Any, where: str) -> None:
    """Raises ValueError for a file that a newer version of mmssl wrote."""
    if found is not None and (not isinstance(found, int) or found > FORMAT):
        raise ValueError(
            f"{where} was written by a newer mmssl (format {found}, this one reads up to {FORMAT}); upgrade mmssl"
        )
