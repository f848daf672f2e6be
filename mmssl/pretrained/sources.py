"""Where a pretrained backbone lies: a run, a checkpoint, a sharded checkpoint, an export, a hub.

Every kind becomes a :class:`Source`: what is needed to build the backbone, and its tensors by the backbone's own names,
read one by one as they are asked for.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmssl.data.tokenizer import TextTokenizer
from mmssl.pretrained.lora import LORA, Merged
from mmssl.pretrained.sharded import TABLE, ShardedTensors, read_meta
from mmssl.pretrained.whole import (
    CheckpointError,
    check_format,
    damage_of,
    first_line,
    latest_checkpoint,
    why_unreadable,
)

Weights = Literal["online", "ema"]
IMAGE_FILE, TEXT_FILE, CONFIG_FILE, TOKENIZER_FILE = (
    "model.safetensors",
    "text.safetensors",
    "config.json",
    "tokenizer.json",
)
TRAINED_ON = "trained_on"  # of a fine-tuned checkpoint: "image", "text" or both, its source included
_ANCHOR = "vit.patch_embed.proj.weight"  # a tensor that every backbone has
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Source:
    """A backbone on disk.

    ``tensors`` go by the names of :class:`mmssl.Backbone`; ``about`` is what is known of how they came to be, for a
    model card (objective, step, data, recipe).  ``averaged``: the run keeps an average of its weights, with which it
    validates.
    """

    where: str
    backbone: str
    options: dict[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: TextTokenizer | None
    weights: str
    about: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False

    @property
    def has_text(self) -> bool:
        return "text.position" in self.tensors


class _Part(Mapping[str, Tensor]):
    """The tensors whose names begin with ``prefix``, by what follows it."""

    def __init__(self, whole: Mapping[str, Tensor], prefix: str) -> None:
        self.whole, self.prefix = whole, prefix
        self._names = [name.removeprefix(prefix) for name in whole if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[self.prefix + name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return isinstance(name, str) and self.prefix + name in self.whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Fill ``targets`` with the tensors of their names; memory holds one more of them at a time.

    Raises:
        ValueError: a tensor in ``where`` has another shape.
        CheckpointError: a file is damaged.
    """
    prefix = ""
    while isinstance(tensors, _Part):
        prefix, tensors = tensors.prefix + prefix, tensors.whole
    if isinstance(tensors, ShardedTensors):
        for name, target in targets.items():
            _check_shape(name, tensors.entries[prefix + name].size, target, where)
        tensors.read_into({prefix + name: target for name, target in targets.items()})
        return
    for name, target in targets.items():
        tensor = tensors[prefix + name]
        _check_shape(name, tensor.shape, target, where)
        target.copy_(tensor)


def _check_shape(name: str, shape: torch.Size, target: Tensor, where: Path | str) -> None:
    if shape != target.shape:
        raise ValueError(
            f"{where}: {name} has shape {list(shape)}, the model {list(target.shape)}; another model wrote it"
        )


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each under the names of its file with a prefix before them."""

    def __init__(self, files: dict[Path, str]) -> None:
        self._places: dict[str, tuple[Any, str]] = {}
        for path, prefix in files.items():
            try:
                file = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"cannot load {path}: there is no such file; the export is not whole") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"cannot load {path}: the file is damaged or cut short ({error})") from error
            self._places |= {prefix + name: (file, name) for name in file.keys()}  # noqa: SIM118  # no mapping

    def __getitem__(self, name: str) -> Tensor:
        file, inside = self._places[name]
        tensor: Tensor = file.get_tensor(inside)
        return tensor

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def find_source(source: str | Path, weights: Weights = "online") -> Source:
    """Find out what ``source`` is, and read what is needed to build its backbone.

    Raises:
        ValueError: there is nothing at ``source``, it is nothing of mmssl's, its tokenizer is missing or another one,
            it has no such weights, or a newer mmssl wrote it.
        CheckpointError: it is damaged.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}; choose one of {', '.join(get_args(Weights))}")
    name, path = str(source), Path(source)
    if not name:
        raise ValueError("the source is empty; name a run's folder, a checkpoint, an export's folder or owner/name")
    if name.startswith("hf://") or (not path.exists() and _HUB.fullmatch(name)):
        return _read_export(fetched(name.removeprefix("hf://")), weights)
    if path.is_file():
        if path.name in (IMAGE_FILE, CONFIG_FILE):
            return _read_export(path.parent, weights)
        return _read_checkpoint(path, weights)
    if (path / CONFIG_FILE).is_file():
        return _read_export(path, weights)
    if (path / TABLE).is_file():
        return _read_sharded(path, weights)
    if (path / "checkpoints").is_dir() or any(path.glob("*.ckpt")):
        newest = latest_checkpoint(path)
        return _read_sharded(newest, weights) if newest.is_dir() else _read_checkpoint(newest, weights)
    if path.is_dir():
        raise ValueError(
            f"{path} holds neither a run (checkpoints/), nor an export ({CONFIG_FILE}), nor a sharded checkpoint "
            f"({TABLE}); name one of these, or a .ckpt file"
        )
    raise ValueError(
        f"there is no {name}; name a run's folder, a checkpoint, an export's folder or owner/name on the hub"
    )


