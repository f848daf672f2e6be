"""A backbone from what a config says."""

import difflib
import inspect
from typing import Any

from mmssl.backbone.vit import Backbone


def make_backbone(name: str, options: dict[str, Any] | None, needs: tuple[str, ...], **fixed: Any) -> Backbone:
    """Build the backbone for what a model needs; an unknown option is refused with the nearest valid one.

    Raises:
        ValueError: an unknown option, or what :class:`Backbone` refuses.
    """
    options = dict(options or {})
    known = [p for p in inspect.signature(Backbone.__init__).parameters if p not in ("self", "name", *fixed)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)
            raise ValueError(f"backbone_options has no {key!r}; did you mean {near[0]!r}? It takes {', '.join(known)}")
    backbone = Backbone(name, **options, **fixed)
    backbone.freeze_unused(needs)
    return backbone
