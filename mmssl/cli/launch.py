"""``mmssl fit | validate | test | predict``: Lightning's CLI with a strict parser and one folder per run.

A run's folder holds config.yaml, checkpoints/, metrics.csv, pictures/, wandb/.  A folder that holds a run is never
written to by another one: ``--resume`` goes on with it, from its newest whole checkpoint, or ends with an error.
"""

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mmssl.cli.cluster import fit_to_job, in_step
from mmssl.cli.devices import check_devices
from mmssl.cli.dry_run import as_dry_run, check_place
from mmssl.cli.environment import show
from mmssl.cli.extras import Started, loggers, plugins, quiet
from mmssl.cli.folder import (
    ConfigFile,
    begun,
    config_paths,
    default_run,
    is_rank_zero,
    make_folder,
    options_of,
    refuse_a_run,
    remove_empty,
    with_config_of_run,
)
from mmssl.cli.keys import Checker, UsageError, one_line, read_yaml
from mmssl.cli.lock import locked
from mmssl.cli.resume import changes_since, with_own_options
from mmssl.cli.same_start import agree_first, is_alone, say_finished
from mmssl.training import signals
from mmssl.training.callbacks.health import Health
from mmssl.training.callbacks.predictions import Predictions
from mmssl.training.callbacks.progress import Lines
from mmssl.training.callbacks.throughput import Throughput
from mmssl.training.changed import Change, Changed
from mmssl.training.checkpoint import Checkpoints, latest_checkpoint, step_of
from mmssl.training.launcher import supervise
from mmssl.training.module import PretrainModule
from mmssl.training.optim import check_trainer
from mmssl.training.preemption import Preemption
from mmssl.training.tokenizer_file import TokenizerFile, tokenizer_of_run

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": -1,  # has to be given: the schedule ends there
    "val_check_interval": 1000,  # training batches; the stream is endless, so there is no epoch to count in
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 1,
    "log_every_n_steps": 20,
    "use_distributed_sampler": False,  # the data module splits the stream over the ranks
    "enable_model_summary": False,
}


def launch(args: list[str], state: dict[str, bool]) -> None:
    """Run one of Lightning's subcommands; ``args`` begins with its name.

    ``state["building"]`` becomes False when the first batch is about to be computed.
    """
    quiet()
    sys.path.append(os.getcwd())  # so that a config can name a class of one's own beside it; last, to shadow nothing
    args = with_config_of_run(args)
    with ExitStack() as at_end:
        Launch(args, state, at_end)


