"""A config that changed between two starts of a run: every changed key is applied and told, or refused.

The config that the run last trained with stands in ``<run>/config.yaml``.  What is applied takes effect because the
part that it belongs to is built anew from the config at every start; optimizer and schedule, which a checkpoint would
set back, are handled by :class:`mmssl.training.changed.Changed`.
"""

import inspect
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import yaml

from mmssl.backbone import Backbone
from mmssl.cli.keys import UsageError, keys_of_class, read_yaml
from mmssl.data.datamodule import DataModule
from mmssl.data.order import choose_lanes
from mmssl.data.tokenizer import TextTokenizer
from mmssl.training.callbacks.health import Health
from mmssl.training.changed import Change, shown
from mmssl.training.checkpoint import Checkpoints
from mmssl.training.module import PretrainModule
from mmssl.training.tokenizer_file import tokenizer_of_run


class Rule(NamedTuple):
    """What a change of the keys that fit ``pattern`` means: for "applied" how, for "refused" why."""

    pattern: str
    verdict: Literal["applied", "refused", "nothing"]
    why: str


_SHAPE = "the checkpoint's weights belong to this network"
_ORDER = "it decides which samples come next, and some would be repeated and left out"
_RANDOM = "the checkpoint holds the state of the random generators"

# The first that fits counts.  Paths are those of config.yaml, without "model.init_args." and "data.init_args.".
TRAINING = (
    Rule("lr", "applied", "peak rate; the schedule stays at its place"),
    Rule("weight_decay", "applied", "in the optimizer"),
    Rule("betas", "applied", "in the optimizer; its averages go on"),
    Rule("eps", "applied", "in the optimizer"),
    Rule("warmup_steps", "applied", "the schedule is the new one from its step 0"),
    Rule("min_lr_ratio", "applied", "the schedule is the new one from its step 0"),
    Rule("clip_grad_norm", "applied", "at every step"),
    Rule("compile_blocks", "applied", "when the model is built"),
)
MODEL = (
    *TRAINING,
    Rule("backbone_options.drop_path_rate", "applied", "when the model is built"),
    Rule("backbone_options.grad_checkpointing", "applied", "when the model is built"),
    Rule("*mask_ratio", "applied", "in the loader; a moving ratio follows its new line"),
    Rule("*masking", "applied", "in the loader"),
    Rule("*_weight", "applied", "in the loss; its values do not compare with the earlier ones"),
    Rule("norm_pix_loss", "applied", "in the loss; its values do not compare with the earlier ones"),
    Rule("crop_scale", "applied", "in the loader"),
    Rule("flip", "applied", "in the loader"),
    Rule("rand_augment", "applied", "in the loader"),
    Rule("random_erasing", "applied", "in the loader"),
    Rule("pad_to_multiple_of", "applied", "in the loader"),
    Rule("mixup", "applied", "in every step"),
    Rule("cutmix", "applied", "in every step"),
    Rule("label_smoothing", "applied", "in the loss; its values do not compare with the earlier ones"),
    Rule("label_key", "applied", "in the loader"),
    Rule("layer_decay", "applied", "in the optimizer's rates"),
    Rule("drop_path_rate", "applied", "when the model is built"),
    Rule("lora_dropout", "applied", "in every step"),
    Rule("lora_rank", "refused", _SHAPE),
    Rule("lora_alpha", "refused", _SHAPE),
    Rule("embed_dim", "refused", _SHAPE),
    Rule("target", "refused", _SHAPE),
    Rule("temperature", "refused", "it is where learning began, and the checkpoint holds what was learnt"),
    Rule("init_from", "refused", "the weights come from the checkpoint, so it would be without effect"),
    Rule("backbone_weights", "refused", "the weights come from the checkpoint, so it would be without effect"),
    Rule("backbone*", "refused", _SHAPE),
    Rule("decoder_*", "refused", _SHAPE),
    Rule("vocab_size", "refused", _SHAPE),
    Rule("max_tokens", "refused", "the checkpoint has positions for texts of the old length"),
    Rule("img_size", "refused", _SHAPE),
    Rule("num_classes", "refused", _SHAPE),
    Rule("pool", "refused", _SHAPE),
    Rule("head_norm", "refused", _SHAPE),
    Rule("mode", "refused", "the optimizer's state belongs to the parameters that were trained"),
    Rule("frozen_layers", "refused", "the optimizer's state belongs to the parameters that were trained"),
)
DATA = (
    *(
        Rule(name, "applied", "if these are the same samples; else the checkpoint is refused when it is loaded")
        # The later ones are of mmssl.FilesData, which packs files into shards.
        for name in ("train", "train.*", "val_part", "image", "text", "label", "key", "folder_labels", "classes")
    ),
    *(
        Rule(name, "applied", "val/ numbers do not compare with the earlier ones")
        for name in ("val", "val.*", "val_samples")
    ),
    Rule("batch_size", "refused", _ORDER),
    Rule("lanes", "refused", _ORDER),
    Rule("seed", "refused", _ORDER),
    Rule("*", "applied", "when the loader is built"),
)
REST = (
    Rule("model.class_path", "refused", _SHAPE),
    Rule("data.class_path", "refused", _ORDER),
    Rule("seed_everything", "refused", f"{_RANDOM}, so it would be without effect"),
    Rule("trainer.accumulate_grad_batches", "refused", "the checkpoint's count of batches would not fit the windows"),
    Rule("trainer.max_steps", "applied", "the schedule ends there"),
    Rule("trainer.precision", "applied", "weights and optimizer state are kept"),
    Rule("trainer.strategy*", "applied", "the same samples; sums may differ in the last digits"),
    Rule("trainer.devices", "applied", "the same samples; sums may differ in the last digits"),
    Rule("trainer.num_nodes", "applied", "the same samples; sums may differ in the last digits"),
    Rule("trainer.accelerator", "applied", "the same samples; sums may differ in the last digits"),
    Rule("trainer.*", "applied", "by the Trainer, from now on"),
    Rule("checkpoint.*", "applied", "from the next checkpoint on"),
    Rule("run", "nothing", ""),
    Rule("resume*", "nothing", ""),
    Rule("ckpt_path", "nothing", ""),
    Rule("weights_only", "nothing", ""),
    Rule("dry_run", "nothing", ""),
    Rule("config", "nothing", ""),
)


