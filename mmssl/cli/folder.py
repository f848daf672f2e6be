"""The run's folder: which one the command line means, whether it may be written to, and its config.yaml."""

import tempfile
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from mmssl.cli.cluster import array_task
from mmssl.cli.keys import UsageError

# ---- the command line


def options_of(args: list[str]) -> list[tuple[str, str | None]]:
    """The options as (name without dashes, value or None)."""
    found: list[tuple[str, str | None]] = []
    for i, arg in enumerate(args):
        if not arg.startswith("-") or arg in ("-", "--") or arg[1:2].isdigit():
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        following = args[i + 1] if i + 1 < len(args) and not args[i + 1].startswith("--") else None
        found.append((name, value if equals else following))
    return found


def config_paths(args: list[str]) -> list[str]:
    return [value for name, value in options_of(args) if name in ("config", "c") and value]


def default_run(args: list[str]) -> str:
    """``runs/<config>``; each task of a job array has a folder of its own."""
    paths = config_paths(args)
    task = array_task()
    return f"runs/{Path(paths[0]).stem if paths else 'unnamed'}{'' if task is None else '-' + task}"


def with_config_of_run(args: list[str]) -> list[str]:
    """``--run runs/NAME`` without ``--config`` takes the config that the run was started with."""
    if config_paths(args):
        return args
    options = dict(options_of(args))
    run = options.get("run")
    if not run or options.keys() & {"h", "help"}:
        return args
    config = Path(run) / "config.yaml"
    if config.is_file():
        return [args[0], "--config", str(config), *args[1:]]
    if not any(name.split(".")[0] == "model" for name in options):
        problem = f"the run at {run} has no config.yaml" if Path(run).is_dir() else f"there is no run at {run}"
        new = ", or a new run's config with --config" if args[0] == "fit" else ""
        raise UsageError(f"{problem}; give a run's folder with --run{new}")
    return args


# ---- on the disk


def is_rank_zero() -> bool:
    return rank_zero_only.rank in (None, 0)  # type: ignore[attr-defined]


def refuse_a_run(folder: Path) -> None:
    if not folder.is_dir():
        return
    checkpoints = [p for p in (folder / "checkpoints").glob("*") if not p.name.endswith(".tmp")]
    if checkpoints or (folder / "metrics.csv").exists():
        saved = f"with {len(checkpoints)} checkpoints" if checkpoints else "without a checkpoint"
        remedy = "--resume goes on with it, " if checkpoints else ""
        raise UsageError(f"{folder} already holds a run ({saved}); {remedy}--run runs/OTHER starts a new one")


def begun(folder: Path) -> bool:
    """Whether the run in ``folder`` has a checkpoint to go on from, as ``--resume_or_start`` asks.

    False as well for a run that was killed before its first one, which then starts again; it is told.

    Raises:
        UsageError: There were checkpoints, and all of them are damaged: no reason to start afresh unasked.
    """
    checkpoints = [p for p in (folder / "checkpoints").glob("*.ckpt*") if not p.name.startswith(".")]
    whole = [p for p in checkpoints if p.name.endswith(".ckpt")]
    if checkpoints and not whole:
        raise UsageError(
            f"the {len(checkpoints)} checkpoints of {folder} are all damaged; "
            "start another run with --run, or remove this one's folder to start it again"
        )
    if not checkpoints and (folder / "metrics.csv").exists() and is_rank_zero():
        print(f"mmssl: {folder} was stopped before its first checkpoint; it starts again from step 0", flush=True)
    return bool(whole)


def make_folder(folder: Path) -> list[Path]:
    """Make a run's folder, or see that it can be written to; returns what was made, the innermost first."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot write to the run's folder {folder}: {reason}; give another one with --run") from error
    return new


def remove_empty(made: list[Path]) -> None:
    """Take back what :func:`make_folder` made, as far as nothing lies in it: a start that was refused left nothing."""
    for folder in made:
        with suppress(OSError):  # something lies there
            folder.rmdir()


class ConfigFile(Callback):
    """Writes config.yaml when training starts; an earlier start's that differs stays as config.1.yaml, ...

    Not before: what a start failed on would otherwise be in the way of the next one.
    """

    def __init__(self, folder: Path, text: str) -> None:
        self._folder, self._text = folder, text

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self._folder / "config.yaml"
        if not trainer.is_global_zero or (path.is_file() and path.read_text() == self._text):
            return
        if path.is_file():
            number = 1
            while (self._folder / f"config.{number}.yaml").exists():
                number += 1
            path.rename(self._folder / f"config.{number}.yaml")
        path.write_text(self._text)
