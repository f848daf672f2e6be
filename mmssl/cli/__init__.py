"""The ``mmssl`` command: which subcommands there are, and what a person sees when something is wrong.

Nothing here imports torch, so that ``mmssl --help`` is quick; a subcommand imports what it needs when it runs.

What becomes one line and exit code 2 instead of a traceback:

- while a run is being built: ValueError, OSError and Lightning's MisconfigurationException, because that is what
  constructors raise for a value, a file or a combination that cannot be;
- at any time: the exceptions that mmssl defines itself.

Everything else is a bug and keeps its traceback.  ``MMSSL_TRACEBACK=1`` shows the traceback of every error.
"""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import docstring_parser
from jsonargparse import ActionYesNo

from mmssl.cli.cluster import note_saved
from mmssl.cli.keys import OneLineParser, UsageError, nearest
from mmssl.training import signals


class Command(NamedTuple):
    """A subcommand: its line in the help, and the function behind it as ``module:function`` (None: Lightning's)."""

    help: str
    function: str | None = None


# A function's required parameters become positional arguments, the others --options; ``shards``, ``sources`` and
# ``runs`` take any number and make the others options; a bool becomes --name and --no_name.  A new command is a line.
COMMANDS = {
    "fit": Command("train: mmssl fit --config C.yaml [--run runs/NAME] [--resume] [--key value ...]"),
    "validate": Command("measure a run on its validation data: mmssl validate --run runs/NAME"),
    "test": Command("measure a run on its test data: mmssl test --run runs/NAME"),
    "predict": Command("write a run's guesses to its folder: mmssl predict --run runs/NAME"),
    "submit": Command("train on a SLURM cluster: mmssl submit C.yaml [--nodes N] [options]", "mmssl.cli.submit:main"),
    "export": Command("write a backbone for timm and load_backbone: mmssl export RUN --out DIR", "mmssl.export:export"),
    "report": Command("print and save what a run has learnt: mmssl report runs/NAME", "mmssl.report:report"),
    "consolidate": Command(
        "one file of a sharded checkpoint: mmssl consolidate RUN --out FILE.ckpt", "mmssl.cli.consolidate:consolidate"
    ),
    "env": Command("what a run stands on: versions, GPUs, SLURM and NCCL variables", "mmssl.cli.environment:show"),
    "sync": Command("upload what a run logged offline to W&B: mmssl sync runs/NAME [...]", "mmssl.cli.sync:sync"),
    "tokenizer train": Command("train a tokenizer on text", "mmssl.data.tokenizer:train_from_shards"),
    "shards index": Command("index tar shards before training", "mmssl.cli.shards:index"),
    "shards check": Command("read all of tar shards and report what is bad", "mmssl.cli.shards:check"),
    "shards write": Command("make shards from folders, CSV, JSONL or Parquet", "mmssl.cli.write:write"),
    "shards stats": Command("count and measure what shards hold", "mmssl.cli.shards:stats"),
}


_TOGETHER = "mmssl.training.together"  # which imports torch: where it is not imported, there are no ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 finished, 1 a bug (with traceback) or bad samples found by ``shards check``, 2 something to correct,
    75 preempted and saved, 130 Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    state = {"building": True}
    try:
        return _run(args, state)
    except KeyboardInterrupt:
        print("mmssl: interrupted", file=sys.stderr)
        return signals.EXIT_INTERRUPTED
    except SystemExit as stop:
        return _exit_code(stop)
    except Exception as error:
        if signals.current.phase == "starting" and signals.current.preempted:
            # Another rank or a process of a pool left first; what failed here failed because of that.
            signals.keep_exit_code()
            return _exit_code(signals.NothingBegun(signals.current.name))
        if os.environ.get("MMSSL_TRACEBACK") == "1":
            raise
        line = _for_a_person(error, state["building"])
        if line is None:
            raise
        told = getattr(error, "told_by_rank_0", False)  # what all ranks raised together is said once
        if not told and not (_TOGETHER in sys.modules and sys.modules[_TOGETHER].rank_0_says(line)):
            print(f"mmssl: error: {line}", file=sys.stderr, flush=True)
        return 2


def _run(args: list[str], state: dict[str, bool]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] == "--version":
        from mmssl import __version__

        print(f"mmssl {__version__}")
        return 0
    family = [name for name in COMMANDS if name.startswith(args[0] + " ")]
    if family and args[0] not in COMMANDS and args[1:2] and args[1] in ("-h", "--help", "help"):
        print("\n".join([f"usage: mmssl {args[0]} COMMAND ...", "", *_listed(family)]))
        return 0
    name, rest = _split(args)
    function = COMMANDS[name].function
    if function is None:
        with signals.handled() if name == "fit" else nullcontext():
            from mmssl.cli.launch import launch

            launch([name, *rest], state)
    else:
        _call(name, function, rest)
    return 0


