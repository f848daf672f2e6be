"""Attention over packed tokens: many samples on one axis, each attending to its own segment only.

timm's attention layers (``Attention``, ``AttentionRope``, ``EvaAttention``) hand ``attn_mask`` untouched to
``torch.nn.functional.scaled_dot_product_attention``.  A :class:`Packing` travels there in its place and answers
that call itself, through torch's override protocol (``__torch_function__``, also understood by torch.compile).
So one mechanism serves every layer, and the layers, their parameters and names remain timm's own.

Exported graphs cannot look at lengths while they run: for them :class:`Padded` travels there.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mmssl.types import Text, segment_ids

_SHORT = 256  # tokens; beyond, the quadratic memory of written-out products costs more than it saves
_STRETCH = 1.5  # segments are padded, for attention alone, to at most this many times their length


class Group(NamedTuple):
    """Neighbouring segments that are attended together: ``number`` of them, padded to ``length`` tokens.

    Their ``rows`` are one slice of the packed axis.  ``spread[j]`` is the row of the slice at padded place j (0 for
    padding), ``places[i]`` the padded place of row i, ``real`` marks the padded places that hold a row; all three are
    None where every segment has this length.
    """

    number: int
    length: int
    rows: int
    spread: Int[Tensor, " J"] | None = None
    places: Int[Tensor, " I"] | None = None
    real: Bool[Tensor, "n 1 L"] | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Group":
        """Segments of these ascending lengths."""
        longest, rows = lengths[-1], sum(lengths)
        if lengths[0] == longest:
            return cls(len(lengths), longest, rows)
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]  # n, L
        places = real.flatten().nonzero()[:, 0]
        spread = torch.zeros(len(lengths) * longest, dtype=torch.int64)
        spread[places] = torch.arange(rows)
        return cls(len(lengths), longest, rows, spread.to(device), places.to(device), real[:, None].to(device))


class _Spread(torch.autograd.Function):
    """Rows to padded places.  Nothing flows back from padding: as keys it is masked, as queries it is thrown away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.index_select(1, cast(Tensor, group.spread))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(1, ctx.group.places), None


class _Collect(torch.autograd.Function):
    """Padded places to rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.padded = group, x.shape[1]
        return x.index_select(1, cast(Tensor, group.places))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        out = grad.new_zeros(grad.shape[0], ctx.padded, grad.shape[2])
        return out.index_copy_(1, ctx.group.places, grad), None


class _Permute(torch.autograd.Function):
    """x[:, order]; the gradient is a gather with the inverse, not the slow index_add that indexing would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(1, inverse), None, None


