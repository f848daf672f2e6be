"""A file or a folder takes another one's place at once: there is no moment at which neither stands there whole."""

import ctypes
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from mmssl.pretrained.whole import REPLACED, first_line

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def put_in_place(new: Path, path: Path) -> None:
    """Rename ``new``, which lies in the same folder and is synced, to ``path``; what stood there goes.

    Raises:
        OSError: as of a rename.  What stood at ``path`` is still there.
    """
    if not path.exists() or not (path.is_dir() or new.is_dir()):
        os.replace(new, path)
    elif exchange(new, path):
        remove(new)
    else:
        # Network file systems know no exchange.  A kill between the two renames leaves the older one under a name from
        # which mmssl.pretrained.whole.latest_checkpoint takes it back.
        aside = path.with_name(f".{path.name}{REPLACED}")
        remove(aside)
        os.rename(path, aside)
        os.rename(new, path)
        remove(aside)
    sync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    result: int = library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0


def remove(path: Path) -> None:
    """Remove a checkpoint.  A folder loses its name first, so that no half of it is ever found under that name."""
    try:
        if path.is_dir() and not path.is_symlink():
            gone = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.gone.tmp")
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        return  # it is gone, or cannot go; neither is worth stopping a run


def write_plain(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain Python values, synced, and look whether they can be read again.

    Raises:
        pickle.PickleError: there is another value in it.
        OSError, RuntimeError: it could not be written.
    """
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except (AttributeError, TypeError) as error:  # of a closure, of a lock
            raise pickle.PicklingError(first_line(error)) from error
        file.flush()
        os.fsync(file.fileno())
    # Memory-mapped, so this reads the pickle alone: a value that weights_only refuses shows now, not on resume.
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def why_not_plain(error: pickle.PickleError, path: Path) -> str:
    """What a person is told of a value that :func:`write_plain` refuses, in one line."""
    return (
        f"cannot save {path}: a value in it is neither a tensor nor plain Python ({first_line(error)}); "
        "look for a Path or an object among the hyperparameters and the states of modules and callbacks"
    )


def why_not_written(error: BaseException) -> str:
    """What a person is told of a failed write, in one line."""
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, OSError):
            return told.strerror or first_line(told)
        told = told.__cause__ or told.__context__
    if "inline_container" in str(error):  # torch's writer of archives, which only counts that bytes are missing
        return "it could not be written to its end (disk full, or a quota or limit reached?)"
    return first_line(error)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
