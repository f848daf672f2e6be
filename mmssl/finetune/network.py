"""The device's half of classification: backbone, pooling, head.

Axes: B samples, D width, K classes, T text tokens of the batch, S segments (B, or B + 1 with padding).
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms import v2

from mmssl.backbone import Backbone, Encoded, Normalizes
from mmssl.draws import mix
from mmssl.types import Batch, Text, segment_ids

Pool = Literal["mean", "cls"]


class Logits(NamedTuple):
    """``targets``: distributions over the classes where pictures were mixed, else None."""

    logits: Float[Tensor, "B K"]
    targets: Float[Tensor, "B K"] | None = None


class Mixing:
    """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019), each half of the time where both are on.

    What is drawn is a function of the batch's number and the rank: a resumed run mixes alike.

    Args:
        mixup, cutmix: alpha of the Beta distribution that the share of the second picture comes from; 0 is off.
        num_classes: number of classes.

    Raises:
        ValueError: for an alpha below 0.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        for name, alpha in {"mixup": mixup, "cutmix": cutmix}.items():
            if alpha < 0:
                raise ValueError(f"{name} is {alpha}; give the alpha of a Beta distribution above 0, or 0 for none")
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __call__(
        self, pixels: Float[Tensor, "B C H W"], batch: Batch, rank: int
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """(mixed pictures, shares of the classes)."""
        draw = mix(batch.index, rank) >> 1  # 63 bits, as seeds are
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
            torch.default_generator.manual_seed(draw)
            pixels, targets = self._kinds[draw % len(self._kinds)](pixels, batch.labels)
        return pixels, targets


class Head(nn.Linear):
    """A linear layer in float32 under autocast, too: bfloat16 would round a prediction to three digits."""

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        with torch.autocast(features.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(features.float(), self.weight.float(), bias)


class ClassifierNetwork(Normalizes):
    """Batch to logits.

    Args:
        pool: "mean" over all patches and text tokens (special ones included), or "cls": the class token, for texts
            alone their first token.
        frozen: features are computed without gradients and without stochastic depth.
        head_norm: a BatchNorm without parameters before the head, as in MAE's linear probe.

    Raises:
        ValueError: an unknown pool, or "cls" for pictures where the backbone has no class token.
    """

    def __init__(
        self, backbone: Backbone, needs: tuple[str, ...], num_classes: int, pool: Pool, frozen: bool, head_norm: bool
    ) -> None:
        super().__init__(backbone.pixel_mean, backbone.pixel_std)
        check_pool(pool, backbone, needs)
        self.backbone, self.pool, self.frozen = backbone, pool, frozen
        norm = nn.BatchNorm1d(backbone.embed_dim, affine=False, eps=1e-6) if head_norm else nn.Identity()
        linear = Head(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(norm, linear)

    def train(self, mode: bool = True) -> "ClassifierNetwork":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, batch: Batch, mixing: Mixing | None = None, rank: int = 0) -> Logits:
        pixels = targets = None
        if batch.image is not None:
            pixels = self.normalized(batch.image.pixels)
            if mixing:
                pixels, targets = mixing(pixels, batch, rank)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = pooled(self.backbone(pixels, None, batch.text), batch.text, batch.size, self.pool)
        return Logits(self.head(features), targets)


def check_pool(pool: Pool, backbone: Backbone, needs: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown pool, or "cls" for pictures where the backbone has no class token."""
    if pool not in get_args(Pool):
        raise ValueError(f"pool is {pool!r}; choose mean or cls")
    if pool == "cls" and "image" in needs and getattr(backbone.vit, "cls_token", None) is None:
        raise ValueError("pool is cls, but this backbone has no class token; take pool: mean")


def pooled(encoded: Encoded, text: Text | None, samples: int, pool: Pool) -> Float[Tensor, "B D"]:
    """One vector for each sample."""
    if pool == "cls":
        if encoded.prefix is not None:
            return encoded.prefix[:, 0]
        assert encoded.text is not None
        assert text is not None
        return encoded.text[text.cu_seqlens[:samples].long()]
    total: Tensor | float = 0.0
    count: Tensor | int = 0
    if encoded.patches is not None:
        total, count = encoded.patches.sum(1), encoded.patches.shape[1]
    if encoded.text is not None and text is not None:
        of_text = encoded.text.new_zeros(len(text.cu_seqlens) - 1, encoded.text.shape[1])  # S, D
        of_text = of_text.index_add(0, segment_ids(text.cu_seqlens, len(encoded.text)), encoded.text)
        total = total + of_text[:samples]
        count = count + text.cu_seqlens.diff()[:samples, None]
    assert isinstance(total, Tensor)
    return total / count
