"""Where numbers go: a CSV file in the run's folder, always, and Weights & Biases, which can never stop a run."""

import csv
import json
import os
import secrets
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only

from mmssl.training.messages import first_line, warn
from mmssl.training.reach import why_not_online

T = TypeVar("T")


class MetricsFile(Logger):
    """Metrics as rows of a CSV file: one row a step, a new column whenever a new name appears.

    A resumed run takes away the rows of the steps it does again and appends to the others.

    Args:
        path: The file, usually ``<run>/metrics.csv``.
        first_step: What is added to Lightning's count, in which the row of the first optimizer step has the number 0.
            With 1, a row's step is the number of steps that the weights have behind them, as in the progress lines
            and in the names of checkpoints.
    """

    def __init__(self, path: str | Path, first_step: int = 1) -> None:
        super().__init__()
        self.path, self.first_step = Path(path), first_step
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start: int | None = None  # where in the file the row of the current step begins
        self._dirty = False
        self._started = False
        self._broken = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    log_dir = save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        return  # config.yaml holds them

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        number = int(step or 0) + self.first_step
        self._guarded(lambda: self._log(dict(metrics), number))

    def _log(self, metrics: dict[str, float], step: int) -> None:
        if not self._started:
            self._start(step, goes_on=all(name == "epoch" or name.startswith("val/") for name in metrics))
        if self._row.get("step") != step:
            self._row, self._row_start = {}, None
        self._row.update(metrics, step=step)
        self._dirty = True

    @rank_zero_only
    def save(self) -> None:
        self._guarded(self._write)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            work()
        except OSError as error:
            self._broken = True
            warn(f"cannot write {self.path} ({error.strerror or error}); training goes on without it")

    def _start(self, step: int, goes_on: bool) -> None:
        """Take up what an earlier start of this run wrote, up to the step before ``step``.

        A run that was stopped before a validation begins with it; its numbers go on with the row of that step.
        """
        self._started = True
        if not self.path.is_file():
            return
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            self._columns = list(reader.fieldnames or [])
            rows = [row for row in reader if _as_int(row.get("step")) <= step]
        if rows and _as_int(rows[-1].get("step")) == step:
            last = rows.pop()
            if goes_on:
                self._row = {name: value for name, value in last.items() if value != ""} | {"step": step}
        self._rewrite(rows)

    def _write(self) -> None:
        """Bring the row of this step to the file; more of the same step takes its place."""
        if not self._dirty:
            return
        self._dirty = False
        if any(name not in self._columns for name in self._row) or not self.path.is_file():
            rows: list[dict[str, Any]] = []
            if self.path.is_file():
                with open(self.path, newline="") as file:
                    rows = list(csv.DictReader(file))
                if self._row_start is not None:
                    rows.pop()
            names = {*self._columns, *self._row} - {"step"}
            self._columns = ["step", *sorted(names)]
            self._rewrite(rows)
            self._row_start = None
        with open(self.path, "r+", newline="") as file:
            self._row_start = file.seek(0, os.SEEK_END) if self._row_start is None else file.seek(self._row_start)
            file.truncate()
            csv.DictWriter(file, self._columns, restval="").writerow(self._row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


class Wandb(WandbLogger):
    """Lightning's W&B logger, online if there is a key, offline if not, and silent if W&B cannot be had at all.

    ``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_ENTITY`` and ``WANDB_BASE_URL`` count as always.  Online, one id
    belongs to the run's folder (``wandb/id``) and every start goes on in it.  Offline, W&B cannot resume, so every
    start is a run of its own, and the starts of one folder share a group.

    Args:
        folder: The run's folder; ``mmssl fit`` sets it.
        project: The W&B project.
        entity: The W&B user or team; default: the key's own.
        connect_seconds: How long to try before going on offline.
        finish_seconds: How long W&B has at the end to take what it has not taken yet; less than the 30 s that SLURM
            leaves between its signals.  ``mmssl sync --online`` sends the rest.
    """

    def __init__(
        self,
        folder: str | None = None,
        project: str | None = None,
        entity: str | None = None,
        connect_seconds: float = 10.0,
        finish_seconds: float = 20.0,
    ) -> None:
        super().__init__(project=project or os.environ.get("WANDB_PROJECT") or "mmssl", save_dir=".")
        self._entity = entity
        self._connect_seconds, self._finish_seconds = connect_seconds, finish_seconds
        self._dead = False
        self._folder = Path(".")
        if folder is not None:
            self.set_folder(folder)

    def set_folder(self, folder: str | Path) -> None:
        """Say which run this is, before the first use."""
        self._folder = Path(folder)
        self._save_dir = str(folder)

    @property
    def experiment(self) -> Any:
        if rank_zero_only.rank > 0 or self._dead:  # type: ignore[attr-defined]
            return DummyExperiment()
        if self._experiment is None:
            self._experiment = self._guarded(self._start)
        return DummyExperiment() if self._experiment is None else self._experiment

    def _start(self) -> Any:
        import wandb

        mode, why = self.mode()
        if mode == "disabled":
            self._dead = True
            return None
        segments = self._folder / "wandb" / "segments.json"
        segments.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=segments.parent) as probe:  # on a full disk W&B prints hundreds of lines
            probe.write(bytes(1 << 20))
        past = _segments(segments)
        run = None
        if mode != "offline":
            try:
                run = self._init("online", self._run_id(), self._folder.name)
            except (wandb.Error, OSError, TimeoutError, ValueError) as error:
                mode, why = "offline", f"cannot connect: {first_line(error)}"
        if run is None:
            name = self._folder.name if not past else f"{self._folder.name}-{len(past) + 1}"
            run = self._init("offline", secrets.token_hex(4), name)
            print(f"mmssl: W&B is offline ({why}); upload with: mmssl sync {self._folder}", flush=True)
        _put(segments, json.dumps([*past, {"id": run.id, "mode": mode}]))
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    def _init(self, mode: str, run_id: str, name: str) -> Any:
        import wandb

        limits: dict[str, Any] = {"init_timeout": self._connect_seconds, "finish_timeout": self._finish_seconds}
        known = {k: v for k, v in limits.items() if k in wandb.Settings.model_fields}
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            id=run_id,
            name=name,
            group=self._folder.name,
            project=self._project,
            entity=self._entity or os.environ.get("WANDB_ENTITY"),
            dir=str(self._folder),
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, **known),
        )

    def _run_id(self) -> str:
        """The run's W&B id, made once and kept in its folder."""
        path = self._folder / "wandb" / "id"
        if path.is_file():
            kept = path.read_text(errors="replace").strip()
            if kept and "\ufffd" not in kept and kept.isprintable():
                return kept
            warn(f"{path} cannot be read; W&B begins another run")
        _put(path, made := secrets.token_hex(4))
        return made

    def mode(self) -> tuple[str, str]:
        """(online, offline or disabled; why not online).  Asks the server whether it is there, and starts nothing."""
        asked = os.environ.get("WANDB_MODE", "").lower()
        if asked in ("disabled", "offline", "dryrun"):
            return ("disabled" if asked == "disabled" else "offline"), f"WANDB_MODE={asked}"
        problem = why_not_online(self._connect_seconds, key_needed=asked != "online")
        return ("offline", problem) if problem else ("online", "")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        # As in metrics.csv, and as pictures are logged: the number of steps that the weights have behind them.
        number = None if step is None else step + 1
        self._guarded(lambda: super(Wandb, self).log_metrics(metrics, number))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self._guarded(lambda: super(Wandb, self).log_hyperparams(params))

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._guarded(lambda: super(Wandb, self).log_image(key, images, step, **kwargs))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            run, self._experiment, self._dead = self._experiment, None, True
            self._guarded(lambda: run.finish(exit_code=0 if status == "success" else 1))

    def _guarded(self, work: Callable[[], T]) -> T | None:
        """Do ``work``; on any failure say so once and switch W&B off."""
        if self._dead and self._experiment is not None:
            return None
        try:
            return work()
        except Exception as error:  # noqa: BLE001  W&B must never stop a run, and it raises what it likes
            self._dead, self._experiment = True, None
            warn(f"W&B is off for this run ({first_line(error)}); metrics.csv has the numbers")
            return None


def _segments(path: Path) -> list[dict[str, str]]:
    """The starts before this one; none where a machine that died left the file damaged."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else []
    except ValueError:
        found = None
    if not isinstance(found, list):
        warn(f"{path} cannot be read; W&B counts this run's starts from 1 again")
    return found if isinstance(found, list) else []


def _put(path: Path, text: str) -> None:
    """Write a small file whole or not at all: a start can be killed at any moment."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _as_int(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except ValueError:
        return 0
