"""``mmssl consolidate RUN|CHECKPOINT --out FILE.ckpt``: one file of a sharded checkpoint, which goes on anywhere."""

from pathlib import Path

from mmssl.cli.keys import UsageError
from mmssl.pretrained.sharded import TABLE
from mmssl.pretrained.whole import CheckpointError, latest_checkpoint, read_checkpoint, step_of
from mmssl.training.in_place import why_not_written
from mmssl.training.saving import AtomicCheckpointIO


def consolidate(checkpoint: str, out: str = "") -> None:
    """Put a sharded checkpoint together to one file, as one process would have written it.

    Takes as much memory as the checkpoint has bytes.  No rank and no GPU is needed.

    Args:
        checkpoint: a sharded checkpoint's folder, or a run's folder, whose newest whole checkpoint is meant.
        out: the file to write; must not exist.

    Raises:
        UsageError: ``out`` is missing or exists, or the checkpoint is one file already.
        CheckpointError: there is no checkpoint, it is damaged, or ``out`` cannot be written.
    """
    if not out:
        raise UsageError("where to is not said; give --out FILE.ckpt, a file that does not exist yet")
    target = Path(out)
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists, and nothing is overwritten; remove it, or give another --out")
    path = Path(checkpoint)
    if not path.exists():
        raise UsageError(f"there is no {path}; give a run's folder or a sharded checkpoint's")
    if path.is_dir() and not (path / TABLE).is_file():
        if not any(path.glob("*.ckpt")) and not any(path.glob("checkpoints/*.ckpt")):
            raise UsageError(f"{path} holds no checkpoint; give a run's folder that has one, or a sharded checkpoint's")
        path = latest_checkpoint(path)
    if path.is_file():
        raise UsageError(f"{path} is one file already, which goes on anywhere")
    content = read_checkpoint(path)
    try:
        AtomicCheckpointIO().save_checkpoint(content, target)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot write {target}: {why_not_written(error.__cause__ or error)}; see to space and rights there, "
            "or give another --out"
        ) from error
    print(f"{target}: step {step_of(path)} of {path}, {target.stat().st_size / 1e6:.1f} MB in one file")
