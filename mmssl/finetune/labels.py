"""The label of a sample: from its .cls, or from a field of its .json."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from mmssl.data.shards import ShardSet
from mmssl.finetune.targets import Target
from mmssl.types import BadSample, Sample

_LOOKED_AT = 64  # samples, before a run


@dataclass(frozen=True)
class Labels:
    """Reads what ``target`` is given.

    Args:
        target: one class, many, or numbers.
        key: field of the sample's .json that holds the label; None for the .cls, as text.
        required: False gives ``target.unknown`` where there is no usable label (predictions need none).
    """

    target: Target
    key: str | None = None
    required: bool = True

    def of(self, sample: Sample) -> Any:
        """The label.

        Raises:
            BadSample: ``no_label``, ``label_not_a_number``, ``label_out_of_range`` or ``label_of_wrong_length``.
        """
        try:
            return self._read(sample)
        except BadSample:
            if self.required:
                raise
            return self.target.unknown

    def check(self, shards: ShardSet) -> None:
        """Raises ValueError if none of a few samples, spread over the shards, has a usable label."""
        count = min(_LOOKED_AT, len(shards))
        if not self.required or not count:
            return
        reasons: Counter[str] = Counter()
        first = ""
        values: list[int] = []
        for i in range(count):
            try:
                self._read(shards.read(i * len(shards) // count))
                return
            except BadSample as error:
                reasons[error.reason] += 1
                first = first or error.detail
                if error.reason == "label_out_of_range":
                    values.append(int(error.detail.split()[0]))
        where = "in the .cls" if self.key is None else f"in the field {self.key!r} of the .json"
        if len(values) == count:
            remedy = f"set model.num_classes to {max(values) + 1} or more" if min(values) >= 0 else "classes begin at 0"
            raise ValueError(
                f"all {count} labels looked at {where} lie outside 0 to {self.target.count - 1} (they go from "
                f"{min(values)} to {max(values)}, num_classes is {self.target.count}); {remedy}"
            )
        found = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
        raise ValueError(
            f"none of {count} samples looked at has a label {where} ({found}; the first: {first}; the first shard is "
            f"{shards.shards[0].path}); {self._remedy(reasons)}"
        )

    def _remedy(self, reasons: Counter[str]) -> str:
        if "label_of_wrong_length" in reasons:
            return "set model.num_classes to how many numbers a label has"
        numbers = "numbers" if self.target.kind == "regression" else "whole numbers from 0"
        source = "set model.label_key to the json's field with the label, or null for .cls; of plain files data.label"
        return f"{self.target.kind} takes {numbers}; {source} names the column"

    def _read(self, sample: Sample) -> Any:
        if self.key is not None:
            return self.target.read(self._field(sample, self.key))
        text = self._text(sample)
        return self.target.read([] if text.strip() == "[]" else text)  # as in a .json: none of them

    @staticmethod
    def _text(sample: Sample) -> str:
        if "cls" not in sample.members:
            raise BadSample("no_label", f"no .cls; members {', '.join(sorted(sample.members))}")
        return sample.members["cls"].decode("utf-8", errors="backslashreplace")

    @staticmethod
    def _field(sample: Sample, key: str) -> Any:
        if "json" not in sample.members:
            raise BadSample("no_label", f"no .json; members {', '.join(sorted(sample.members))}")
        try:
            fields = json.loads(sample.members["json"].decode("utf-8").removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError, too
            raise BadSample("not_json", str(error)) from error
        value = fields.get(key) if isinstance(fields, dict) else None
        if value is None:
            raise BadSample("no_label", f"the json has no {key!r}")
        return value