def _split(args: list[str]) -> tuple[str, list[str]]:
    """The command, of one word or two, and its arguments."""
    for words in (2, 1):
        name = " ".join(args[:words])
        if name in COMMANDS:
            return name, args[words:]
    family = [name for name in COMMANDS if name.startswith(args[0] + " ")]
    if family:
        kinds = [name.split()[1] for name in family]
        typed = f", not {args[1]!r}{nearest(args[1], kinds)}" if args[1:] else ""
        raise UsageError(f"mmssl {args[0]} needs one of: {', '.join(kinds)}{typed}")
    raise UsageError(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}; mmssl --help lists all")


def _call(name: str, target: str, args: list[str]) -> None:
    """Run a plain function with its parameters read from the command line."""
    module, attribute = target.split(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), attribute)
    if list(inspect.signature(function).parameters) == ["args"]:  # it reads its command line itself
        function(args)
        return
    text = docstring_parser.parse(function.__doc__ or "")
    described = {parameter.arg_name: parameter.description for parameter in text.params}
    parser = OneLineParser(prog=f"mmssl {name}", description=f"{text.short_description}\n{text.long_description or ''}")
    parameters = inspect.signature(function).parameters
    many = next((parameter for parameter in parameters if parameter in ("shards", "sources", "runs")), None)
    flags = [parameter for parameter in parameters.values() if parameter.annotation is bool]
    skip: set[str | int] = {flag.name for flag in flags}
    if many is not None:
        skip.add(many)
    parser.add_function_arguments(
        function, as_group=False, as_positional=many is None, fail_untyped=False, skip=skip or None
    )
    for flag in flags:
        parser.add_argument(f"--{flag.name}", action=ActionYesNo, default=flag.default, help=described.get(flag.name))
    if many is not None:  # what a shell makes of data/*.tar
        parser.add_argument(many, type=str, nargs="+", help=described.get(many))
    values = parser.instantiate_classes(parser.parse_args(args))
    function(**{key: value for key, value in values.items() if key not in ("config", "__path__")})


def _help() -> str:
    return "\n".join(
        [
            "mmssl: masked self-supervised pretraining on text, images and image-text pairs",
            "",
            "usage: mmssl COMMAND ...",
            "",
            *_listed(list(COMMANDS)),
            "",
            "mmssl COMMAND --help lists a command's options, mmssl fit --config C.yaml --print_config the resolved",
            "config, mmssl --version the version; MMSSL_TRACEBACK=1 shows where an error comes from.",
        ]
    )


def _listed(names: list[str]) -> list[str]:
    width = max(map(len, names))
    return [f"  {name:<{width}}  {COMMANDS[name].help}" for name in names]


def _exit_code(stop: SystemExit) -> int:
    line = getattr(stop, "line", "")  # a Preempted, whose class lives behind an import of torch, or a NothingBegun
    if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns a second Ctrl-C into exit code 1
        line, stop.code = getattr(stop.__context__, "line", "interrupted, nothing saved"), signals.EXIT_INTERRUPTED
    if stop.code == signals.EXIT_PREEMPTED and getattr(stop, "checkpoint", None):
        note_saved(stop.checkpoint)  # type: ignore[attr-defined]
    if line:
        print(f"mmssl: {line}", file=sys.stderr, flush=True)
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _for_a_person(error: Exception, building: bool) -> str | None:
    """The one line for an error that a person can correct; None for a bug."""
    while "Union subtypes" in str(error) and isinstance(error.__cause__ or error.__context__, Exception):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # what a constructor said
    # A loader worker's exception comes back as the same type with the worker's traceback for a message.
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split(": ", 1)[-1]
    if type(error).__module__.split(".")[0] == "mmssl":
        return _joined(text)
    if text.startswith("Error(s) in loading state_dict"):
        return "the checkpoint does not fit the model; was the config changed since? " + _joined(text)[:300]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if not building or not kinds & {"ValueError", "OSError", "MisconfigurationException"}:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and f"{os.sep}mmssl{os.sep}" in frames[-1].filename
    hint = "" if ours else f" ({type(error).__name__}; MMSSL_TRACEBACK=1 shows where)"
    return (_joined(text) or type(error).__name__) + hint


def _joined(text: str) -> str:
    return " ".join(text.split())
