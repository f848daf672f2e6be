"""Reading a checkpoint into a model that is spread over ranks, whatever number of them wrote it and in which form.

Each rank reads the parts that it holds, and agrees with the others on whether that worked.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor

from mmssl.pretrained.sharded import PLACES, TABLE, TableReader, load_into, put, read_table, split_meta
from mmssl.pretrained.whole import CheckpointError, first_line, read_checkpoint
from mmssl.training.sharded import split
from mmssl.training.together import fail_together, same_checkpoint


def load_sharded(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Fill a sharded model and its optimizers from a checkpoint, a folder of any number of ranks or a single file.

    Every rank reads its own part; all ranks call this together.

    Args:
        path: rank 0's counts.
        model: whose ``state_dict`` names the weights; sharded already.
        optimizers: over its parameters, in the order of the checkpoint; none where nothing is trained.

    Returns:
        What the checkpoint holds besides.

    Raises:
        CheckpointError: on every rank, if it is damaged, a rank does not see it, or it does not fit.
    """
    path = same_checkpoint(path)
    message: str | None = None
    content: dict[str, Any] = {}
    cause: Exception | None = None
    try:
        content = _filled(path, model, optimizers)
    except CheckpointError as error:
        message, cause = str(error), error
    except Exception as error:  # noqa: BLE001  # whatever it is, the others wait to be told; all raise it below
        message, cause = f"cannot load {path}: {type(error).__name__}: {first_line(error)}", error
    fail_together(message, cause=cause)
    return content


class _FileReader(dcp.StorageReader):
    """Reads the tensors of a single file as if each were the only shard of its own."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _entry(tensor) for name, tensor in self._tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        for item in plan.items:
            part = self._tensors[item.storage_index.fqn]
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(axis, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Any = torch.futures.Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _entry(tensor: Tensor) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.size())
    return TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.size(), [chunk])


def _filled(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    content: dict[str, Any]
    reader: dcp.StorageReader
    if path.is_dir():
        content, places = split_meta(path)
        table = read_table(path)
        sizes = {name: (entry.size, entry.properties.dtype) for name, entry in _tensors_of(table).items()}
        reader = TableReader(path, table)
    else:
        # Mapped into memory: each rank reads its own part.
        content, tensors = split(read_checkpoint(path, tensors=False, thorough=False))
        places = content.pop(PLACES)
        sizes = {name: (tensor.size(), tensor.dtype) for name, tensor in tensors.items()}
        reader = _FileReader(tensors)
    own = model.state_dict()
    _check_names(path, own, {place[1] for place in places.values() if place[0] == "state_dict"})
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    targets: dict[str, Tensor] = {}
    for name, place in places.items():
        if name not in sizes:
            raise CheckpointError(f"cannot load {path}: its {TABLE} has no {name}")
        size, dtype = sizes[name]
        if place[0] == "state_dict":
            if own[place[1]].size() != size:
                raise CheckpointError(
                    f"cannot load {path}: {place[1]} is {tuple(size)} there and {tuple(own[place[1]].size())} in the "
                    "model; was the config changed since?"
                )
            targets[name] = own[place[1]]
        elif place[0] == "optimizer_states":
            if place[1] < len(optimizers):
                like = _parameter(path, parameters[place[1]], place)
                targets[name] = _like(like, size, dtype)
        else:  # an average of the weights, beside them
            targets[name] = _like(own.get(str(place[-1])), size, dtype)
    load_into(targets, reader, path)
    for name, place in places.items():
        if name in targets and place[0] != "state_dict":
            put(content, place, targets[name])
    for optimizer, state in zip(optimizers, content.get("optimizer_states", []), strict=False):
        optimizer.load_state_dict(state)
    return content


def _tensors_of(table: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = table.state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _check_names(path: Path, own: dict[str, Any], saved: set[str]) -> None:
    for what, names in (("it lacks", own.keys() - saved), ("the model has no", saved - own.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"cannot load {path}: it does not fit the model; was the config changed since? "
                f"({what} {', '.join(sorted(names)[:3])}{more})"
            )


def _parameter(path: Path, parameters: list[Tensor], place: list[Any]) -> Tensor | None:
    """The parameter that a tensor of the optimizer's state belongs to; None for a setting of a group."""
    if place[2] != "state":
        return None
    if place[3] >= len(parameters):
        raise CheckpointError(
            f"cannot load {path}: its optimizer has more parameters than this one; was the config changed since?"
        )
    return parameters[place[3]]


def _like(model: Any, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor, sharded as ``model`` is if that has its shape."""
    if isinstance(model, DTensor) and model.size() == size:
        empty: Tensor = torch.empty_like(model.detach(), dtype=dtype)
        return empty
    return torch.empty(size, dtype=dtype)
