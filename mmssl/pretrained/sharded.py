"""Sharded checkpoints (``torch.distributed.checkpoint`` folders), read on one machine, tensor by tensor, safely.

Such a folder holds the ranks' tensors in ``*.distcp`` and a pickled table of contents in ``.metadata``, which torch's
own reader unpickles without asking what is in it.  Here only the classes of such a table are let through.  What
Lightning keeps beside (hyperparameters, loop states) is in ``meta.pt``.
"""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mmssl.pretrained.whole import CheckpointError, first_line

TABLE = ".metadata"
_PLAIN = {"collections": {"OrderedDict"}, "pathlib": {"Path", "PosixPath", "PurePosixPath", "PurePath"}}
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
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


class _Reader(dcp.FileSystemReader):
    """torch's reader with a table of contents that was read already."""

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

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table = read_table(folder)
        if damage := _damage(folder, self._table):
            raise CheckpointError(f"cannot load {folder}: {damage}; name another checkpoint")
        entries = self._table.state_dict_metadata.items()
        self._entries = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this is one process
                dcp.load({name: tensor}, storage_reader=_Reader(self._folder, self._table), no_dist=True)
        except (dcp.api.CheckpointException, RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"cannot load {name} of {self._folder}: {first_line(error)}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


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


def damage_of_sharded(folder: Path) -> str | None:
    """Why a folder is not a whole sharded checkpoint, or None when it is; compares the shards' sizes with the table."""
    if not (folder / TABLE).is_file():
        return f"the folder is no sharded checkpoint (no {TABLE})"
    try:
        return _damage(folder, read_table(folder))
    except CheckpointError as error:
        return first_line(error)


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
