"""Layers of a backbone, from the embeddings to the head: rates that fall with depth, frozen beginnings."""

from collections.abc import Collection
from fnmatch import fnmatch
from itertools import chain
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from mmssl.backbone import Backbone


def layer_ids(backbone: Backbone) -> tuple[dict[str, int], int]:
    """(layer of each of the backbone's parameters by name, layer of the head).

    As timm numbers them: 0 the embeddings (those of text, too), 1 ... the blocks, the last one with the final norm.
    """
    vit = backbone.vit
    names: Any = chain(vit.named_parameters(), [("head", None)])
    of_vit = group_with_matcher(names, vit.group_matcher(coarse=False), reverse=True)
    ids = {name: of_vit[name.removeprefix("vit.")] if name.startswith("vit.") else 0 for name, _ in named(backbone)}
    return ids, of_vit["head"]


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The module's parameters with their names."""
    return list(module.named_parameters())


def layer_groups(
    module: nn.Module,
    ids: dict[str, int],
    head: int,
    *,
    lr: float,
    layer_decay: float,
    weight_decay: float,
    no_weight_decay: Collection[str],
) -> list[dict[str, Any]]:
    """Groups whose rate is lr * layer_decay ** (head - layer), as ``timm.optim.param_groups_layer_decay`` scales it.

    Frozen parameters are left out; vectors and ``no_weight_decay`` names (wildcards) are not decayed.  The head's
    group comes first (its rate is the one that is logged).  timm's groups hold an ``lr_scale`` that only timm's own
    schedulers heed; here the rate itself is scaled.

    Args:
        ids: layer by parameter name; what is not named belongs to ``head``.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named(module):
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in no_weight_decay)
        layer = ids.get(name, head)
        scale = layer_decay ** (head - layer)
        group = groups.setdefault(
            (-layer, decayed),
            {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0},
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def freeze(backbone: Backbone, layers: int) -> None:
    """Stop the gradients of the embeddings and the first ``layers`` - 1 blocks; of nothing for 0."""
    ids, head = layer_ids(backbone)
    if not 0 <= layers < head + 1:
        raise ValueError(f"frozen_layers is {layers}; the backbone has {head} (its embeddings and {head - 1} blocks)")
    for name, parameter in named(backbone):
        if ids[name] < layers:
            parameter.requires_grad_(False)
