"""The words every room of mmssl shares: a sample, a batch, a loss.

Axes:
    B  samples of this rank's batch          T  text tokens of the batch, packed on one axis
    C, H, W  channels, height, width         S  segments of a packed axis (B, or B + 1 with padding); E = S + 1
    N  patches of a picture                  M  hidden text tokens of the batch
    V  visible patches, U hidden patches (V + U = N, the same for every sample)
    D  width of the backbone                 P  prefix tokens of the backbone (class, registers)

Never a bare ``mask``: papers disagree on its sign.  ``visible`` and ``hidden`` hold *indices*.
"""

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mmssl.draws import Draws


class BadSample(Exception):
    """A sample that cannot be used.  The stream replaces and counts it; ``reason`` is the counter's name."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return BadSample, (self.reason, self.detail)


@dataclass(slots=True)
class Sample:
    """One sample as it lies in a shard: raw bytes by extension, nothing decoded.

    ``key`` is the member name without extension, ``shard`` the shard's path or URL,
    ``members`` maps a lower-case extension ("jpg", "txt", "json", "cls") to its bytes.
    """

    key: str
    shard: str
    members: dict[str, bytes]


Moved = TypeVar("Moved", bound="_Movable")  # not Self, which beartype cannot check method by method


class _Movable:
    """Moves every tensor of a dataclass; Lightning and the DataLoader look for these two names."""

    def to(self: Moved, *args: Any, **kwargs: Any) -> Moved:
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self: Moved) -> Moved:
        return self._map(lambda value: value.pin_memory())

    def _map(self: Moved, move: Any) -> Moved:
        changes = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor | _Movable):
                changes[f.name] = move(value)
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass
class Image(_Movable):
    """Pictures of a batch and which of their patches are hidden (row-major patch indices, ascending)."""

    pixels: UInt8[Tensor, "B C H W"]
    visible: Int[Tensor, "B V"]
    hidden: Int[Tensor, "B U"]


@dataclass
class Text(_Movable):
    """Texts of a batch, packed on one axis: sample s owns ``cu_seqlens[s]:cu_seqlens[s + 1]``.

    ``input_ids`` are already corrupted; ``hidden`` points at the tokens to predict and ``labels`` holds what
    stood there.  With padding to a round T the last segment is the padding and S = B + 1.  ``max_seqlen`` is an
    upper bound of a segment's length, the same for every batch, so that compiled kernels see one value.
    """

    input_ids: Int[Tensor, " T"]
    cu_seqlens: Int[Tensor, " E"]
    max_seqlen: int
    hidden: Int[Tensor, " M"]
    labels: Int[Tensor, " M"]


@dataclass
class Batch(_Movable):
    """What the loader yields.  ``index`` counts the global batches since the start of training.

    ``valid`` is None in training.  In validation it is False for the samples that only pad the last batches so
    that every rank has equally many; a padded sample has no hidden text tokens and no weight in any metric.
    """

    index: int
    keys: list[str]
    image: Image | None = None
    text: Text | None = None
    # For fine-tuning: classes (-1 where none is known); many classes or numbers (NaN where they are not known).
    labels: Int[Tensor, " B"] | Float[Tensor, "B K"] | None = None
    valid: Bool[Tensor, " B"] | None = None
    counts: dict[str, int] = field(default_factory=dict)  # items that each loss averages over, e.g. {"text": 812}
    window: dict[str, int] | None = None  # this rank's counts over the whole accumulation window
    bad: list[tuple[str, str]] = field(default_factory=list)  # (shard, reason) of every sample that was replaced
    source: str = ""  # of several sources, the one whose samples these are

    @property
    def size(self) -> int:
        return len(self.keys)

    @property
    def notes(self) -> dict[str, int]:
        """What the stream counted, by name, for instance {"bad/truncated": 2}."""
        return dict(Counter(f"bad/{reason}" for _, reason in self.bad))


class Loss(NamedTuple):
    """A sum over this rank's items and their number; the module divides once by the number over all ranks."""

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


@runtime_checkable
class Prepare(Protocol):
    """The half of an objective that runs in the loader's workers.  Must be picklable and hold no weights."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Of "image", "text": what a shard must contain."""
        ...

    def sample(self, sample: Sample, draws: Draws, index: int) -> Any:
        """Decode, augment, tokenize, draw what is hidden.

        ``index`` is the global batch, for schedules; always 0 in evaluation, where schedules rest at their end.

        Raises BadSample.
        """
        ...

    def collate(self, examples: list[Any], valid: list[bool] | None = None) -> Batch:
        """Stack and pack; leaves ``index``, ``keys``, ``window``, ``bad`` and ``source`` to the stream."""
        ...


def ceil_to(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least n."""
    return -(-n // multiple) * multiple


def segment_ids(cu_seqlens: Int[Tensor, " E"], total: int) -> Int[Tensor, " T"]:
    """The segment of every token of a packed axis, without a device synchronisation."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)


def positions_in_segment(cu_seqlens: Int[Tensor, " E"], total: int) -> Int[Tensor, " T"]:
    """The position of every token of a packed axis within its segment, from 0, without a device synchronisation."""
    return torch.arange(total, device=cu_seqlens.device) - cu_seqlens[segment_ids(cu_seqlens, total)]
