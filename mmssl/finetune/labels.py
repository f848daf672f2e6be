"""The class of a sample: from its .cls, or from a field of its .json."""

import json
import re
from collections import Counter
from dataclasses import dataclass

from mmssl.data.shards import ShardSet
from mmssl.types import BadSample, Sample

UNKNOWN = -1  # a class that is not known, where none is needed
_LOOKED_AT = 64  # samples, before a run
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class Labels:
    """Reads classes 0 to ``num_classes`` - 1.

    Args:
        num_classes: how many classes there are.
        key: field of the sample's .json that holds the class; None for the .cls, an integer as text.
        required: False gives -1 where there is no usable class (predictions need none).
    """

    num_classes: int
    key: str | None = None
    required: bool = True

    def of(self, sample: Sample) -> int:
        """The class.

        Raises:
            BadSample: ``no_label``, ``label_not_a_number`` or ``label_out_of_range``.
        """
        try:
            return self._read(sample)
        except BadSample:
            if self.required:
                raise
            return UNKNOWN

    def check(self, shards: ShardSet) -> None:
        """Raises ValueError if none of a few samples, spread over the shards, has a usable class."""
        count = min(_LOOKED_AT, len(shards))
        if not self.required or not count:
            return
        reasons: Counter[str] = Counter()
        values: list[int] = []
        for i in range(count):
            try:
                self._read(shards.read(i * len(shards) // count))
                return
            except BadSample as error:
                reasons[error.reason] += 1
                if error.reason == "label_out_of_range":
                    values.append(int(error.detail.split()[0]))
        where = "in the .cls" if self.key is None else f"in the field {self.key!r} of the .json"
        if len(values) == count:
            remedy = f"set model.num_classes to {max(values) + 1} or more" if min(values) >= 0 else "classes begin at 0"
            raise ValueError(
                f"all {count} labels looked at {where} lie outside 0 to {self.num_classes - 1} (they go from "
                f"{min(values)} to {max(values)}, num_classes is {self.num_classes}); {remedy}"
            )
        found = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
        raise ValueError(
            f"none of {count} samples looked at has a label {where} ({found}; the first shard is "
            f"{shards.shards[0].path}); set model.label_key to the json's field with the class, or null for .cls"
        )

    def _read(self, sample: Sample) -> int:
        value = self._text(sample) if self.key is None else self._field(sample, self.key)
        if not 0 <= value < self.num_classes:
            raise BadSample("label_out_of_range", f"{value} is not within 0 to {self.num_classes - 1}")
        return value

    @staticmethod
    def _text(sample: Sample) -> int:
        if "cls" not in sample.members:
            raise BadSample("no_label", f"no .cls; members {', '.join(sorted(sample.members))}")
        return _number(sample.members["cls"].decode("utf-8", errors="backslashreplace"))

    @staticmethod
    def _field(sample: Sample, key: str) -> int:
        if "json" not in sample.members:
            raise BadSample("no_label", f"no .json; members {', '.join(sorted(sample.members))}")
        try:
            fields = json.loads(sample.members["json"].decode("utf-8").removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError, too
            raise BadSample("not_json", str(error)) from error
        value = fields.get(key) if isinstance(fields, dict) else None
        if value is None:
            raise BadSample("no_label", f"the json has no {key!r}")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        return _number(value if isinstance(value, str) else json.dumps(value))


def _number(text: str) -> int:
    text = text.strip()
    if not text:
        raise BadSample("no_label", "empty")
    if not _INTEGER.fullmatch(text):
        raise BadSample("label_not_a_number", f"{text[:40]!r} is no integer")
    return int(text)
