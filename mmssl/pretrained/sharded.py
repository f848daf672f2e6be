"""Sharded checkpoints (``torch.distributed.checkpoint`` folders), read on one machine, tensor by tensor, safely.

Such a folder holds the ranks' tensors in ``*.distcp`` and a pickled table of contents in ``.metadata``, which torch's
own reader unpickles without asking what is in it.  Here only the classes of such a table are let through.  What
Lightning keeps beside (hyperparameters, loop states) is in ``meta.pt``; in a folder of mmssl's own it also says where
each tensor belongs in a checkpoint, and ``checksums.json`` holds the size and the CRC-32 of every other file.
"""

import io
import json
import pickle
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mmssl.pretrained.whole import CheckpointError, damage_of, first_line

TABLE, META, CHECKSUMS = ".metadata", "meta.pt", "checksums.json"
PLACES = "tensor_places"  # in META: of every tensor's name in TABLE, the keys that lead to it in the checkpoint
_PLAIN = {"collections": {"OrderedDict"}}
# Python 3.13 pickles them under another module's name; read as one that every version has, on every system.
_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath"}
_TORCH = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class _Unpickler(pickle.Unpickler):
    """Lets through what a table of contents is made of, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in {**_PLAIN, **_TORCH}.get(module, ()):
            return super().find_class(module, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePosixPath
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


class TableReader(dcp.FileSystemReader):
    """torch's reader with a table of contents that was read already, by :func:`read_table`."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(folder)
        self._table = table

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._table


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a sharded checkpoint by name; each is put together from its shards when it is asked for.

    Raises:
        CheckpointError: the folder is no sharded checkpoint, its table holds more than that, or a shard is cut short.
    """

    def __init__(self, folder: Path, thorough: bool = True) -> None:
        self._folder = folder
        if damage := damage_of_sharded(folder, thorough):
            raise CheckpointError(f"cannot load {folder}: {damage}; name another checkpoint")
        self.table = read_table(folder)
        entries = self.table.state_dict_metadata.items()
        self.entries = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.read_into({name: tensor})
        return tensor

    def read_into(self, targets: dict[str, Tensor]) -> None:
        """Fill ``targets`` by name, in one go: torch leaves what it read for one call to the garbage collector."""
        load_into(targets, TableReader(self._folder, self.table), self._folder)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def load_into(targets: dict[str, Tensor], reader: dcp.StorageReader, path: Path) -> None:
    """Fill ``targets``, by name, with what ``reader`` finds for them; of a sharded one, this rank's part.

    Every rank reads for itself: there is nothing that one could wait for.

    Raises:
        CheckpointError: a tensor is missing, of another size, or cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this is one process
            dcp.load(targets, storage_reader=reader, no_dist=True)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, OSError, pickle.UnpicklingError) as error:
        failures = getattr(error, "failures", {})
        reason = first_line(failures[min(failures)][0]) if failures else first_line(error)
        raise CheckpointError(f"cannot load {path}: {reason}") from error


