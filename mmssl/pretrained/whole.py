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
    """A checkpoint could not be written, read or found.  The message says which, why and what to do.

    Attributes:
        told_by_rank_0: another process raises the same, and says it.
    """

    told_by_rank_0 = False


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def why_unreadable(error: BaseException) -> str:
    """Why ``torch.load(..., weights_only=True)`` refused a file: torch's own words advise to read it unsafely."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return f"it cannot be read safely: it holds a {named[1]}, which only code could read, and no file's code is run"
    if isinstance(error, pickle.UnpicklingError):
        return "it cannot be read safely: it is no file of torch, or holds more than tensors and plain values"
    return f"the file is damaged or cut short ({first_line(error).partition('. ')[0]})"


def damage_of(path: Path, thorough: bool = True) -> str | None:
    """Why ``path`` is not a whole checkpoint, or None when it is.

    Args:
        path: a file, or a sharded checkpoint's folder.
        thorough: read all of it, once, and compare checksums; otherwise look at what is there and how long it is, and
            of a file read what stands beside the tensors.
    """
    try:
        stat = path.stat()
    except OSError as error:
        return error.strerror or str(error)
    if path.is_dir():
        from mmssl.pretrained.sharded import damage_of_sharded  # here, for its imports take a while

        return damage_of_sharded(path, thorough)
    return _damage_of(path, stat.st_mtime_ns, stat.st_size, thorough)


@lru_cache(maxsize=32)  # one start asks twice: when it looks for the newest, and when it loads it
def _damage_of(path: Path, _mtime: int, size: int, thorough: bool) -> str | None:
    if size == 0:
        return "the file is empty"
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                return "the file is no checkpoint, or its beginning is damaged"
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip() if thorough else None
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            for name in pickles:
                archive.read(name)  # compares its checksum
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        reason = first_line(error)
        return f"the file is damaged or cut short ({'its end is missing' if 'not a zip' in reason else reason})"
    if bad is not None:
        return f"the file is damaged (wrong checksum of {bad})"
    return None if pickles else "the file is not a checkpoint"


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint, from its name or else from its content; -1 when neither tells."""
    match = _STEP.search(path.name)
    if match:
        return int(match.group(1))
    try:
        content = read_checkpoint(path, tensors=False, thorough=False)  # who takes it checks the rest of it
    except CheckpointError:
        return -1
    step = content.get("global_step", -1)
    return step if isinstance(step, int) else -1


def read_checkpoint(
    path: str | Path, tensors: bool = True, thorough: bool = True, mapped: bool = False
) -> dict[str, Any]:
    """What a checkpoint holds, a sharded one put together: tensors on the CPU and plain values, never code.

    Args:
        path: a file, or a sharded checkpoint's folder.
        tensors: False leaves the weights of a sharded checkpoint out and maps a file's into memory instead of reading
            them, for who asks only for what stands beside.
        thorough: check all of it before; False where that was done already.
        mapped: map a file's tensors into memory, which all processes of a machine share, instead of reading them.

    Raises:
        CheckpointError: it is damaged, or not to be read safely.
    """
    path = Path(path)
    if damage := damage_of(path, thorough):
        raise CheckpointError(f"cannot load {path}: {damage}; name another checkpoint")
    if path.is_dir():
        from mmssl.pretrained.sharded import read_whole, split_meta

        return read_whole(path) if tensors else split_meta(path)[0]  # both after the check above
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or not tensors)
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot load {path}: {why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot load {path}: it is no checkpoint, but a {type(content).__name__}")
    return content


def latest_checkpoint(
    folder: str | Path, say: Callable[[str], None] | None = None, set_aside: bool = False, thorough: bool = True
) -> Path:
    """The newest whole checkpoint of a run, a file or a sharded checkpoint's folder.

    Of several ranks the first one's choice counts, when they load; the others need no thorough look.

    Args:
        folder: A run folder, or its ``checkpoints`` folder.
        say: Called with one line for every damaged checkpoint that is passed over; default: standard error.
        set_aside: Rename damaged checkpoints to ``*.damaged`` so that they are out of the way; for one process alone.
        thorough: As :func:`damage_of`.

    Raises:
        CheckpointError: There is no whole checkpoint.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    folder = Path(folder)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if set_aside:
        _put_back(folder)
    # By step and name alone: another rank may rename a damaged one while this one looks.
    found = sorted(folder.glob("*.ckpt"), key=lambda path: (step_of(path), path.name), reverse=True)
    for path in found:
        damage = damage_of(path, thorough)
        if damage is None:
            return path
        say(f"mmssl: {path}: {damage}; falling back to the checkpoint before it")
        if set_aside:
            path.rename(_free_name(path.with_name(path.name + ".damaged")))
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole; start a new run")
    raise CheckpointError(f"there is no checkpoint in {folder}; without --resume mmssl fit begins at step 0")


REPLACED = ".replaced"  # where no exchange of names is to be had: what stood there, while the new one takes its place


def _put_back(folder: Path) -> None:
    """A kill between two renames left only the older one of a name: it is whole, and gets its name back."""
    for aside in folder.glob(f".*{REPLACED}"):
        path = folder / aside.name[1:].removesuffix(REPLACED)
        if not path.exists():
            aside.rename(path)


def _free_name(path: Path) -> Path:
    """``path``, or with a number behind it, where a folder of that name would be in a rename's way."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


FORMAT = 1  # of checkpoints and exports; raised when what older versions wrote reads differently


def check_format(found: Any, where: str) -> None:
    """Raises ValueError for a file that a newer version of mmssl wrote."""
    if found is not None and (not isinstance(found, int) or found > FORMAT):
        raise ValueError(
            f"{where} was written by a newer mmssl (format {found}, this one reads up to {FORMAT}); upgrade mmssl"
        )