def changes_since(folder: Path, text: str) -> list[Change]:
    """What the config ``text`` does differently from the one that the run in ``folder`` last trained with.

    Empty, too, if the folder has no config.yaml to compare with.

    Raises:
        UsageError: for the first changed key that cannot change in mid-run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    before, now = read_yaml(str(path)), yaml.safe_load(text)
    if not isinstance(before, dict) or "run" not in before:  # somebody's own file, beside a --ckpt_path
        return []
    old, new = dict(_flat(before)), dict(_flat(now))
    changes = []
    for key in [*old, *(key for key in new if key not in old)]:
        was, is_now = old.get(key), new.get(key)
        if _equal(was, is_now) or (key not in old and _is_default(key, is_now, new)) or _of_a_new_class(key, old, new):
            continue
        rule = _rule(key, now)
        if rule.verdict == "nothing" or _same_meaning(key, was, is_now, now, folder):
            continue
        if rule.verdict == "refused":
            cls, argument = _owner(key, new)
            gone = key not in new and cls is not None and argument.partition(".")[0] not in keys_of_class(cls).tree
            found = f"and this version of {cls.__name__} has no {argument}" if cls and gone else f"now {shown(is_now)}"
            back = "go on with the version that it trained with" if gone else f"set it back to {shown(was)} to go on"
            raise UsageError(
                f"{_name(key)} was {shown(was)} when this run last trained, {found}: {rule.why}; "
                f"{back}, or begin a new run{_remedy(key, folder)}"
            )
        changes.append(Change(_name(key), was, is_now, rule.why))
    return changes


def with_own_options(shape: Any, told: dict[str, Any]) -> Any:
    """The backbone's shape as a checkpoint has it, with what the config says of how it is trained."""
    own = {name: value for name, value in told.items() if name in ("drop_path_rate", "grad_checkpointing")}
    return {**shape, **own} if own else shape


