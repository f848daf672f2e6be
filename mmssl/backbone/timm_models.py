"""Which timm models serve as a backbone, with which options, and from which weights."""

import difflib
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import Attention, AttentionRope, PatchEmbed
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmssl.backbone.experts import SHARED

log = logging.getLogger(__name__)

# Arguments of timm's constructors that are not free here, and why.
_NOT_FREE = {
    **dict.fromkeys(("img_size", "patch_size", "drop_path_rate"), "it is an argument of Backbone itself"),
    **dict.fromkeys(("num_classes", "global_pool"), "a backbone has no head"),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), "use drop_path_rate"),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad"), "a backbone has one img_size"),
    **dict.fromkeys(("attn_layer", "block_fn", "embed_layer", "embed_norm_layer"), "these layers are fixed"),
    **dict.fromkeys(("device", "dtype"), "move the module instead"),
    "patch_drop_rate": "hidden patches are given by their indices",
    "in_chans": "pictures have three channels",
}
# Of checkpoints: what belongs to a head, a decoder or a fixed buffer, and is left out without a word.
_NOT_OURS = ("head", "fc_norm.", "attn_pool.", "mask_token", "decoder", "rope.", "lm_head", "projectors.")


def create(
    name: str,
    *,
    img_size: int | None,
    patch_size: int | None,
    drop_path_rate: float,
    pretrained: bool,
    weights: str | None,
    options: dict[str, Any],
) -> Any:
    """A timm VisionTransformer or Eva without head and pooling, so that its own final ``norm`` ends it.

    Raises:
        ValueError: an unknown or unfit model, size or option, or weights that cannot be had or do not fit.
    """
    probe = _probe(name)
    options = {key: value for key, value in options.items() if value is not None}  # timm drops None as well
    _check_options(name, probe, options)
    sizes = _check_sizes(name, probe, img_size, patch_size, options)
    if pretrained and weights:
        raise ValueError("pretrained and weights are both given; choose timm's download or the local file")
    arguments = {"num_classes": 0, "drop_path_rate": drop_path_rate, **sizes, **options}
    vit = timm.create_model(name, global_pool="", **arguments)
    if pretrained:
        _load(vit, _download(name, arguments), f"pretrained weights of {name}")
    elif weights:
        _load(vit, _read(weights, vit), weights)
    return vit


def _probe(name: str) -> Any:
    """The model without memory behind it; refuses what cannot serve."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3, 0.3)
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; the nearest names are {', '.join(near)}")
    if name not in (architecture, *timm.list_pretrained(f"{architecture}.*")):
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(f"{architecture} has no weights tagged {name.partition('.')[2]!r}; it has {', '.join(tags)}")
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, num_classes=0)
    reason = None
    if type(model) not in (VisionTransformer, Eva):  # subclasses change what these two promise
        reason = f"it is a {type(model).__name__}"
    elif type(model.patch_embed) is not PatchEmbed:
        reason = f"its {type(model.patch_embed).__name__} lets hidden patches leak into visible ones"
    elif any(type(block) not in SHARED for block in model.blocks):
        reason = f"its blocks are {type(model.blocks[0]).__name__}"
    elif any(type(block.attn) not in (Attention, AttentionRope, EvaAttention) for block in model.blocks):
        reason = f"its attention is {type(model.blocks[0].attn).__name__}"
    if reason:
        raise ValueError(
            f"{name} cannot be a backbone: {reason}; use a plain VisionTransformer or Eva of timm, such as "
            "vit_base_patch16_224, deit3_base_patch16_224, vit_base_patch14_reg4_dinov2, vit_base_patch16_siglip_224, "
            "eva02_base_patch14_224 or vit_base_patch16_dinov3"
        )
    return model


def _check_options(name: str, probe: Any, options: dict[str, Any]) -> None:
    known = list(inspect.signature(type(probe)).parameters)
    free = [key for key in known if key not in _NOT_FREE]
    for key in options:
        if key in _NOT_FREE:
            raise ValueError(f"options may not set {key!r}: {_NOT_FREE[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, free, 3, 0.3) or free
            raise ValueError(f"{name} has no option {key!r}; the nearest are {', '.join(near)}")
    embed_dim = options.get("embed_dim", probe.embed_dim)
    num_heads = options.get("num_heads", probe.blocks[0].attn.num_heads)
    step = 4 if getattr(probe, "rope", None) is not None else 1  # rotary: sine and cosine on two axes
    if embed_dim % (num_heads * step):
        raise ValueError(
            f"embed_dim {embed_dim} of {name} must be divisible by num_heads{f' x {step}' if step > 1 else ''}"
            f" = {num_heads * step}; change embed_dim or num_heads in options"
        )


def _check_sizes(
    name: str, probe: Any, img_size: int | None, patch_size: int | None, options: dict[str, Any]
) -> dict[str, int]:
    embed = probe.patch_embed
    patch, size = patch_size or embed.patch_size[0], img_size or embed.img_size[0]
    if not img_size and embed.img_size[0] != embed.img_size[1]:
        raise ValueError(f"{name} takes {embed.img_size} pictures; a backbone takes square ones: give img_size")
    if patch < 1 or size < 1:
        raise ValueError(f"img_size is {size} and patch_size {patch}; both must be positive")
    if size % patch:
        near = [n for n in (size // patch * patch, -(-size // patch) * patch) if n]
        raise ValueError(
            f"img_size {size} is not divisible by patch_size {patch} of {name}; "
            f"the nearest sizes are {' and '.join(map(str, near))}"
        )
    return {"img_size": size, "patch_size": patch}


def _download(name: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    try:
        # With the pooling the weights were made for: some keep their last norm behind it.
        return dict(timm.create_model(name, pretrained=True, **arguments).state_dict())
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no pretrained weights for {name} ({reason}); check the network, fill the cache beforehand, "
            "or give a local file as weights"
        ) from error


def _read(path: str, vit: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's image weights under timm's names, positions and patches resized to the model."""
    if not Path(path).is_file():
        raise ValueError(f"weights: there is no file {path}")
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except (RuntimeError, SafetensorError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"weights: {path} is not a checkpoint that can be read safely ({reason})") from error
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    anchor = "patch_embed.proj.weight"
    prefix = min((key.removesuffix(anchor) for key in state if key.endswith(anchor)), key=len, default="")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    convert = sys.modules[type(vit).__module__].checkpoint_filter_fn
    return dict(convert(state, vit))


def _load(vit: nn.Module, state: dict[str, Tensor], source: str) -> None:
    ours = vit.state_dict()
    for part in ("weight", "bias"):
        # Models that pool by the mean keep the last norm behind the pooling; here it stands before it.
        if f"norm.{part}" in ours and f"norm.{part}" not in state and f"fc_norm.{part}" in state:
            state[f"norm.{part}"] = state[f"fc_norm.{part}"]
    missing = [key for key in ours if key not in state]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(ours)} tensors of the model ({', '.join(missing[:3])}, ...); "
            "name the model it was made for"
        )
    for key, value in ours.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"{source}: {key} has shape {list(state[key].shape)}, the model {list(value.shape)}; "
                "name the model it was made for, and the same options"
            )
    vit.load_state_dict({key: state[key] for key in ours})
    unused = [key for key in state if key not in ours and not key.startswith(_NOT_OURS)]
    if unused:
        log.warning("%s: %d tensors have no place in the model (%s, ...)", source, len(unused), ", ".join(unused[:3]))
