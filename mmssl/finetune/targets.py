"""What a sample is given: one class, any number of classes, or numbers.  How each is read, compared and measured.

Axes: B samples, K classes or values.
"""

import json
import math
import re
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision, MultilabelF1Score
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from mmssl.types import BadSample

Kind = Literal["class", "multilabel", "regression"]

_PADDING = -1  # what the metrics take for the label of a sample that is padding
_LARGEST = torch.finfo(torch.float32).max
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class Target:
    """Base of the kinds.

    Attributes:
        count: K, the classes or values.
        unknown: the label of a sample that has none, where none is needed.
    """

    kind: ClassVar[Kind]
    least: ClassVar[int] = 1  # classes or values that make sense

    def __init__(self, count: int) -> None:
        self.count = count
        self.unknown: Any = [math.nan] * count

    def read(self, value: Any) -> Any:
        """A label from the text of a .cls or a value of a .json.

        Raises:
            BadSample: ``no_label``, ``label_not_a_number``, ``label_out_of_range`` or ``label_of_wrong_length``.
        """
        raise NotImplementedError

    def stack(self, labels: list[Any]) -> Tensor:
        """The labels of a batch."""
        return torch.tensor(labels)

    def errors(self, logits: Float[Tensor, "B K"], labels: Tensor, smoothing: float) -> Float[Tensor, " B"]:
        """The loss of each sample."""
        raise NotImplementedError

    def hits(self, logits: Float[Tensor, "B K"], labels: Tensor) -> dict[str, Tensor]:
        """What is counted in training, too: sums over the samples."""
        return {}

    def metrics(self) -> dict[str, Any]:
        """torchmetrics of the evaluation, by name."""
        raise NotImplementedError

    def scores(self, logits: Float[Tensor, "B K"], labels: Tensor, valid: Bool[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """What the metrics take: of no valid sample, too, so that every rank's metrics have the same shapes."""
        raise NotImplementedError

    def row(self, logits: Float[Tensor, " K"], label: Tensor) -> dict[str, Any]:
        """A prediction as it is written to a file; null, not NaN, where a logit is not finite."""
        raise NotImplementedError


class OneClass(Target):
    """One of K classes: cross-entropy; ``accuracy``, and ``accuracy_top5`` where there are more than five."""

    kind: ClassVar[Kind] = "class"
    least: ClassVar[int] = 2

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.unknown = -1

    def read(self, value: Any) -> int:
        return _class(value, self.count)

    def errors(self, logits: Float[Tensor, "B K"], labels: Tensor, smoothing: float) -> Float[Tensor, " B"]:
        """``labels`` may be distributions over the classes."""
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def hits(self, logits: Float[Tensor, "B K"], labels: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (logits.argmax(-1) == labels).sum().float()}

    def metrics(self) -> dict[str, Any]:
        common: dict[str, Any] = {"average": "micro", "ignore_index": _PADDING}
        found: dict[str, Any] = {"accuracy": MulticlassAccuracy(self.count, **common)}
        if self.count > 5:
            found["accuracy_top5"] = MulticlassAccuracy(self.count, top_k=5, **common)
        return found

    def scores(self, logits: Float[Tensor, "B K"], labels: Tensor, valid: Bool[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        return logits, labels.masked_fill(~valid, _PADDING)

    def row(self, logits: Float[Tensor, " K"], label: Tensor) -> dict[str, Any]:
        truth, finite = int(label), _finite(logits)
        return {
            "label": int(logits.argmax()) if finite else None,
            "truth": truth if truth >= 0 else None,
            "probabilities": _rounded(torch.softmax(logits, -1)) if finite else None,
        }


class ManyClasses(Target):
    """Any number of K classes: binary cross-entropy, averaged over the classes; ``mAP`` and ``f1`` (macro, at 0.5).

    A .cls holds the classes' numbers, with spaces or commas between them; a .json a list, which may be empty.
    """

    kind: ClassVar[Kind] = "multilabel"
    least: ClassVar[int] = 2

    def read(self, value: Any) -> Any:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
            if not value:
                raise BadSample("no_label", "empty")
        chosen = {_class(entry, self.count) for entry in (value if isinstance(value, list) else [value])}
        return [float(number in chosen) for number in range(self.count)]

    def errors(self, logits: Float[Tensor, "B K"], labels: Tensor, smoothing: float) -> Float[Tensor, " B"]:
        labels = labels.to(logits.dtype) * (1 - smoothing) + 0.5 * smoothing
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)

    def metrics(self) -> dict[str, Any]:
        return {
            "mAP": MultilabelAveragePrecision(self.count, average="macro", ignore_index=_PADDING),
            "f1": MultilabelF1Score(self.count, average="macro", ignore_index=_PADDING),
        }

    def scores(self, logits: Float[Tensor, "B K"], labels: Tensor, valid: Bool[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        return logits.sigmoid(), labels.long().masked_fill(~valid[:, None], _PADDING)

    def row(self, logits: Float[Tensor, " K"], label: Tensor) -> dict[str, Any]:
        known, finite = not bool(label.isnan().any()), _finite(logits)
        return {
            "labels": torch.nonzero(logits > 0).flatten().tolist() if finite else None,
            "truth": torch.nonzero(label > 0.5).flatten().tolist() if known else None,
            "probabilities": _rounded(logits.sigmoid()) if finite else None,
        }


class Numbers(Target):
    """K numbers: squared error, averaged over them; ``mae``, ``rmse`` and ``r2``.

    A .cls holds the numbers, with spaces or commas between them; a .json a number or a list of K.
    """

    kind: ClassVar[Kind] = "regression"

    def read(self, value: Any) -> Any:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        numbers = [_number(entry) for entry in (value if isinstance(value, list) else [value])]
        if not numbers:
            raise BadSample("no_label", "empty")
        if len(numbers) != self.count:
            raise BadSample("label_of_wrong_length", f"{len(numbers)} numbers, not {self.count}")
        return numbers

    def errors(self, logits: Float[Tensor, "B K"], labels: Tensor, smoothing: float) -> Float[Tensor, " B"]:
        return (logits - labels.to(logits.dtype)).square().mean(-1)

    def metrics(self) -> dict[str, Any]:
        return {
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
            "r2": _R2(),
        }

    def scores(self, logits: Float[Tensor, "B K"], labels: Tensor, valid: Bool[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        return logits[valid], labels[valid]

    def row(self, logits: Float[Tensor, " K"], label: Tensor) -> dict[str, Any]:
        return {
            "values": _rounded(logits) if _finite(logits) else None,
            "truth": None if bool(label.isnan().any()) else _rounded(label),
        }


class _R2(R2Score):
    """NaN, not an error, of fewer than two samples."""

    def compute(self) -> Tensor:
        return super().compute() if self.total >= 2 else torch.full((), math.nan, device=self.device)


_KINDS: dict[str, type[Target]] = {kind.kind: kind for kind in (OneClass, ManyClasses, Numbers)}


def make_target(kind: str, count: int) -> Target:
    """Raises ValueError for an unknown kind, or too few classes."""
    if kind not in _KINDS:
        raise ValueError(f"target is {kind!r}; choose class, multilabel or regression")
    chosen = _KINDS[kind]
    if count < chosen.least:
        what = "value" if kind == "regression" else "classes"
        raise ValueError(f"num_classes is {count}; there must be at least {chosen.least} {what}")
    return chosen(count)


def _class(value: Any, count: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        text = (value if isinstance(value, str) else json.dumps(value)).strip()
        if not text:
            raise BadSample("no_label", "empty")
        if not _INTEGER.fullmatch(text):
            raise BadSample("label_not_a_number", f"{text[:40]!r} is no integer")
        value = int(text)
    if not 0 <= value < count:
        raise BadSample("label_out_of_range", f"{value} is not within 0 to {count - 1}")
    return value


def _number(value: Any) -> float:
    shown = json.dumps(value)[:40]
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:  # NaN is not
        raise BadSample("label_not_a_number", f"{shown} is no finite number of float32")
    return number


def _finite(logits: Tensor) -> bool:
    return bool(logits.isfinite().all())


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