def fetched(repository: str, **options: Any) -> Path:
    """The folder of a repository on the Hugging Face hub, downloaded unless it is in the cache.

    Args:
        options: of ``huggingface_hub.snapshot_download``, such as ``revision``.

    Raises:
        ValueError: there is no such repository, or no network.
    """
    import huggingface_hub  # here, for most sources are on the disk
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [CONFIG_FILE, IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted, **options))
    except (OSError, HFValidationError, HfHubHTTPError.__bases__[0]) as error:  # the base: its HTTP library's own
        raise ValueError(
            f"found neither a folder {repository} here nor a repository of that name on the Hugging Face hub "
            f"({first_line(error)}); check the name, and for the hub the network and your login (hf auth login)"
        ) from error


def two_sides(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of a backbone's tensors, as an export's two files hold them: (the image side by timm's names, what text adds)."""
    image, text = {}, {}
    for name, value in state.items():
        if name.startswith("vit.") and ".text_expert." not in name:
            image[name.removeprefix("vit.")] = value.contiguous()
        else:
            text[name] = value.contiguous()
    return image, text


def _read_export(folder: Path, weights: Weights) -> Source:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {folder}: {CONFIG_FILE} cannot be read ({first_line(error)})") from error
    ours = config.get("mmssl") if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(
            f"{folder} is no export of mmssl: {CONFIG_FILE} has no section 'mmssl'; init_from takes the weights' file"
        )
    check_format(ours.get("format"), str(folder))
    if lacks := {"backbone", "options", "weights", "has_text", "tokenizer_sha256", "about"} - set(ours):
        raise ValueError(f"{folder}: section 'mmssl' of {CONFIG_FILE} lacks {', '.join(sorted(lacks))}; export again")
    if ours["weights"] != weights and weights == "ema":
        raise ValueError(f"{folder} holds the {ours['weights']} weights; export the run again with --weights {weights}")
    files = {folder / IMAGE_FILE: "vit."}
    if ours["has_text"]:
        files[folder / TEXT_FILE] = ""
    tensors = SafeTensors(files)
    tokenizer = (
        _tokenizer([folder / TOKENIZER_FILE], ours["tokenizer_sha256"], str(folder)) if ours["has_text"] else None
    )
    return Source(str(folder), ours["backbone"], ours["options"], tensors, tokenizer, ours["weights"], ours["about"])


def _read_checkpoint(path: Path, weights: Weights) -> Source:
    if damage := damage_of(path):
        raise CheckpointError(f"cannot load {path}: {damage}; name another checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {path}: {why_unreadable(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{path} is no checkpoint of mmssl: it has no state_dict; for image weights see init_from")
    state = content["state_dict"]
    if (online := content.get("current_model_state")) is not None and weights == "online":
        state = online  # Lightning's WeightAveraging keeps the average in state_dict, and the weights in training here
    if online is None and weights == "ema":
        raise ValueError(f"{path} has no EMA weights: the run averaged none; leave weights at 'online'")
    return _from_lightning(path, content, state, weights, online is not None)


def _read_sharded(folder: Path, weights: Weights) -> Source:
    tensors = ShardedTensors(folder)
    content = read_meta(folder)
    beside = content.get("current_model_state") or None  # where Lightning's WeightAveraging puts it
    averaged = beside is not None or any(name.startswith("current_model_state.") for name in tensors)
    if weights == "ema" and not averaged:
        raise ValueError(f"{folder} has no EMA weights: the run averaged none; leave weights at 'online'")
    part = "current_model_state." if averaged and weights == "online" else "state_dict."
    state: Mapping[str, Tensor] = tensors
    if averaged and weights == "online" and beside is not None:
        state = beside
    elif any(name.startswith(part) for name in tensors):
        state = _Part(tensors, part)
    return _from_lightning(folder, content, state, weights, averaged)


def _from_lightning(
    path: Path, content: dict[str, Any], state: Mapping[str, Tensor], weights: Weights, averaged: bool
) -> Source:
    """A Source of what Lightning saved; the arguments of the objective say what to build."""
    check_format(content.get("mmssl_format"), str(path))
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    arguments = dict(content.get("hyper_parameters") or _init_args(folder))
    if isinstance(shape := content.get("backbone"), dict):  # a fine-tuned model, whose argument is where it came from
        arguments["backbone"] = shape["name"]
        arguments["backbone_options"] = {key: value for key, value in shape.items() if key != "name"}
    prefix = min((name.removesuffix(_ANCHOR) for name in state if name.endswith(_ANCHOR)), key=len, default=None)
    if prefix is None or not isinstance(arguments.get("backbone"), str):
        what = "tensors of a backbone" if prefix is None else "word of which backbone to build"
        raise ValueError(f"{path} is no checkpoint of mmssl: it has no {what}; for image weights see init_from")
    tensors: Mapping[str, Tensor] = _Part(state, prefix)
    if (scale := content.get(LORA)) is not None:
        tensors = Merged(tensors, scale)
    options = {k: v for k, v in (arguments.get("backbone_options") or {}).items() if k not in ("pretrained", "weights")}
    if "text.position" in tensors:
        digest = content.get("tokenizer_sha256")
        places = [folder / TOKENIZER_FILE, Path(str(arguments.get("tokenizer", TOKENIZER_FILE)))]
        tokenizer = _tokenizer(places, digest, str(path))
    else:
        tokenizer = None
    about = {
        "objective": arguments.get("_class_path") or _class_path(folder),
        "step": content.get("global_step"),
        "data": _fingerprints(content.get("DataModule")),
        "recipe": {k: v for k, v in arguments.items() if k not in ("_class_path", "_instantiator", "tokenizer")},
    }
    if TRAINED_ON in content:
        about[TRAINED_ON] = content[TRAINED_ON]
    return Source(str(path), arguments["backbone"], options, tensors, tokenizer, weights, about, averaged)


def trained_on(about: Mapping[str, Any]) -> set[str]:
    """Which of "image" and "text" a backbone was trained on, by what is known of it; both where nothing says so."""
    if (recorded := about.get(TRAINED_ON)) is not None:
        return set(recorded)
    return {"text"} if str(about.get("objective")).rpartition(".")[2] == "MLM" else {"image", "text"}


def _fingerprints(data: Any) -> dict[str, str]:
    """Of each source of the training data, what a checkpoint knows it by."""
    sources = data.get("sources", [data]) if isinstance(data, dict) else []
    return {str(s.get("name", "train")): str(s["fingerprint"]) for s in sources if "fingerprint" in s}


def _config(folder: Path) -> dict[str, Any]:
    """The model section of a run's config.yaml, if there is one."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    model = config.get("model") if isinstance(config, dict) else None
    return model if isinstance(model, dict) else {}


def _init_args(folder: Path) -> dict[str, Any]:
    return dict(_config(folder).get("init_args") or {})


def _class_path(folder: Path) -> str | None:
    return _config(folder).get("class_path")


def _tokenizer(places: list[Path], digest: str | None, where: str) -> TextTokenizer:
    """The first tokenizer.json there is, which must be the one that the weights were trained with."""
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"{where} has text weights but no tokenizer: there is no {places[0]}; put the run's tokenizer.json there"
        )
    tokenizer = TextTokenizer(path)
    if digest is not None and digest != (found := sha256(tokenizer)):
        raise ValueError(
            f"{path} is not the tokenizer of the weights in {where} (sha256 {found[:8]}, not {digest[:8]}): its ids "
            "mean other words; put the run's own tokenizer.json there"
        )
    return tokenizer


def sha256(tokenizer: TextTokenizer) -> str:
    """What a checkpoint knows its tokenizer by."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