class Layout:
    """Where the tokens of a batch lie, and which attend to which; travels through timm's layers as ``attn_mask``."""

    images: int  # number of samples with image tokens on one axis; 0 for text alone
    image_tokens: int  # per image
    text_tokens: int | torch.SymInt  # of the whole axis; symbolic while a graph is made
    order: Any  # index that brings [all image tokens, then all text tokens] to where they lie

    def to_packed(self, rows: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        """From the source order (image tokens, then text tokens) to where they lie."""
        raise NotImplementedError

    def to_source(self, x: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        """From where they lie back to the source order."""
        raise NotImplementedError

    def attend(
        self, q: Float[Tensor, "B h R d"], k: Float[Tensor, "B h R d"], v: Float[Tensor, "B h R d"]
    ) -> Float[Tensor, "B h R d"]:
        """softmax(q k^T / sqrt(d)) v within each sample."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return NotImplemented
        q, k, v = args
        options = dict(kwargs or {})
        layout: Layout = options.pop("attn_mask")
        if options.get("dropout_p") or options.get("is_causal"):
            raise ValueError("packed attention has neither dropout nor a causal form; set attn_drop_rate to 0")
        return layout.attend(q, k, v)


@dataclass(eq=False)
class Packing(Layout):
    """How the tokens of several samples lie on one axis, and attention over it.

    The segment of sample s is [its ``image_tokens`` image tokens, its text tokens].  Two layouts:

    - varlen (CUDA, half precision): segments in the samples' order, no device synchronisation.
    - grouped (elsewhere): segments sorted by length, so that those of about one length form one slice, which is
      padded for attention alone; tokens are permuted once on the way in and once on the way out.

    ``order[j]`` is the source row (all image tokens, then all text tokens) of packed row j, ``inverse`` undoes it;
    None where they would be the identity.
    """

    images: int  # number of samples with image tokens; 0 for text alone
    image_tokens: int  # per image
    text_tokens: int  # of the whole batch
    cu_seqlens: Int[Tensor, " E"]  # of the packed axis, int32; E = S + 1
    max_seqlen: int
    groups: list[Group] | None  # None: varlen
    order: Int[Tensor, " R"] | None
    inverse: Int[Tensor, " R"] | None
    segments: Int[Tensor, " R"]  # segment of every packed row

    @classmethod
    def of(cls, text: Text, images: int, image_tokens: int, varlen: bool) -> "Packing":
        """Lay out ``text`` together with ``images`` x ``image_tokens`` image tokens (0 x 0 for text alone).

        The text has one segment per image, and may have one more: padding, which stays last and has no image.

        Raises:
            ValueError: the number of segments does not fit the images, or (where the lengths can be read without
                waiting for a device) ``cu_seqlens`` does not fit the tokens or a segment exceeds ``max_seqlen``.
        """
        cu, rows = text.cu_seqlens, text.input_ids.shape[0]
        count, device = len(cu) - 1, cu.device
        if images and count not in (images, images + 1):
            raise ValueError(
                f"{images} images came with {count} text segments; give one per image (and at most one of padding)"
            )
        with_image = (torch.arange(count, device=device) < images) * image_tokens
        lengths = cu.diff() + with_image
        groups = None
        start = lengths.cumsum(0) - lengths
        if not varlen:
            host = cu.tolist()
            _check(host, rows, text.max_seqlen)
            packed = [b - a + (image_tokens if s < images else 0) for s, (a, b) in enumerate(itertools.pairwise(host))]
            # Padding stays last also here: a row of image tokens then leads the axis (see Backbone, rotary).
            ranked = sorted(range(count), key=lambda s: (s >= images > 0, packed[s]))
            ascending, padding = [packed[s] for s in ranked], images or count
            runs = [*_alike(ascending[:padding]), *_alike(ascending[padding:])]
            groups = [Group.of(run, device) for run in runs]
            by_rank = torch.tensor(ranked, device=device)
            lengths = lengths[by_rank]
            start = torch.empty_like(start).scatter_(0, by_rank, lengths.cumsum(0) - lengths)
        cu_packed = F.pad(lengths.cumsum(0), (1, 0)).int()

        owner = segment_ids(cu, rows)
        order = inverse = None
        segments = owner
        if images or not varlen:
            of_image = start[:images, None] + torch.arange(image_tokens, device=device)
            of_text = (start + with_image - cu[:-1])[owner] + torch.arange(rows, device=device)
            inverse = torch.cat([of_image.flatten(), of_text])
            order = torch.empty_like(inverse).scatter_(0, inverse, torch.arange(len(inverse), device=device))
            owners = torch.cat([torch.arange(images, device=device).repeat_interleave(image_tokens), owner])
            segments = owners[order]
        longest = text.max_seqlen + image_tokens
        return cls(images, image_tokens, rows, cu_packed, longest, groups, order, inverse, segments)

    def pack(self, image: Float[Tensor, "B K D"] | None, text: Float[Tensor, "T D"]) -> Float[Tensor, "1 R D"]:
        """Bring the tokens onto one axis."""
        rows = text if image is None else torch.cat([image.flatten(0, 1), text.to(image.dtype)])
        return self.to_packed(rows[None])

    def unpack(self, x: Float[Tensor, "1 R D"]) -> tuple[Float[Tensor, "B K D"] | None, Float[Tensor, "T D"]]:
        """The way back: (image tokens or None, text tokens)."""
        rows = self.to_source(x)[0]
        image, text = rows.split([self.images * self.image_tokens, self.text_tokens])
        return (image.unflatten(0, (self.images, self.image_tokens)) if self.images else None), text

    def to_packed(self, rows: Float[Tensor, "1 R D"]) -> Float[Tensor, "1 R D"]:
        """From the source order (image tokens, then text tokens) to the packed order."""
        return rows if self.order is None else _Permute.apply(rows, self.order, self.inverse)

    def to_source(self, x: Float[Tensor, "1 R D"]) -> Float[Tensor, "1 R D"]:
        """From the packed order back to the source order."""
        return x if self.order is None else _Permute.apply(x, self.inverse, self.order)

    def attend(
        self, q: Float[Tensor, "1 h R d"], k: Float[Tensor, "1 h R d"], v: Float[Tensor, "1 h R d"]
    ) -> Float[Tensor, "1 h R d"]:
        """softmax(q k^T / sqrt(d)) v within each segment."""
        if self.groups is None:
            # Contiguous: cuDNN's kernel in torch before 2.15 ignores strides.  A norm on q and k leaves them fp32.
            q, k, v = (x[0].transpose(0, 1).to(v.dtype).contiguous() for x in (q, k, v))
            out = varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen)
            return cast(Tensor, out).transpose(0, 1)[None]
        parts = []
        # split, not slices: its backward is one concatenation instead of one zero-filled tensor per group.
        sizes = [group.rows for group in self.groups]
        for group, *qkv in zip(self.groups, *(x[0].to(v.dtype).split(sizes, 1) for x in (q, k, v)), strict=True):
            if group.spread is not None:
                qkv = [_Spread.apply(x, group) for x in qkv]
            dense = [x.unflatten(1, (group.number, group.length)) for x in qkv]  # h, n, L, d
            out = _attend_dense(dense[0], dense[1], dense[2], group.real).flatten(1, 2)
            parts.append(out if group.spread is None else _Collect.apply(out, group))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[None]


@dataclass(eq=False)
class Padded(Layout):
    """A sample a row: its image tokens, its text tokens, padding.  What is computed depends on shapes alone.

    ``real`` marks the tokens that are no padding.  For exported graphs; training packs, for padding costs time.
    """

    image_tokens: int
    text_tokens: int | torch.SymInt  # symbolic while a graph is made
    real: Bool[Tensor, "B R"]
    order = slice(None)

    @property
    def images(self) -> int:  # type: ignore[override]  # of each row
        return 1 if self.image_tokens else 0

    def to_packed(self, rows: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        return rows

    def to_source(self, x: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        return x

    def attend(
        self, q: Float[Tensor, "B h R d"], k: Float[Tensor, "B h R d"], v: Float[Tensor, "B h R d"]
    ) -> Float[Tensor, "B h R d"]:
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=self.real[:, None, None])


def _alike(lengths: list[int]) -> list[list[int]]:
    """Ascending lengths cut into runs that span at most _STRETCH; empty segments are left out."""
    runs: list[list[int]] = []
    for length in lengths:
        if length and runs and length <= _STRETCH * runs[-1][0]:
            runs[-1].append(length)
        elif length:
            runs.append([length])
    return runs


def _attend_dense(
    q: Float[Tensor, "h n L d"], k: Float[Tensor, "h n L d"], v: Float[Tensor, "h n L d"], real: Tensor | None
) -> Float[Tensor, "h n L d"]:
    """Attention of equally long segments; ``real`` marks the keys that are no padding.

    For short segments in half precision on a CPU the products are written out: the backward pass of torch's fused
    kernel is the slower there (tools/bench_attention.py measures both).
    """
    if v.device.type == "cpu" and v.dtype != torch.float32 and v.shape[2] <= _SHORT:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if real is not None:
            scores = scores + torch.zeros_like(real, dtype=scores.dtype).masked_fill_(~real, float("-inf"))
        return cast(Tensor, (torch.softmax(scores, -1).to(v.dtype) @ v).to(v.dtype))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=real)


def _check(cu_seqlens: list[int], rows: int, max_seqlen: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != rows:
        raise ValueError(
            f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}; it must run from 0 to {rows} tokens"
        )
    longest = max((b - a for a, b in itertools.pairwise(cu_seqlens)), default=0)
    if longest > max_seqlen:
        raise ValueError(f"a segment has {longest} tokens but max_seqlen is {max_seqlen}; it must bound every segment")


def has_varlen(x: Tensor, head_dim: int) -> bool:
    """Whether the variable-length kernel serves: CUDA (capability 8 on), half precision, a fitting head."""
    if not x.is_cuda:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    capable = torch.version.hip is not None or torch.cuda.get_device_capability(x.device)[0] >= 8
    return capable and dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
