"""What a checkpoint remembers of the training data, and whether the data are still that.

The state is a few integers and a fingerprint for each source, the same on every rank.  The names and digests of the
single shards stand in a file of the run's folder, from which an error names the shards that changed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mmssl.data.index import ShardIndex
from mmssl.data.order import Order
from mmssl.data.remote import base_name
from mmssl.data.shards import ShardSet, fingerprint
from mmssl.data.stream import Source, TrainStream

ORDER = 2  # raised whenever the same state would give another order of samples
_FILE = "shards.json"
_NAMED = 5


def identity(stream: TrainStream) -> dict[str, Any]:
    """The state of a stream, but for its position."""
    return {
        "order": ORDER,
        "seed": stream.seed,
        "batch_size": stream.batch_size,
        "lanes": stream.orders[0].lanes,
        "sources": [_of_source(source, order) for source, order in zip(_sources(stream), stream.orders, strict=True)],
    }


def _sources(stream: TrainStream) -> list[Source]:
    return stream.samples.sources


def _of_source(source: Source, order: Order) -> dict[str, Any]:
    return {
        "name": source.name,
        "weight": source.weight,
        "shards": len(source.shards.shards),
        "fingerprint": source.shards.fingerprint,
        "history": [list(entry) for entry in order.history],
    }


def histories(saved: Mapping[str, Any], stream: TrainStream, folder: str, *, appended: bool) -> list[list[list[int]]]:
    """The histories with which the stream goes on where the saved run stopped.

    Args:
        saved: an earlier :func:`identity`, with the number of trained batches under "batches".
        stream: over the shards that are there now.
        folder: the run's, where :func:`write_shards_file` left the single shards' digests.
        appended: accept further shards behind the known ones; they come with each source's next epoch.

    Raises:
        ValueError: if samples would be repeated or left out; it names what changed and what to do.
    """
    if saved.get("order") != ORDER:
        raise ValueError(
            f"the checkpoint's order of samples is version {saved.get('order', 1)}, this mmssl makes version {ORDER}: "
            "samples would be repeated and left out; go on with the mmssl of the checkpoint, or begin a new run from "
            "the checkpoint's weights"
        )
    now = identity(stream)
    for name in ("seed", "batch_size", "lanes"):
        if saved[name] != now[name]:
            raise _changed(f"data.{name}", saved[name], now[name], f"set data.{name}: {saved[name]}")
    if _mixture(saved) != _mixture(now):
        before, after = (", ".join(f"{name} x {weight}" for name, weight in _mixture(s)) for s in (saved, now))
        raise _changed("the sources and weights in data.train", before, after, "restore them")
    given = stream.mixture.given(saved["batches"])
    return [
        _history(was, source, batches * stream.batch_size, folder, appended, stream.orders[0].lanes)
        for was, source, batches in zip(saved["sources"], _sources(stream), given, strict=True)
    ]


def _mixture(state: Mapping[str, Any]) -> list[tuple[str, float]]:
    sources = state["sources"]
    return [(source["name"], source["weight"] if len(sources) > 1 else 1.0) for source in sources]


def _history(
    was: Mapping[str, Any], source: Source, position: int, folder: str, appended: bool, lanes: int
) -> list[list[int]]:
    history: list[list[int]] = was["history"]
    known, found = was["shards"], source.shards.shards
    if source.shards.fingerprint == was["fingerprint"]:
        return history
    if len(found) > known and fingerprint(found[:known]) == was["fingerprint"]:
        more = [base_name(shard.path) for shard in found[known:]]
        if not appended:
            raise ValueError(
                f"{len(more)} shards were appended to source {source.name!r} since the checkpoint "
                f"({_names(more)}); set data.allow_appended: true to use them from the source's next epoch on, or name "
                "the earlier shards alone"
            )
        epoch, begin, _ = Order(history, lanes=lanes, seed=0).epoch_at(position)
        following = epoch if begin == position else epoch + 1
        return [*(entry for entry in history if entry[0] < following), [following, len(source.shards)]]
    raise ValueError(
        f"the training shards were {was['fingerprint']} in the checkpoint, now {source.shards.fingerprint}: samples "
        f"would be repeated and left out; {_difference(was, source, folder)}restore them to go on, or begin a new run "
        "from the checkpoint's weights"
    )


def _changed(what: str, before: Any, now: Any, remedy: str) -> ValueError:
    verb = "were" if " and " in what else "was"
    return ValueError(
        f"{what} {verb} {before} in the checkpoint, now {now}: samples would be repeated and left out; {remedy} to go "
        "on, or begin a new run from the checkpoint's weights"
    )


# ---- the single shards


def write_shards_file(stream: TrainStream, folder: str) -> None:
    """Leave names, numbers of samples and digests of all training shards in the run's folder, whole or not at all."""
    sources = {source.name: _entries(source.shards) for source in _sources(stream)}
    lines = ",\n".join(f'"{name}": [\n{_lines(entries)}\n]' for name, entries in sources.items())
    path = Path(folder) / _FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + lines + "\n}\n")
    os.replace(temporary, path)


def _entries(shards: ShardSet) -> list[list[Any]]:
    return [_entry(shard) for shard in shards.shards]


def _entry(shard: ShardIndex) -> list[Any]:
    return [base_name(shard.path), shard.samples, shard.digest]


def _lines(entries: Sequence[Sequence[Any]]) -> str:
    return ",\n".join(json.dumps(entry) for entry in entries)


def _difference(was: Mapping[str, Any], source: Source, folder: str) -> str:
    """Which shards changed, with a closing "; ", or nothing where that is not known."""
    try:
        before: list[list[Any]] = json.loads((Path(folder) / _FILE).read_text())[source.name]
    except (OSError, ValueError, KeyError):
        return ""
    if len(before) != was["shards"]:  # of another start than the checkpoint's
        return ""
    now = _entries(source.shards)
    old, new = {e[0]: e for e in before}, {e[0]: e for e in now}
    parts = {
        "changed": [name for name in old if name in new and old[name] != new[name]],
        "gone": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
    }
    if not any(parts.values()):
        moved = [a[0] for a, b in zip_longest(before, now) if a != b and a is not None]
        parts = {"in another order": moved}
    return "".join(f"{kind}: {_names(names)}; " for kind, names in parts.items() if names)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
