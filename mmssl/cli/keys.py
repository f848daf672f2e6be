"""Configs are read strictly: every key must exist, and an error names the key, its place and the nearest valid one.

jsonargparse checks types and most keys, but it lets some mistakes through (an unknown top-level key without a value,
an abbreviated option, an empty value, arguments of a class that was replaced) and explains others in twenty lines.
So the keys are checked here first, against the same parsers, and its messages are cut down to their point.
"""

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ActionYesNo, ArgumentParser


class UsageError(Exception):
    """A mistake in the command line or in a config, said in one line."""


class OneLineParser(ArgumentParser):
    """A jsonargparse parser whose errors are one line and an exception."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: .*?(--[\w-]+)", message, re.IGNORECASE)
        if unknown:
            known = [name.lstrip("-") for name in self._option_string_actions if name.startswith("--")]
            typed = unknown.group(1).lstrip("-").replace("-", "_")
            raise UsageError(f"unknown option {unknown.group(1)}{nearest(typed, known, '--')}") from ex
        raise UsageError(one_line(message)) from ex


def nearest(word: str, valid: Iterable[str], dashes: str = "") -> str:
    """``; did you mean 'x'?``, or the valid words when none is close."""
    valid = sorted(set(valid))
    # Compare last parts, so that a long common path does not make everything look close.
    close = difflib.get_close_matches(word.rsplit(".", 1)[-1], [v.rsplit(".", 1)[-1] for v in valid], n=1)
    if close:
        return f"; did you mean {next(dashes + v for v in valid if v.rsplit('.', 1)[-1] == close[0])!r}?"
    shown = ", ".join(dashes + v for v in valid[:20]) + (", ..." if len(valid) > 20 else "")
    return f"; valid here: {shown}" if valid else ""


class Keys:
    """The keys that a parser accepts, as a tree; a leaf may hold a class of its own."""

    def __init__(self, parser: ArgumentParser) -> None:
        self.options = set(parser._option_string_actions)
        self.tree: dict[str, Any] = {}
        self.actions: dict[str, Any] = {}
        for action in parser._actions:
            if action.dest in ("help", "config", "print_config") or action.dest.endswith(".help"):
                continue
            self.actions[action.dest] = action
            node = self.tree
            for part in action.dest.split("."):
                node = node.setdefault(part, {})

    def takes_none(self, dest: str) -> bool:
        action = self.actions.get(dest)
        hint = getattr(action, "_typehint", None) or getattr(action, "type", None)
        if action is None or hint is None or action.default is None or hint in (Any, NoneType):
            return True
        return NoneType in get_args(hint) or Any in get_args(hint)


@cache
def keys_of_class(cls: type) -> Keys:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
    return Keys(parser)


class Checker:
    """Walks the configs and the options of a command in their order and remembers the class chosen for each key."""

    def __init__(self, parser: ArgumentParser, bases: Mapping[str, type]) -> None:
        self.keys = Keys(parser)
        self.bases = bases  # key -> what its class must be; a class of these may be given by its bare name
        self.classes: dict[str, type] = {}
        self.given: dict[str, dict[str, str]] = {}  # key of a class -> {argument: where it was given}

    def config(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise UsageError(f"{where} must hold keys and values, and holds {_short(content)}")
        self._mapping(content, self.keys, self.keys.tree, "", "", where)

    def option(self, name: str, value: str | None) -> None:
        """An option of the command line; ``name`` without its dashes, like ``trainer.max_steps``."""
        if f"--{name}" in self.keys.options:
            if value is not None and name in self.bases and not self.keys.tree[name]:
                self._class(name, value, f"--{name}")
            return
        parts = name.rstrip("+").removesuffix(".help").split(".")
        node: dict[str, Any] = self.keys.tree
        for depth, part in enumerate(parts):
            if part not in node:
                shown = ".".join(parts[: depth + 1])
                candidates = [".".join([*parts[:depth], key]) for key in node]
                raise UsageError(f"unknown option --{shown}{nearest(shown, candidates, '--')}")
            node = node[part]
            key = ".".join(parts[: depth + 1])
            if not node and parts[depth + 1 :] and key in self.classes:
                rest = [p for p in parts[depth + 1 :] if p != "init_args"]
                if rest:
                    self._init_arg(key, rest, f"--{name}")
                return
            if not node:
                return

    def _init_arg(self, key: str, rest: list[str], where: str) -> None:
        cls = self.classes[key]
        tree = keys_of_class(cls).tree
        self.given.setdefault(key, {})[rest[0]] = where
        for depth, part in enumerate(rest):
            if part not in tree:
                shown = ".".join([key, *rest[: depth + 1]])
                valid = [".".join([key, *rest[:depth], k]) for k in tree]
                hint = nearest(shown, valid, "--")
                raise UsageError(f"unknown option --{shown}: {cls.__name__} has no such argument{hint}")
            tree = tree[part]
            if not tree:
                return

    def _mapping(
        self, content: dict[str, Any], keys: Keys, tree: dict[str, Any], path: str, dest: str, where: str
    ) -> None:
        for key, value in content.items():
            shown = f"{path}{key}"
            if key not in tree:
                candidates = [f"{path}{valid}" for valid in tree]
                raise UsageError(f"{where}: unknown key {shown!r}{nearest(shown, candidates)}")
            self._value(value, keys, tree[key], shown, f"{dest}{key}", where)

    def _value(self, value: Any, keys: Keys, tree: dict[str, Any], path: str, dest: str, where: str) -> None:
        if isinstance(value, dict) and tree:
            self._mapping(value, keys, tree, f"{path}.", f"{dest}.", where)
        elif isinstance(value, dict) and {"class_path", "init_args"} & set(value):
            self._class_config(value, path, where)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, dict) and "class_path" in item:
                    self._class_config(item, f"{path}[{i}]", where)
        elif tree and value is not None:
            raise UsageError(f"{where}: {path} must hold keys ({', '.join(list(tree)[:6])} ...), got {_short(value)}")
        elif value is None and not tree and not keys.takes_none(dest):
            raise UsageError(f"{where}: {path} has no value; give one or take the line away")
        elif isinstance(value, str) and path in self.bases:
            self._class(path, value, where)
        elif path in self.bases and not tree and not isinstance(value, dict):
            raise UsageError(f"{where}: {path} must hold class_path and init_args, got {_short(value)}")
        elif isinstance(keys.actions.get(dest), ActionYesNo) and not isinstance(value, bool):
            raise UsageError(f"{where}: {path}: expected true or false, got {_short(value)}")

    def _class_config(self, value: dict[str, Any], path: str, where: str) -> None:
        parts = ("class_path", "init_args", "dict_kwargs")
        for key in value:
            if key not in parts:
                hint = f"; arguments of the class stand under {path}.init_args"
                raise UsageError(f"{where}: unknown key {f'{path}.{key}'!r}{hint}")
        if "class_path" in value:
            self._class(path, value["class_path"], where)
        cls = self.classes.get(path)
        init_args = value.get("init_args") or {}
        if cls is None or not isinstance(init_args, dict):
            return
        keys = keys_of_class(cls)
        for name in init_args:
            if name not in keys.tree:
                raise UsageError(
                    f"{where}: unknown key '{path}.init_args.{name}': {cls.__name__} has no argument "
                    f"{name!r}{nearest(name, keys.tree)}"
                )
            self.given.setdefault(path, {})[name] = where
            self._value(init_args[name], keys, keys.tree[name], f"{path}.init_args.{name}", name, where)

    def _class(self, path: str, class_path: Any, where: str) -> None:
        cls = _find_class(class_path, path, where, self.bases.get(path))
        if cls is None:
            return
        before = self.classes.get(path)
        self.classes[path] = cls
        if before is None or before is cls:
            return
        # jsonargparse would drop these with a warning, and the run would not be what the files say.
        for name, origin in self.given.get(path, {}).items():
            if name not in keys_of_class(cls).tree:
                raise UsageError(
                    f"{where}: {path} changes from {before.__name__} to {cls.__name__}, which has no argument {name!r} "
                    f"(set in {origin}); start from a config of {cls.__name__}, or take {name!r} out"
                )


def _find_class(class_path: Any, path: str, where: str, base: type | None) -> type | None:
    """The class that a name means; None for a bare name that only jsonargparse can tell."""
    if not isinstance(class_path, str):
        raise UsageError(f"{where}: {path}.class_path must be a name such as mmssl.MMM, got {_short(class_path)}")
    if "." not in class_path:
        if base is None:
            return None
        known = {cls.__name__: cls for cls in _subclasses(base) if not cls.__name__.startswith("_")}
        if class_path not in known:
            hint = nearest(class_path, [n for n, cls in known.items() if not cls.__module__.startswith("lightning")])
            raise UsageError(f"{where}: {path}: there is no class {class_path!r}{hint}")
        return known[class_path]
    module_name, name = class_path.rsplit(".", 1)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise
        raise UsageError(f"{where}: {path}: there is no module {error.name!r} to import {class_path!r} from") from error
    found = getattr(module, name, None)
    if found is None:
        classes = {n: c for n in dir(module) if isinstance(c := getattr(module, n, None), type)}
        valid = [n for n, c in classes.items() if base is None or issubclass(c, base)]
        raise UsageError(f"{where}: {path}: {module_name} has no class {name!r}{nearest(name, valid)}")
    return found if isinstance(found, type) else None


def _subclasses(cls: type) -> set[type]:
    found = {cls}
    direct: type
    for direct in cls.__subclasses__():
        found |= _subclasses(direct)
    return found


def read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from error


_KEY = re.compile(r'Parser key "([^"]+)":')
_EXPECTED = re.compile(r"Expected an? (.+?)\.? Got value: (.+)")


def one_line(message: str) -> str:
    """The point of one of jsonargparse's messages."""
    words = message.split()
    if words[:2] == ["unrecognized", "arguments:"] and (len(words) > 3 or message.endswith(".tar")):
        more = " ..." if len(words) > 5 else ""
        return f"{' '.join(words[:5])}{more}; put quotes around patterns, so that the shell leaves them whole"
    required = re.search(r"the following arguments are required: (.+)", message, re.IGNORECASE)
    if required:
        names = ", ".join(re.sub(r"^(fit|validate|test|predict)\.", "", n) for n in required.group(1).split(", "))
        return f"{names} must be given"
    unknown = re.search(r"does not accept option '([^']+)'", message)
    if unknown:
        return f"unknown key {unknown.group(1)!r}"
    key = ".".join(_KEY.findall(message)[:2])
    prefix = f"{key}: " if key else ""
    given = re.search(r"Given value: (.+)", message)
    expected = _EXPECTED.search(message)
    if expected:
        return f"{prefix}expected {_type_name(expected.group(1))}, got {expected.group(2).strip()!r}"
    body = _KEY.sub("", message).split("Given value type:")[0]
    points = [p.strip() for p in re.findall(r"^\s+- (.+(?:\n\s{6,}.+)*)", body, re.MULTILINE)]
    points = [
        p for p in points if "NoneType" not in p and "Not a valid subclass" not in p and "either not acc" not in p
    ]
    inner = next((p for p in points or [body.strip()] if re.match(r"[\w.]+: expected ", p)), None)
    if inner is not None:  # an argument of a class, told by a parser of its own
        return f"{key}.{inner}" if key else inner
    types = [_type_name(m.group(1)) for p in points if (m := re.fullmatch(r"Expected an? (.+)", p))]
    if points and len(types) == len(points):
        return f"{prefix}expected {' or '.join(types)}, got {given.group(1) if given else '?'}"
    return prefix + " ".join(("; ".join(dict.fromkeys(points)) or body).split())


def _type_name(text: str) -> str:
    if choice := re.fullmatch(r"typing\.Literal\[(.+)\]", text):
        return "one of " + choice[1].replace("'", "")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