class Parser(LightningArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "description": "mmssl", **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(one_line(message)) from ex


class Launch(LightningCLI):
    """One run of one subcommand."""

    def __init__(self, args: list[str], state: dict[str, bool], at_end: ExitStack) -> None:
        from mmssl.data.datamodule import DataModule

        self._args = args
        self._state, self._at_end = state, at_end
        self._changes: list[Change] = []
        self._configs = [(path, read_yaml(path)) for path in config_paths(args)]
        own_data = self._names_a_data_class()
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule if own_data else DataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": "mmssl"},
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=own_data,
            auto_configure_optimizers=False,
            args=args,
        )

    # ---- reading the config

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that runs: building Lightning's parsers is slow, and mmssl --help lists the others."""
        return {self._args[0]: LightningCLI.subcommands()[self._args[0]]}

    def _names_a_data_class(self) -> bool:
        """Whether ``data`` is written as class_path and init_args; plainly, it holds mmssl.DataModule's arguments."""
        configs = [(path, content.get("data")) for path, content in self._configs if isinstance(content, dict)]
        written = [data for _, data in configs]
        classes = [isinstance(data, str) or (isinstance(data, dict) and "class_path" in data) for data in written]
        if any(classes):
            plain = [isinstance(data, dict) and bool(data.keys() - {"class_path", "init_args"}) for data in written]
            if any(plain):
                raise UsageError(
                    f"{configs[plain.index(True)][0]} has the arguments of mmssl.DataModule as data, and "
                    f"{configs[classes.index(True)][0]} another class; put the latter's data section in the "
                    "place of the former's, in a copy of it"
                )
            return True
        return any(name == "data" and "." in (value or "") for name, value in options_of(self._args))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        from jsonargparse import ActionYesNo

        parser.add_argument("--run", type=str | None, default=None, help="The run's folder (default: runs/<config>).")
        parser.add_argument("--resume", action=ActionYesNo, default=False, help="Go on from its newest checkpoint.")
        parser.add_argument(
            "--resume_or_start", action=ActionYesNo, default=False, help="Go on if the run was begun, else start it."
        )
        parser.add_argument(
            "--dry_run",
            action=ActionYesNo,
            default=False,
            help="Try one step, say what would be trained, keep nothing.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Health, "health")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        import mmssl

        for name in mmssl.__all__ if any("." not in n for n in self._class_names()) else ():
            getattr(mmssl, name)  # a class is found by its bare name once it is imported
        bases = {"model": pl.LightningModule, "data": pl.LightningDataModule}
        checker = Checker(self._subcommand_parsers[self._args[0]], bases)
        for path, content in self._configs:
            checker.config(content, path)
        for name, value in options_of(self._args[1:]):
            if name not in ("config", "c", "print_config", "h", "help"):
                checker.option(name, value)
        if self._args[0] in ("validate", "test"):  # Lightning's table; the line of progress.py has the same numbers
            self._subcommand_parsers[self._args[0]].set_defaults(verbose=False)
        self.config = parser.parse_args(args)

    def _class_names(self) -> list[str]:
        """The classes of the model as they are written in the configs and options."""
        names = [value or "" for name, value in options_of(self._args) if name in ("model", "model.class_path")]
        for _, content in self._configs:
            model = content.get("model") if isinstance(content, dict) else None
            names.append(model if isinstance(model, str) else str((model or {}).get("class_path", ".")))
        return names

    def _parse_ckpt_path(self) -> None:
        """Not as Lightning does: its checkpoint's hyperparameters would beat what the person asks for now."""

    # ---- the run's folder

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        fit = self.subcommand == "fit"
        self.folder = Path(config.run or default_run(self._args))
        self.checkpoint: str | None = config.ckpt_path
        if self.checkpoint == "best":  # by a metric: what mmssl.training.callbacks.best keeps
            self.checkpoint = str(self.folder / "checkpoints" / "best.ckpt")
        if fit and config.trainer.max_steps < 1 and not config.trainer.fast_dev_run:
            raise UsageError(
                "trainer.max_steps must be given: the number of optimizer steps, at the end of the schedule"
            )
        if config.resume and not fit:
            raise UsageError(
                f"--resume is for mmssl fit; mmssl {self.subcommand} takes the run's newest checkpoint anyway"
            )
        if config.dry_run and not fit:
            raise UsageError(f"--dry_run is for mmssl fit; mmssl {self.subcommand} is quick enough to be tried")
        if (config.resume or config.resume_or_start) and self.checkpoint:
            raise UsageError("give --resume or --ckpt_path, not both")
        if config.dry_run:
            check_place(self.folder)
        elif fit and is_rank_zero() and (self.folder.is_dir() or not config.resume):
            self._make_folder()
            self._at_end.enter_context(locked(self.folder))
        if config.resume_or_start:
            config.resume = fit and begun(self.folder)
        if config.resume or (not fit and self.checkpoint is None):
            if not self.folder.is_dir():
                raise UsageError(f"there is no run at {self.folder}; give its folder with --run")
            first = is_rank_zero()  # whose choice counts, and who reads all of it and tells of damaged ones
            say = None if first else lambda line: None
            aside = fit and first and not config.dry_run
            self.checkpoint = str(latest_checkpoint(self.folder, say, aside, thorough=first))
        if config.ckpt_path and not Path(self.checkpoint or "").exists():
            best = "; mmssl.training.callbacks.best.Best keeps it, without --ckpt_path the newest one is taken"
            raise UsageError(f"there is no checkpoint {self.checkpoint}{best if config.ckpt_path == 'best' else ''}")
        self._finished = config.resume and 0 < config.trainer.max_steps <= step_of(Path(self.checkpoint or ""))
        if self._finished and is_alone():
            say_finished(self.folder, config.trainer.max_steps)
            raise SystemExit(0)
        fresh = fit and not (config.resume or config.resume_or_start)
        if fresh and is_rank_zero():  # the other ranks start a little later and would see rank 0's
            refuse_a_run(self.folder)
        self._resolved = self._dumped(config)
        if fit and self.checkpoint is not None:
            self._changes = changes_since(Path(self.checkpoint).parent.parent, self._resolved)
        if is_rank_zero() and not fit:
            self._make_folder()
        if in_step() and is_rank_zero():
            show()  # at the head of the batch log, from the process that trains, in its container
        fit_to_job(config.trainer, set(dict(options_of(self._args))))  # not written down: the next job may be another
        asked = {"model.tokenizer", "model.init_args.tokenizer"} & dict(options_of(self._args)).keys()
        arguments = config.model.get("init_args") or {}
        if (config.resume or not fit) and "tokenizer" in arguments and not asked:  # else the checkpoint's is compared
            arguments["tokenizer"] = tokenizer_of_run(self.folder, arguments["tokenizer"])
        if self.checkpoint is not None and "init_from" in arguments:
            arguments["init_from"] = None  # the checkpoint replaces it, and it may be gone since

        if self.checkpoint is not None and "backbone_name" in arguments:  # it holds the fine-tuned backbone whole
            from mmssl.finetune.base import without_source

            told = dict(arguments["backbone_options"] or {})
            for name, value in without_source(self.checkpoint).items():
                arguments[name] = value
            arguments["backbone_options"] = with_own_options(arguments["backbone_options"], told)

    def _make_folder(self) -> None:
        self._at_end.callback(remove_empty, make_folder(self.folder))  # behind the lock's end

    def _dumped(self, config: Any) -> str:
        """The resolved config as a later start may read it."""
        config = config.clone()
        config.run = str(self.folder)
        config.resume, config.resume_or_start, config.dry_run, config.ckpt_path = False, False, False, None
        text: str = self._parser(self.subcommand).dump(config, skip_none=False)
        return text

    # ---- the Trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        check_devices(config)
        config["plugins"] = plugins(config["plugins"])
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        if self.config[self.subcommand].dry_run:
            signals.current.uninstall()  # there is nothing to save
            scratch = Path(self._at_end.enter_context(tempfile.TemporaryDirectory()))
            config = as_dry_run({**config, "callbacks": own}, callbacks, self._changes, self.folder, scratch)
            trainer = self.trainer_class(**config)
            self._check_schedule(trainer)
            agree_first(trainer, self.folder, self.checkpoint, self._finished)
            return trainer
        config["default_root_dir"] = str(self.folder)
        config["logger"] = loggers(self.subcommand or "", self.folder, config["logger"])
        fit = self.subcommand == "fit"
        saves = fit and not config["fast_dev_run"] and config["enable_checkpointing"] is not False
        first: list[Callback] = [Throughput()] if fit else []
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in own):
            first.append(Lines())
        last: list[Callback] = [Started(self._state)]
        if fit and not config["fast_dev_run"]:
            config_now, record = yaml.safe_load(self._resolved), self.folder / "changes.jsonl"
            last += [ConfigFile(self.folder, self._resolved), TokenizerFile(self.folder)]
            last += [Changed(self._changes, config_now, record)]
        if self.subcommand == "predict" and not any(isinstance(c, Predictions) for c in own):
            last.append(Predictions())
        for callback in callbacks:
            if isinstance(callback, Health) and fit:
                first.append(callback)
            if isinstance(callback, Checkpoints) and saves:
                callback.folder = self.folder / "checkpoints"
                last += [callback, Preemption(callback)]
        if not saves:
            signals.current.uninstall()  # with nothing to save a signal ends the process, as ever
        config["callbacks"] = [*first, *own, *last]
        trainer = self.trainer_class(**config)
        supervise(trainer)
        if fit:
            self._check_schedule(trainer)
            agree_first(trainer, self.folder, self.checkpoint, self._finished)
        return trainer

    def _check_schedule(self, trainer: pl.Trainer) -> None:
        """Raises ValueError where Trainer and model do not go together: before W&B has a run of it."""
        if isinstance(self.model, PretrainModule):
            try:
                check_trainer(trainer, self.model.warmup_steps)
            except ValueError as error:
                error.told_by_rank_0 = not is_rank_zero()  # type: ignore[attr-defined]  # the same on all ranks
                raise
        if getattr(self.datamodule, "val", None) and is_rank_zero():
            tell_of_no_validation(trainer)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they are in files; keeping them would fill the memory
        return {**kwargs, "ckpt_path": self.checkpoint, "weights_only": True}


def tell_of_no_validation(trainer: pl.Trainer) -> None:
    """Say so where a run ends before its first validation."""
    interval, batches = trainer.val_check_interval, trainer.max_steps * trainer.accumulate_grad_batches
    if trainer.fast_dev_run or not trainer.limit_val_batches or not isinstance(interval, int):  # type: ignore[attr-defined]
        return
    if interval > batches > 0:
        print(
            f"mmssl: trainer.val_check_interval is {interval} batches and the run has {batches}: it ends before "
            "its first validation",
            flush=True,
        )
