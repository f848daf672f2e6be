"""Starting pretraining from weights that are there: what is taken, what is resized, what is new.

From another run of mmssl (any source of :func:`mmssl.load_backbone`), with another picture size, tokenizer, text length
or depth; or from a file with a vision transformer's weights alone, such as timm's and facebookresearch/mae's
({"model": ...}).
"""

import argparse
import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmssl.backbone import Backbone
from mmssl.data.tokenizer import TextTokenizer
from mmssl.pretrained.sources import CONFIG_FILE, Source, find_source
from mmssl.pretrained.whole import CheckpointError, first_line, why_unreadable

_ANCHOR = "patch_embed.proj.weight"
# Attributes of layers that are sizes, which tensors' shapes tell, or change nothing in what comes out.
_NO_TRAITS = {
    *("training", "inplace", "fused_attn", "in_features", "out_features", "normalized_shape", "num_prefix_tokens"),
    *("head_dim", "scale", "dim", "depth", "feat_shape"),
}
_SPECIALS = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")


@dataclass
class Account:
    """What became of every tensor of the backbone, and what of the source found no place."""

    source: str
    taken: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)  # text experts, from the picture's feed-forward
    left_out: list[str] = field(default_factory=list)
    words: str = ""
    differs: list[str] = field(default_factory=list)  # what changes the function, but no shape
    unchecked: str = ""

    def __str__(self) -> str:
        lines = [
            f"mmssl: started from {self.source}: {len(self.taken)} tensors taken, {len(self.resized)} resized, "
            f"{len(self.new)} new, {len(self.left_out)} of the source left out"
        ]
        lines += [f"  resized   {line}" for line in self.resized]
        lines += [f"  words     {self.words}"] if self.words else []
        lines += [f"  differs   {line}" for line in self.differs]
        lines += [f"  unchecked {self.unchecked}"] if self.unchecked else []
        experts = ("copied", [f"{name} from the picture's" for name in self.copied])
        for title, names in (("new", self.new), experts, ("left out", self.left_out)):
            if names:
                shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
                lines.append(f"  {title:<8}  {shown}")
        return "\n".join(lines)


def start_from(backbone: Backbone, source: str, tokenizer: TextTokenizer | None = None) -> Account:
    """Copy into a new backbone what fits of a source; ``tokenizer`` is the new backbone's own.

    Positions of pictures and patch embeddings are resampled as timm does.  With another tokenizer, tokens of the same
    spelling keep their embedding.  Of more text positions than there were, the further ones are new.  New text experts
    are copies of the picture's feed-forward networks.  What differs between the models beside shapes, such as the kind
    of a norm, is in the account.

    Raises:
        ValueError: there is nothing at ``source``, it holds no transformer's weights, or one of another width or number
            of heads.
        CheckpointError: a file is damaged or cut short.
    """
    found = None if _is_weights_file(Path(source)) else find_source(source)
    raw: Mapping[str, Tensor]
    if found is None:
        raw = {f"vit.{name}": tensor for name, tensor in _image_weights(Path(source)).items()}
        account = Account(source)
        theirs = _named_model(Path(source), backbone)
    else:
        raw = found.tensors
        known = (found.about.get("objective"), f"step {found.about.get('step')}", f"{found.weights} weights")
        account = Account(f"{found.where} ({', '.join(str(k) for k in known if k)})")
        shape: dict[str, Any] = {key: found.options.get(key) for key in ("img_size", "patch_size", "options")}
        with torch.device("meta"):
            theirs = Backbone(found.backbone, **shape).vit
    state = _at_our_size(backbone, raw)
    ours = backbone.state_dict()
    with torch.no_grad():
        for name, value in ours.items():
            if name == "text.token_embedding.weight" and name in raw and found is not None:
                _take_words(value, raw[name], found, tokenizer, account)
            elif name == "text.position" and name in raw:
                _take_positions(value, raw[name], account)
            elif name in state:
                _take(name, value, state[name], raw, account)
            elif ".text_expert." in name:
                value.copy_(ours[name.replace(".text_expert.", ".")])
                account.copied.append(name)
            else:
                account.new.append(name)
    if not account.taken:
        raise ValueError(f"init_from: nothing of {source} fits {type(backbone.vit).__name__}; name its own model")
    account.left_out = [name for name in raw if name not in ours]
    _compare(backbone.vit, theirs, account)
    return account


def _is_weights_file(path: Path) -> bool:
    """Whether a file holds a vision transformer alone, and is neither a checkpoint of mmssl nor part of an export."""
    config = path.parent / CONFIG_FILE
    if not path.is_file() or (config.is_file() and '"mmssl"' in config.read_text(encoding="utf-8")):
        return False
    if path.suffix == ".safetensors":
        return True
    content = _load(path)
    return not (isinstance(content, dict) and "hyper_parameters" in content)


def _load(path: Path) -> Any:
    try:
        # The MAE code keeps its command line beside the weights, as a Namespace: plain values, which run nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"init_from: cannot load {path}: {why_unreadable(error)}") from error


