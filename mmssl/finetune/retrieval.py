"""Retrieval of pictures by text and of texts by picture: two encodings by one backbone, brought together.

Axes: B pairs of this rank, G pairs of all ranks, D width of the backbone, K width of an embedding.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmssl.backbone import Backbone, Normalizes
from mmssl.finetune.base import Pictured
from mmssl.finetune.network import Head, Pool, check_pool, pooled
from mmssl.finetune.prepare import PreparePair
from mmssl.training.completion import Rows
from mmssl.training.together import hear_all
from mmssl.types import Batch, Loss

_LARGEST_SCALE = math.log(100)  # CLIP's: a temperature of 0.01
_RECALLS = (1, 5, 10)
_WAYS = ("image_to_text", "text_to_image")


class Embeddings(NamedTuple):
    """Of unit length; ``scale`` is one over the temperature."""

    image: Float[Tensor, "B K"]
    text: Float[Tensor, "B K"]
    scale: Float[Tensor, " 1"]


class DualNetwork(Normalizes):
    """Batch to embeddings: pictures and texts pass through the backbone apart, so that either can be stored."""

    def __init__(self, backbone: Backbone, embed_dim: int, pool: Pool, temperature: float) -> None:
        super().__init__(backbone.pixel_mean, backbone.pixel_std)
        self.backbone, self.pool = backbone, pool
        self.image_head = Head(backbone.embed_dim, embed_dim, bias=False)
        self.text_head = Head(backbone.embed_dim, embed_dim, bias=False)
        for head in (self.image_head, self.text_head):
            nn.init.normal_(head.weight, std=backbone.embed_dim**-0.5)
        # One number on an axis of its own: FSDP2 cannot shard a scalar.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    def forward(self, batch: Batch) -> Embeddings:
        assert batch.image is not None
        assert batch.text is not None
        image = pooled(self.backbone(self.normalized(batch.image.pixels)), None, batch.size, self.pool)
        text = pooled(self.backbone(text=batch.text), batch.text, batch.size, self.pool)
        return Embeddings(
            F.normalize(self.image_head(image), dim=-1),
            F.normalize(self.text_head(text), dim=-1),
            self.log_scale.exp(),
        )


class DualEncoder(Pictured):
    """Pairs by their embeddings: CLIP's symmetric contrastive loss (Radford et al. 2021) over the pairs of all ranks.

    In evaluation ``recall/image_to_text@1`` (5, 10) and ``recall/text_to_image@1`` (5, 10) over all of the validation:
    the part of the pictures whose own text is among the first so many, and the reverse.  ``mmssl predict`` writes the
    embeddings.

    Args:
        embed_dim: width of the embeddings.
        pool: mean over all patches, or all tokens; or cls, the class token and the text's first token.
        temperature: at the start; it is learnt.
        crop_scale, flip: the augmentation; texts often name sides and parts.
        pad_to_multiple_of: the packed axis is rounded up to this many tokens.
        kwargs: see :class:`mmssl.finetune.base.FineTuned`.

    With accumulation a pair is compared to those of its micro-batch only: take more ranks or recompute
    (``grad_checkpointing``) for larger batches.
    """

    needs = ("image", "text")
    network: DualNetwork

    def __init__(
        self,
        embed_dim: int = 256,
        pool: Pool = "mean",
        temperature: float = 0.07,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = False,
        pad_to_multiple_of: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if embed_dim < 1:
            raise ValueError(f"embed_dim is {embed_dim}; give at least 1")
        if not 0.01 <= temperature <= 1:
            raise ValueError(f"temperature is {temperature}; give 0.01 to 1")
        encoder = self.network.backbone
        check_pool(pool, encoder, self.needs)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.set_crops(crop_scale, flip)
        self.network = DualNetwork(encoder, embed_dim, pool, temperature)
        self.loss_weights = {"contrastive": 1.0}
        self._seen: list[tuple[Tensor, Tensor]] = []

    def metric_names(self) -> set[str]:
        return {"loss_contrastive", "accuracy", *(f"recall/{way}@{k}" for way in _WAYS for k in _RECALLS)}

    def prepare(self, train: bool) -> PreparePair:
        tokens = self.tokens()
        assert tokens is not None
        return PreparePair(self.crop(train), tokens, self.network.backbone.num_patches)

    def compare(self, prediction: Embeddings, batch: Batch) -> dict[str, Loss]:
        image, text, scale = prediction
        valid = torch.ones(len(image), dtype=torch.bool, device=image.device) if batch.valid is None else batch.valid
        images, texts, use, first = self._of_all_ranks(image, text, valid)
        own = torch.arange(len(image), device=image.device) + first
        losses, hits = [], []
        with torch.autocast(image.device.type, enabled=False):  # which would round the products to bfloat16
            for mine, theirs in ((image, texts), (text, images)):
                logits = (scale * mine @ theirs.T).masked_fill(~use, -math.inf)  # B, G
                losses.append(F.cross_entropy(logits, own, reduction="none").masked_fill(~valid, 0.0))
                hits.append(((logits.detach().argmax(-1) == own) & valid).sum().float())
        count = valid.sum().float()
        return {
            "contrastive": Loss((losses[0] + losses[1]).sum() / 2, count),
            "accuracy": Loss((hits[0] + hits[1]) / 2, count),
        }

    def _of_all_ranks(
        self, image: Float[Tensor, "B K"], text: Float[Tensor, "B K"], valid: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "G K"], Float[Tensor, "G K"], Bool[Tensor, " G"], int]:
        """(pictures, texts, which are valid, place of this rank's first); gradients flow back to every rank."""
        if self._trainer is None or self.trainer.world_size == 1:
            return image, text, valid, 0
        gather = self.trainer.strategy.all_gather
        both = gather(torch.stack([image, text], 1), sync_grads=True).flatten(0, 1)  # ranks, B, 2, K -> G, 2, K
        use = gather(valid.float()).flatten() > 0.5
        return both[:, 0], both[:, 1], use, self.global_rank * len(image)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the temperature within bounds after a step: within the forward pass it could never come back."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.network.log_scale.clamp_(0, _LARGEST_SCALE)

    def measure(self, prediction: Embeddings, batch: Batch) -> None:
        chosen = slice(None) if batch.valid is None else batch.valid
        self._seen.append((prediction.image[chosen].cpu(), prediction.text[chosen].cpu()))

    def measured(self) -> dict[str, Tensor]:
        parts = [part for rank in hear_all(self._seen) for part in rank]
        self._seen = []
        images, texts = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        found: dict[str, Tensor] = {}
        for name, query, among in zip(_WAYS, (images, texts), (texts, images), strict=True):
            places = places_of_partners(query, among)
            found |= {f"recall/{name}@{k}": (places < k).float().mean() for k in _RECALLS}
        return found

    def predict_step(self, batch: Batch, batch_idx: int) -> Rows:
        """A line for each pair: key, image and text, the embeddings."""
        found = self(batch)
        valid = [True] * batch.size if batch.valid is None else batch.valid.tolist()
        rows = [
            {"key": key, "image": _rounded(image), "text": _rounded(text)}
            for key, image, text, use in zip(batch.keys, found.image.tolist(), found.text.tolist(), valid, strict=True)
            if use
        ]
        return Rows("embeddings", rows)


def _rounded(embedding: list[float]) -> list[float] | None:
    """None where it is not finite: JSON knows no NaN."""
    return [round(x, 6) for x in embedding] if all(map(math.isfinite, embedding)) else None


def places_of_partners(query: Float[Tensor, "G K"], among: Float[Tensor, "G K"]) -> Float[Tensor, " G"]:
    """At which place, from 0, query i finds its partner i by dot product.

    Those that are as near as the partner count half, so that encoders which give all the same vector find nothing; a
    partner whose distance is NaN comes last.
    """
    places = []
    for first in range(0, len(query), 1024):  # not all of G x G at once
        near = query[first : first + 1024] @ among.T
        own = near.gather(1, torch.arange(first, first + len(near)).unsqueeze(1))
        place = (near > own).sum(1) + ((near == own).sum(1) - 1) / 2
        places.append(place.masked_fill(own.isnan().squeeze(1), len(among)))
    return torch.cat(places)