def read_table(folder: Path) -> Metadata:
    """The table of contents of a sharded checkpoint.

    Raises:
        CheckpointError: there is none, or it is something else.
    """
    try:
        table = _Unpickler(io.BytesIO((folder / TABLE).read_bytes())).load()
    except (pickle.UnpicklingError, OSError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise CheckpointError(f"cannot load {folder}: its {TABLE} cannot be read safely ({reason})") from error
    if not isinstance(table, Metadata) or table.storage_data is None:
        raise CheckpointError(f"cannot load {folder}: its {TABLE} is no table of contents")
    return table


def read_meta(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside its tensors; nothing if there is no file of it.

    Raises:
        CheckpointError: the file cannot be read as tensors and plain values.
    """
    if not (folder / META).is_file():
        return {}
    if damage := damage_of(folder / META):
        raise CheckpointError(f"cannot load {folder}: {META}: {damage}")
    try:
        content = torch.load(folder / META, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"cannot load {folder}: {META} cannot be read ({first_line(error)})") from error
    return content if isinstance(content, dict) else {}


def read_whole(folder: Path) -> dict[str, Any]:
    """All of a sharded checkpoint, as the file that one process would have written holds it.

    Takes as much memory as the checkpoint has bytes, and that of one shard of one tensor more.  Its checksums are
    :func:`damage_of_sharded`'s to compare, before.

    Raises:
        CheckpointError: a file is missing or cut short, or mmssl's training did not write the folder.
    """
    content, places = split_meta(folder)
    tensors = ShardedTensors(folder, thorough=False)
    found = {name: entry for name, entry in tensors.entries.items() if name in places}
    if missing := places.keys() - found.keys():
        raise CheckpointError(f"cannot load {folder}: its {TABLE} has no {min(missing)}")
    filled = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    load_into(filled, TableReader(folder, tensors.table), folder)
    for name, place in places.items():
        put(content, place, filled[name])
    return content


def split_meta(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(the checkpoint without its tensors, the keys that lead to each of them by its name in the table).

    Raises:
        CheckpointError: the folder is of another origin, and does not say.
    """
    content = read_meta(folder)
    places = content.pop(PLACES, None)
    if not isinstance(places, dict):
        raise CheckpointError(
            f"cannot load {folder}: mmssl's training did not write it, so a run cannot go on from it; "
            "mmssl.load_backbone and model.init_from take its weights"
        )
    return content, places


def put(content: dict[str, Any], place: list[Any], tensor: Tensor) -> None:
    """Set ``content[place[0]][place[1]]...`` to ``tensor``."""
    inner: Any = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = tensor


def checksum(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file, read in pieces."""
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def damage_of_sharded(folder: Path, thorough: bool = True) -> str | None:
    """Why a folder is not a whole sharded checkpoint, or None when it is.

    Reads all of a folder that has checksums, once, if it is to be thorough; otherwise it compares sizes.
    """
    if not (folder / TABLE).is_file():
        return f"the folder is no sharded checkpoint (no {TABLE})"
    try:
        if damage := _damage(folder, read_table(folder)):
            return damage
        stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
        return _wrong_checksum(folder, tuple(stats), thorough)
    except CheckpointError as error:
        return first_line(error)
    except OSError as error:
        return error.strerror or str(error)


@lru_cache(maxsize=32)  # one start asks twice: when it looks for the newest, and when it loads it
def _wrong_checksum(folder: Path, stats: tuple[tuple[str, int, int], ...], thorough: bool) -> str | None:
    if not (folder / CHECKSUMS).is_file():
        return f"its {CHECKSUMS} is not there" if PLACES in read_meta(folder) else None
    try:
        written = json.loads((folder / CHECKSUMS).read_text())["files"]
        sizes = {name: size for name, size, _ in stats}
        for name, (size, _) in sorted(written.items()):
            if name not in sizes:
                return f"its file {name} is not there"
            if sizes[name] != size:
                return f"its file {name} is damaged ({sizes[name]} of {size} bytes)"
        if thorough:
            with ThreadPoolExecutor(8) as threads:  # reading and adding up both leave Python's lock
                found = dict(zip(written, threads.map(lambda name: checksum(folder / name), written), strict=True))
            if wrong := [name for name, values in found.items() if values != written[name]]:
                return f"its file {min(wrong)} is damaged (wrong checksum)"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {CHECKSUMS} is damaged ({first_line(error)})"
    return None if {TABLE, META} <= written.keys() else f"its {CHECKSUMS} is incomplete"


def _damage(folder: Path, table: Metadata) -> str | None:
    ends: dict[str, int] = {}
    for place in table.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = folder / name
        if path.resolve().parent != folder.resolve():
            return f"its {TABLE} names {name}, outside the folder"
        if not path.is_file():
            return f"its shard {name} is not there"
        if path.stat().st_size < end:
            return f"its shard {name} is cut short ({path.stat().st_size} of {end} bytes)"
    return None
