"""``mmssl sync``: bring what a run logged offline to Weights & Biases, start by start, in their order."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mmssl.cli.keys import UsageError
from mmssl.cli.lock import is_held
from mmssl.training.reach import why_not_online


def sync(runs: list[str], online: bool = False, dry_run: bool = False) -> None:
    """Upload the offline segments of runs to W&B, in the order in which they were written.

    Every start without W&B is a run of its own there; the starts of one folder share a group.  What was uploaded
    already is left out.  The segment that a running training still writes is left for later.

    Args:
        runs: Folders of runs.
        online: Send what online starts hold as well: for those that W&B could not take at the time.
        dry_run: Only say what would be sent.

    Raises:
        UsageError: There is no such run, no key, no server, or the server refused a segment.
    """
    waiting = [segment for folder in map(Path, runs) for segment in _segments(folder, online)]
    if not waiting:
        print("mmssl: there is nothing to upload")
        return
    if dry_run:
        for segment in waiting:
            print(f"mmssl: would upload {segment}")
        return
    if why := why_not_online():
        raise UsageError(f"cannot upload {len(waiting)} segments: {why}")
    failed = []
    for number, segment in enumerate(waiting, 1):
        problem = _upload(segment)
        if problem:
            failed.append(f"{segment}: {problem}")
        print(f"mmssl: {segment} ({number} of {len(waiting)}): {problem or 'uploaded'}", flush=True)
    if failed:
        raise UsageError(f"{len(failed)} of {len(waiting)} segments are not uploaded; run it again. First: {failed[0]}")


def _segments(folder: Path, online: bool) -> Iterator[Path]:
    """The folders of a run's segments that are to be uploaded, oldest first; the names begin with the time."""
    if not folder.is_dir():
        raise UsageError(f"there is no run at {folder}")
    found = sorted((folder / "wandb").glob("offline-run-*"), key=_begun)
    if online:
        found = sorted([*found, *(folder / "wandb").glob("run-*")], key=_begun)
    if found and is_held(folder):
        print(f"mmssl: {found.pop()} is left for later: {folder} is being trained")
    for segment in found:
        logs = list(segment.glob("*.wandb"))
        if logs and not logs[0].with_suffix(".wandb.synced").exists():
            yield segment


def _begun(segment: Path) -> str:
    return segment.name.removeprefix("offline-")


def _upload(segment: Path) -> str | None:
    """Why ``segment`` is not at W&B, or None if it is."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "WANDB_SILENT")
    }  # it says what failed
    environment["WANDB_DIR"] = str(segment.parent.parent)  # where it leaves logs of its own; else in the current folder
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(segment)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if next(segment.glob("*.wandb.synced"), None) is not None:  # wandb's own mark; its exit code is 0 either way
        return None
    said = [line.removeprefix("wandb:").strip() for line in (done.stdout + done.stderr).splitlines()]
    errors = [line.removeprefix("ERROR ") for line in said if "error" in line.lower()]
    return (errors or said or ["wandb sync said nothing"])[-1]