def _image_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a vision transformer by timm's names, whatever stands before the names or around the dict."""
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"init_from: {path} is damaged or cut short ({first_line(error)})") from error
    else:
        content = _load(path)
    for key in ("model", "state_dict", "teacher", "model_ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    anchor = min((name for name in state if name.endswith(_ANCHOR)), key=len, default=None)
    if anchor is None:
        raise ValueError(f"init_from: {path} holds no vision transformer (no {_ANCHOR}); give timm's or MAE's weights")
    prefix = anchor.removesuffix(_ANCHOR)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _named_model(path: Path, backbone: Backbone) -> Any:
    """The model that a file of weights names, without memory behind it; None where it names none of this width."""
    beside = path.with_name(CONFIG_FILE)
    try:
        if path.suffix != ".safetensors":
            content = _load(path)
            name, arguments = content["arch"], dict[str, Any]()  # as timm's training writes it
        else:
            content = json.loads(beside.read_text(encoding="utf-8"))  # as in a folder of timm's
            name, arguments = content["architecture"], content.get("model_args") or {}
        with torch.device("meta"):
            vit: Any = timm.create_model(name.partition(".")[0], **{"num_classes": 0, **arguments})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # it says nothing that timm knows
        return None
    return vit if type(vit) is type(backbone.vit) and vit.embed_dim == backbone.embed_dim else None


def _compare(ours: Any, theirs: Any, account: Account) -> None:
    """Note what shapes do not tell; another number of heads is refused, for weights of other heads mean nothing."""
    here = ours.blocks[0].attn.num_heads
    if theirs is None:
        account.unchecked = f"the file does not say how many heads its model has; this one has {here}"
        return
    if (there := theirs.blocks[0].attn.num_heads) != here:
        raise ValueError(
            f"init_from: {account.source} has {there} heads, the model {here}; give the model as many "
            f"(backbone_options: options: num_heads: {there})"
        )
    mine, its = _traits(ours), _traits(theirs)
    account.differs = [
        f"{name}: {its[name]} there, {value} here" for name, value in mine.items() if its.get(name, value) != value
    ]


def _traits(vit: Any) -> dict[str, Any]:
    """What decides the function of a transformer beside its tensors: kinds of layers, their numbers and switches."""
    traits: dict[str, Any] = {f"pixel {key}": tuple(vit.pretrained_cfg[key]) for key in ("mean", "std")}
    parts = {"blocks": vit.blocks[0], "norm_pre": vit.norm_pre, "norm": vit.norm}
    traits["rope"] = type(rope := getattr(vit, "rope", None)).__name__
    for title, part in {**parts, **({"rope": rope} if rope is not None else {})}.items():
        for name, layer in part.named_modules():
            place = f"{title}.{name}".removesuffix(".")
            if place != "blocks" and "drop" not in name and "text_expert" not in name:
                traits[place] = type(layer).__name__
                said = {
                    key: value for key, value in vars(layer).items() if isinstance(value, int | float | str | tuple)
                }
                traits |= {f"{place}.{key}": said[key] for key in said if key[0] != "_" and key not in _NO_TRAITS}
    return traits


def _at_our_size(backbone: Backbone, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A source's tensors by the backbone's names, positions and patches at its size."""
    vit: Any = backbone.vit
    names = [name for name in raw if name.startswith("vit.") and ".text_expert." not in name]
    image = {name.removeprefix("vit."): raw[name] for name in names}
    image = dict(sys.modules[type(vit).__module__].checkpoint_filter_fn(image, vit))
    for part in ("weight", "bias"):  # who pools by the mean keeps the last norm behind the pooling
        if f"norm.{part}" not in image and f"fc_norm.{part}" in image:
            image[f"norm.{part}"] = image[f"fc_norm.{part}"]
    rest = {name: raw[name] for name in raw if name not in names}
    return {**{f"vit.{name}": value for name, value in image.items()}, **rest}


def _take(name: str, value: Tensor, tensor: Tensor, raw: Mapping[str, Tensor], account: Account) -> None:
    if value.shape != tensor.shape:
        raise ValueError(
            f"init_from: {name} of {account.source} has shape {list(tensor.shape)}, the model {list(value.shape)}; "
            "give the model the same width, heads and patches"
        )
    value.copy_(tensor)
    if name in raw and raw[name].shape != tensor.shape:
        account.resized.append(f"{name} {list(raw[name].shape)} -> {list(tensor.shape)}")
    else:
        account.taken.append(name)


def _take_positions(value: Tensor, tensor: Tensor, account: Account) -> None:
    _check_width("text.position", value, tensor, account)
    rows = min(len(value), len(tensor))
    value[:rows] = tensor[:rows]
    if len(value) == len(tensor):
        account.taken.append("text.position")
    else:
        further = f", {len(value) - rows} new" if len(value) > rows else ""
        account.resized.append(f"text.position {len(tensor)} -> {len(value)} rows: the first {rows} taken{further}")


def _take_words(
    value: Tensor, tensor: Tensor, found: Source, tokenizer: TextTokenizer | None, account: Account
) -> None:
    """Embeddings of tokens: all of them, or with another tokenizer those of the same spelling and the special ones."""
    theirs = found.tokenizer
    assert tokenizer is not None  # it has text, so it has a tokenizer
    assert theirs is not None
    name = "text.token_embedding.weight"
    _check_width(name, value, tensor, account)
    if theirs.to_json() == tokenizer.to_json():
        value.copy_(tensor)
        account.taken.append(name)
        return
    places = {theirs.token(i): i for i in range(theirs.vocab_size)}
    pairs = {i: places[tokenizer.token(i)] for i in range(tokenizer.vocab_size) if tokenizer.token(i) in places}
    pairs |= {getattr(tokenizer, special): getattr(theirs, special) for special in _SPECIALS}
    value[list(pairs)] = tensor[list(pairs.values())]
    account.resized.append(f"{name} {len(tensor)} -> {len(value)} rows")
    account.words = (
        f"another tokenizer: {len(pairs)} of {len(value)} tokens taken by name, {len(value) - len(pairs)} new"
    )


def _check_width(name: str, value: Tensor, tensor: Tensor, account: Account) -> None:
    if value.shape[1] != tensor.shape[1]:
        raise ValueError(
            f"init_from: {name} of {account.source} is {tensor.shape[1]} wide, the model {value.shape[1]}; "
            "give the model the same width"
        )
