"""The sources of a mixture as a config names them, and whether their shards hold what the objective needs."""

from itertools import takewhile
from typing import Literal, NotRequired, TypedDict

from lightning.pytorch.utilities import rank_zero_warn

from mmssl.data.members import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, missing, sample_text
from mmssl.data.remote import shown
from mmssl.data.shards import ShardSet
from mmssl.data.tar import ShardError
from mmssl.types import BadSample, Prepare, Sample


class SourceConfig(TypedDict):
    """One source of a mixture: its shards, its weight (1 by default), and what it has only, where others have pairs."""

    shards: str | list[str]
    weight: NotRequired[float]
    only: NotRequired[Literal["image", "text"]]


def read_sources(train: str | list[str] | dict[str, SourceConfig]) -> dict[str, SourceConfig]:
    """The sources by name; plain shards are one source, "train".  Raises ValueError for what makes no sense."""
    if not isinstance(train, dict):
        return {"train": {"shards": train}}
    if not train:
        raise ValueError("train names no source; give {name: {shards: ..., weight: ...}}")
    for name, source in train.items():
        unknown = set(source) - {"shards", "weight", "only"}
        if unknown or "shards" not in source:
            raise ValueError(f"source {name!r} has {sorted(source)}; give shards and, if you like, weight and only")
        if source.get("weight", 1.0) <= 0:
            raise ValueError(f"source {name!r} has weight {source['weight']}; give one above 0, or leave it out")
        if source.get("only", "image") not in ("image", "text"):
            raise ValueError(f"source {name!r} has only: {source['only']}; give image or text, or leave it out")
    return train


def prepare_of(name: str, source: SourceConfig, prepare: Prepare, objective: str) -> Prepare:
    """What prepares a source: the objective's half, or the part of it that its samples have.

    Raises:
        ValueError: the objective cannot do with images or texts alone.
    """
    if "only" not in source or prepare.needs == (source["only"],):
        return prepare
    part = getattr(prepare, "only", None)
    if part is None:
        raise ValueError(
            f"source {name!r} has only: {source['only']}, but {objective} needs {' and '.join(prepare.needs)} in every "
            "sample; take mmssl.MMM, or leave the source out"
        )
    own: Prepare = part(source["only"])
    return own


def _title(need: str) -> str:
    return "label (.cls, or a field of .json that label_key names)" if need == "label" else need


def check_members(shards: ShardSet, prepare: Prepare, objective: str) -> None:
    """Raises ShardError for the first shard that lacks what the objective needs; warns of members left out."""
    for shard in shards.shards:
        lacking = missing(prepare.needs, shard.extensions)
        if lacking:
            absent = " and no ".join(map(_title, lacking))
            raise ShardError(
                f"shard {shown(shard.path)}: has no {absent} (found: {', '.join(shard.extensions)}); "
                f"{objective} needs {' and '.join(prepare.needs)} in every sample{_alone(prepare, lacking)}"
            )
    if "text" in prepare.needs and "txt" not in shards.shards[0].extensions:
        errors = list(takewhile(bool, map(_text_error, map(shards.read, range(min(8, len(shards)))))))
        if len(errors) == min(8, len(shards)):  # a single bad sample is the stream's business
            raise ShardError(
                f"shard {shown(shards.shards[0].path)}: has no .txt, and {errors[0]}; "
                f"{objective} needs text in every sample{_alone(prepare, ['text'])}"
            )
    if (check := getattr(prepare, "check", None)) is not None:  # what more there is to know before a run
        check(shards)
    skipped = {kind: n for kind, n in shards.skipped.items() if kind != "folder"}
    for extension, n in shards.extensions.items():
        if extension.rpartition(".")[2] in {*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS} and "." in extension:
            skipped[f".{extension} (a key ends at the first dot of a name)"] = n
    if skipped:
        found = ", ".join(f"{n} x {kind}" for kind, n in skipped.items())
        rank_zero_warn(f"{shown(shards.shards[0].path)} and the shards after it: members that are not read: {found}")


def _alone(prepare: Prepare, lacking: list[str]) -> str:
    """How an objective of pairs takes such shards all the same."""
    there = [need for need in prepare.needs if need not in lacking]
    return f", or give the source only: {there[0]}" if len(there) == 1 and hasattr(prepare, "only") else ""


def _text_error(sample: Sample) -> str:
    try:
        sample_text(sample)
    except BadSample as error:
        return f"sample {sample.key} no caption in its json ({error})"
    return ""
