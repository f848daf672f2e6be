"""The shared backbone: the blocks of one timm vision transformer, for images, texts and pairs.

Images alone run dense, [B, prefix + visible patches, D].  As soon as there is text, tokens are packed on one axis
(:class:`mmssl.backbone.attention.Packing`).  A pair is the segment [prefix, visible patches, text]; a text alone is
its own tokens only, for its [CLS] plays the part of the prefix.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.backbone import timm_models
from mmssl.backbone.attention import Layout, Packing, Padded, has_varlen
from mmssl.backbone.embed import TextEmbedding, sincos_2d
from mmssl.backbone.experts import share
from mmssl.types import Text

Rope = Callable[[int], Tensor | None]  # layer -> rotary positions


class Encoded(NamedTuple):
    """What the backbone made of its input, after the final norm; None for what was not given."""

    prefix: Float[Tensor, "B P D"] | None  # class and register tokens; P may be 0
    patches: Float[Tensor, "B V D"] | None  # in the order of ``visible``
    text: Float[Tensor, "T D"] | None  # in the order of ``Text.input_ids``


class Backbone(nn.Module):
    """One transformer for pictures and text.

    Args:
        name: a timm model of the VisionTransformer or Eva class, such as ``vit_base_patch16_224``.
        vocab_size: size of the vocabulary; None for a backbone without text.
        max_text_tokens: number of text positions.
        img_size, patch_size: in pixels; None for the model's own.
        experts: give text its own feed-forward networks (BEiT-3), copies of the image's at the start.
        pretrained: download timm's image weights for ``name``.
        weights: or a local file with image weights (.safetensors, .pth, .pt, .ckpt; read with ``weights_only``); names
            may carry prefixes ("model.", "module.", ...), positions are resized.
        drop_path_rate: stochastic depth at the last block, growing linearly from 0; drawn per sample.
        grad_checkpointing: recompute each block in the backward pass to save memory.
        options: further arguments of the timm model (embed_dim, depth, num_heads, mlp_ratio, init_values, ...).

    Attributes: ``embed_dim``, ``num_heads``, ``patch_size``, ``img_size``, ``grid_size`` (height, width),
    ``num_patches``, ``num_prefix_tokens``, ``max_text_tokens``, ``pixel_mean`` and ``pixel_std`` (three numbers for
    pixels in [0, 1]).

    Parameters that an objective never reaches (the patch embedding when all is text, text when all is images) get no
    gradient.  DistributedDataParallel stops at those: call :meth:`freeze_unused` once, or use
    ``find_unused_parameters``.

    Raises:
        ValueError: see :func:`mmssl.backbone.timm_models.create`.
    """

    vit: Any  # timm's VisionTransformer or Eva
    text: TextEmbedding | None

    def __init__(
        self,
        name: str,
        *,
        vocab_size: int | None = None,
        max_text_tokens: int = 512,
        img_size: int | None = None,
        patch_size: int | None = None,
        experts: bool = False,
        pretrained: bool = False,
        weights: str | None = None,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; it must lie in [0, 1)")
        if experts and vocab_size is None:
            raise ValueError("experts are a feed-forward for text: give vocab_size, or leave experts out")
        self.vit = timm_models.create(
            name,
            img_size=img_size,
            patch_size=patch_size,
            drop_path_rate=drop_path_rate,
            pretrained=pretrained,
            weights=weights,
            options=options or {},
        )
        for block in self.vit.blocks:
            share(block, experts)
        self.embed_dim: int = self.vit.embed_dim
        if not pretrained and weights is None:
            self._begin_with_sincos()
        self.text = TextEmbedding(vocab_size, self.embed_dim, max_text_tokens) if vocab_size is not None else None
        self.max_text_tokens = max_text_tokens
        self.grad_checkpointing = grad_checkpointing
        self._said: dict[str, Any] = {"name": name, "vocab_size": vocab_size, "experts": experts, "options": options}

        attention, embed = self.vit.blocks[0].attn, self.vit.patch_embed
        self.num_heads: int = attention.num_heads
        self._head_dim: int = attention.head_dim
        self.patch_size: int = embed.patch_size[0]
        self.img_size: int = embed.img_size[0]
        self.grid_size: tuple[int, int] = embed.grid_size
        self.num_patches: int = embed.num_patches
        self.num_prefix_tokens: int = self.vit.num_prefix_tokens
        self.pixel_mean: tuple[float, ...] = tuple(self.vit.pretrained_cfg["mean"])
        self.pixel_std: tuple[float, ...] = tuple(self.vit.pretrained_cfg["std"])

    def forward(
        self,
        pixels: Float[Tensor, "B C H W"] | None = None,
        visible: Int[Tensor, "B V"] | None = None,
        text: Text | None = None,
    ) -> Encoded:
        """Encode normalised pictures (of which only the ``visible`` patches are looked at), texts, or pairs.

        Args:
            visible: row-major indices of the patches to encode, any order; None for all.
            text: packed tokens; with pictures, segment s belongs to picture s.

        Raises:
            ValueError: nothing given, ``visible`` without pictures, pictures of another size, text without a
                vocabulary, a text that is too long, or segments that do not fit the pictures.
        """
        if pixels is None:
            if text is None or visible is not None:
                raise ValueError("visible came without pixels" if text else "give pixels, text or both")
            words = self._embed_text(text)
            packing = Packing.of(text, 0, 0, has_varlen(words, self._head_dim))
            x = self._encode(packing.pack(None, words), packing, lambda layer: None)
            return Encoded(None, None, packing.unpack(x)[1])

        image, table = self._embed_image(pixels, visible)
        prefix = self.num_prefix_tokens
        if text is None:
            x = self._encode(image, None, self._rope(table, visible))
            return Encoded(x[:, :prefix], x[:, prefix:], None)

        packing = Packing.of(text, len(image), image.shape[1], has_varlen(image, self._head_dim))
        x = packing.pack(image, self._embed_text(text))
        x = self._encode(x, packing, self._packed_rope(table, visible, packing))
        both, words = packing.unpack(x)
        assert both is not None
        return Encoded(both[:, :prefix], both[:, prefix:], words)

    def forward_padded(
        self,
        pixels: Float[Tensor, "B C H W"] | None,
        input_ids: Int[Tensor, "B L"],
        real: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "B K D"]:
        """Encode texts padded to one length, or pairs, without looking at a length: what a graph can hold.

        Args:
            real: True for the tokens that are no padding, which stands at the end.

        Returns:
            After the final norm [prefix, patches, text], K = P + N + L, or the text alone; at padding anything.
        """
        if self.text is None:
            raise ValueError("text came to a backbone without a vocabulary; build it with vocab_size")
        x, image_tokens, length = self.text.padded(input_ids), 0, input_ids.shape[1]
        table = None
        if pixels is not None:
            image, table = self._embed_image(pixels, None)
            image_tokens = image.shape[1]
            x = torch.cat([image, x.to(image.dtype)], 1)
            real = torch.cat([real.new_ones(image.shape[:2]), real], 1)
        layout = Padded(image_tokens, length, real)
        return self._encode(x, layout, self._packed_rope(table, None, layout))

    def arguments(self) -> dict[str, Any]:
        """What builds a backbone of this shape again, as plain values: ``Backbone(**arguments)``."""
        sizes = {"img_size": self.img_size, "patch_size": self.patch_size, "max_text_tokens": self.max_text_tokens}
        return {**self._said, **sizes}

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The image side under plain timm's names; ``timm.create_model(name, num_classes=0, global_pool="", ...)``
        with the same sizes and options loads it with ``strict=True``.
        """
        return {key: value for key, value in self.vit.state_dict().items() if ".text_expert." not in key}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters beyond one-dimensional ones that take no weight decay: tokens and positions."""
        names = {f"vit.{name}" for name in self.vit.no_weight_decay()} | {"text.position", "text.modality"}
        return names & {name for name, _ in self.named_parameters()}

    def freeze_unused(self, needs: Iterable[str]) -> None:
        """Stop gradients of what an objective that sees only ``needs`` (of "image", "text") never reaches."""
        needs = set(needs)
        if not needs or needs - {"image", "text"}:
            raise ValueError(f"needs is {sorted(needs)}; name 'image', 'text' or both")
        for name, parameter in self.named_parameters():
            of_text = name.startswith("text.") or ".text_expert." in name
            of_image = name.startswith("vit.") and not name.startswith(("vit.blocks.", "vit.norm."))
            if self.vit.blocks[0].text_expert is not None:
                of_image |= name.startswith("vit.blocks.") and name.split(".")[3] in ("norm2", "mlp")
            if (of_text and "text" not in needs) or (of_image and "image" not in needs):
                parameter.requires_grad_(False)

    def drop_text(self) -> None:
        """Forget what is for text alone, as if there had never been a vocabulary."""
        self.text = None
        for block in self.vit.blocks:
            block.text_expert = None
        self._said |= {"vocab_size": None, "experts": False}

    def compile_blocks(self) -> None:
        """torch.compile every block.

        A shape that changes (the packed axis of texts) is compiled once more with a symbolic size, and no further.
        Meant for CUDA: where segments are grouped by length (CPU), each new set of lengths would compile anew.
        """
        # Blocks share their code, but each rate of dropped paths is a constant in it: one entry per block and shape,
        # where torch would give up at eight and run the rest uncompiled.
        limit = 8 * len(self.vit.blocks)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        for block in self.vit.blocks:
            block.compile()

    @property
    def token_embedding(self) -> nn.Embedding:
        """The embedding that a prediction head may share its weight with."""
        if self.text is None:
            raise ValueError("a backbone without a vocabulary has no token embedding; build it with vocab_size")
        return self.text.token_embedding

    def _begin_with_sincos(self) -> None:
        """Positions begin as MAE's fixed sines and cosines, and are trained from there like every timm model's.

        Noise, timm's own beginning, would have to learn first which patches are neighbours.
        """
        positions = self.vit.pos_embed
        grid = self.vit.patch_embed.grid_size
        if positions is None or positions.ndim != 3 or self.embed_dim % 4 or positions.is_meta:
            return
        prefix = positions.shape[1] - grid[0] * grid[1]  # 0 where prefix tokens have no position
        with torch.no_grad():
            positions[:, :prefix] = 0
            positions[:, prefix:] = sincos_2d(self.embed_dim, grid)

    def _embed_text(self, text: Text) -> Float[Tensor, "T D"]:
        if self.text is None:
            raise ValueError("text came to a backbone without a vocabulary; build it with vocab_size")
        return cast(Tensor, self.text(text))

    def _embed_image(
        self, pixels: Float[Tensor, "B C H W"], visible: Int[Tensor, "B V"] | None
    ) -> tuple[Float[Tensor, "B K D"], Tensor | None]:
        """([prefix, visible patches], table of rotary positions of all patches or None)."""
        if pixels.shape[2:] != (self.img_size, self.img_size):
            height, width = pixels.shape[2:]
            raise ValueError(
                f"pictures are {height} x {width} but the backbone takes {self.img_size} x {self.img_size}"
            )
        # timm's own method: it knows in which order each model adds positions and prefix tokens.
        out = self.vit._pos_embed(self.vit.patch_embed(pixels))
        x, table = out if isinstance(out, tuple) else (out, None)
        if visible is not None:
            prefix, patches = x.tensor_split([self.num_prefix_tokens], 1)
            x = torch.cat([prefix, patches.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))], 1)
        return self.vit.norm_pre(x), table

    def _encode(self, x: Float[Tensor, "B K D"], packing: Layout | None, rope: Rope) -> Float[Tensor, "B K D"]:
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.vit.blocks):
            if recompute:
                x = checkpoint(block, x, rope(layer), packing, use_reentrant=False)
            else:
                x = block(x, rope(layer), packing)
        return cast(Tensor, self.vit.norm(x))

    def _rope(self, table: Tensor | None, visible: Int[Tensor, "B V"] | None) -> Rope:
        """Rotary positions of dense images.  The table is [N, d], or [depth, heads, N, d] in the mixed form."""
        if table is None:
            return lambda layer: None
        if getattr(self.vit, "rope_mixed", False):
            if visible is None:
                return lambda layer: table[layer]
            return lambda layer: table[layer][:, visible].transpose(0, 1)  # B, heads, V, d
        chosen = table if visible is None else table[visible][:, None]  # B, 1, V, d
        return lambda layer: chosen

    def _packed_rope(self, table: Tensor | None, visible: Int[Tensor, "B V"] | None, packing: Layout) -> Rope:
        """Rotary positions of packed pairs: prefix and text tokens are not turned (sine 0, cosine 1).

        timm's layers leave the first ``num_prefix_tokens`` rows of their axis alone.  Here these are the prefix of the
        segment that comes first, which is never turned anyway, so the positions begin after them.
        """
        if table is None:
            return lambda layer: None
        half = table.shape[-1] // 2
        identity = torch.cat([table.new_zeros(half), table.new_ones(half)]).expand(*table.shape[:-2], 1, -1)
        table = torch.cat([table, identity], -2)
        count, device = self.num_patches, table.device
        if visible is None:
            visible = torch.arange(count, device=device).expand(packing.images, -1)
        prefix = visible.new_full((packing.images, self.num_prefix_tokens), count)
        of_image = torch.cat([prefix, visible], 1).flatten()
        ids = torch.cat([of_image, of_image.new_full((packing.text_tokens,), count)])[packing.order]
        ids = ids[self.num_prefix_tokens :]
        if getattr(self.vit, "rope_mixed", False):
            return lambda layer: table[layer][:, ids]  # heads, R - P, d
        chosen = table[ids]  # R - P, d
        return lambda layer: chosen
