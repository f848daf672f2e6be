"""Low-rank adaptation (Hu et al. 2021) of a backbone's blocks, by Hugging Face's peft."""

from torch import nn

from mmssl.backbone import Backbone


def add_lora(backbone: Backbone, rank: int, alpha: int | None, dropout: float) -> float:
    """Freeze the backbone and put low-rank adapters beside its blocks' linear layers that were not frozen, in place.

    An adapter begins at zero: the outputs are at first those of the backbone.

    Args:
        rank: of the adapters.
        alpha: they count alpha / rank times; None means 2 * rank.
        dropout: before an adapter.

    Returns:
        alpha / rank, which merges them: weight + alpha / rank * B @ A.

    Raises:
        ValueError: a value that makes no sense, peft is missing, or a model whose attention would pass them by.
    """
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}; give at least 1, or 0 for none")
    alpha = 2 * rank if alpha is None else alpha
    if alpha <= 0:
        raise ValueError(f"lora_alpha is {alpha}; give a number above 0, or null for twice the rank")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {dropout}; it must lie in [0, 1)")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("lora_rank needs peft, which is not installed; pip install 'mmssl[lora]'") from None
    linear = {name: part for name, part in backbone.vit.blocks.named_modules() if isinstance(part, nn.Linear)}
    # What is frozen already is never reached (freeze_unused): an adapter there would get no gradient.
    names = [f"vit.blocks.{name}" for name, part in linear.items() if part.weight.requires_grad]
    backbone.requires_grad_(False)
    for layer, block in enumerate(backbone.vit.blocks):
        # With biases of its own timm multiplies by the weight itself, not through the layer.
        if getattr(block.attn, "q_bias", None) is not None:
            names.remove(f"vit.blocks.{layer}.attn.qkv")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names), backbone)
    return alpha / rank