def _of_a_new_class(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether ``key`` is an argument of a class in a list, such as a callback, that came or went as a whole."""
    head, bracket, rest = key.rpartition("].")
    return bool(bracket) and rest != "class_path" and ((f"{head}].class_path" in old) != (f"{head}].class_path" in new))


def _remedy(key: str, folder: Path) -> str:
    return f" with --model.init_args.init_from {folder}" if key.startswith("model.") else " with --run runs/OTHER"


def _rule(key: str, config: dict[str, Any]) -> Rule:
    section, _, name = key.partition(".init_args.")
    if section == "model" and name:
        cls = _class(config["model"]["class_path"])
        ours = cls.__module__.split(".")[0] == "mmssl"
        rules = MODEL if ours else TRAINING if issubclass(cls, PretrainModule) else ()
        named = (name,) if ours else (name.partition(".")[0],)
        own = Rule("*", "applied", f"as far as {cls.__name__} reads it from the config and not from the checkpoint")
        if name == "tokenizer":
            return Rule(name, "refused", "the weights know its words by number")
        if name == "max_tokens" and "backbone_name" in config["model"]["init_args"]:  # of fine-tuning
            return Rule(name, "applied", "in the loader; the backbone's positions stay")
        return next((r for r in rules for n in named if fnmatchcase(n, r.pattern)), own)
    if section == "data" and name:
        own = Rule("*", "applied", "as far as the data class reads it from the config and not from the checkpoint")
        return _first(DATA, name) if issubclass(_class(config["data"]["class_path"]), DataModule) else own
    if key.startswith("data.") and "class_path" not in config["data"]:
        return _first(DATA, key.removeprefix("data."))
    return _first((*REST, Rule("*", "applied", "from now on")), key)


def _first(rules: tuple[Rule, ...], name: str) -> Rule:
    return next(rule for rule in rules if fnmatchcase(name, rule.pattern))


def _same_meaning(key: str, was: Any, now: Any, config: dict[str, Any], folder: Path) -> bool:
    """Whether two different values say the same."""
    name = key.split(".")[-1]
    if key in ("data.lanes", "data.init_args.lanes"):
        data = config["data"].get("init_args", config["data"])
        size = data["batch_size"]
        return choose_lanes(size, was) == choose_lanes(size, now)
    if key == "model.init_args.tokenizer" and now is not None:
        kept = tokenizer_of_run(folder, None)
        if kept is None:
            return True  # the checkpoint's digest decides
        return TextTokenizer(now).to_json() == Path(kept).read_text(encoding="utf-8")
    if key.startswith("model.init_args.backbone_options."):  # what is left out has its default
        parameter = inspect.signature(Backbone.__init__).parameters.get(name)
        default = None if parameter is None else parameter.default
        return (default if was is None else was) == (default if now is None else now)
    return name == "class_path" and was is not None and now is not None and _class(was) is _class(now)


# ---- the configs as flat keys


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a config; classes in a list under their name instead of their number."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(v, dict) and "class_path" in v for v in value):
        for i, part in enumerate(value):
            name = part["class_path"].rpartition(".")[2]
            twins = [v for v in value[:i] if v["class_path"].rpartition(".")[2] == name]
            yield from _flat(part, f"{key}[{name}{len(twins) + 1 if twins else ''}]")
    elif isinstance(value, dict):
        yield key, None  # {} and null: nothing is set
    else:
        yield key, value


def _name(key: str) -> str:
    return key.removesuffix(".class_path") if "[" in key else key


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same; YAML takes 1e-3, without a point, for text."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, str) != isinstance(other, str) and isinstance(one, str | int | float):
        try:
            return float(one) == float(other)
        except (TypeError, ValueError):
            return False
    return bool(one == other)


def _owner(key: str, config: dict[str, Any]) -> tuple[type | None, str]:
    """The class that takes the argument ``key`` of a flat config, and the argument's name there."""
    place, of_a_class, name = key.rpartition(".init_args.")
    if of_a_class:
        path = config.get(f"{place}.class_path")
        return None if path is None else _class(path), name
    section, _, name = key.partition(".")
    return {"trainer": pl.Trainer, "data": DataModule, "checkpoint": Checkpoints, "health": Health}.get(section), name


def _is_default(key: str, value: Any, config: dict[str, Any]) -> bool:
    """Whether a key that the older config lacks has its default: another mmssl wrote that config."""
    cls, name = _owner(key, config)
    for base in inspect.getmro(cls or object):
        parameter = inspect.signature(base.__init__).parameters.get(name) if "__init__" in vars(base) else None
        if parameter is not None:
            default = parameter.default
            return _equal(list(default) if isinstance(default, tuple) else default, value)
    return value is None


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    cls: type = getattr(import_module(module), name)
    return cls
