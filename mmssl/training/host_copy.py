"""A checkpoint's content apart from the run: copied to the host's memory, or gathered there from all ranks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Place = tuple[Any, ...]


class HostCopy:
    """Copies tensors and containers, into the same memory every time: one more state of this rank stays allocated.

    What it returned before is overwritten by the next call.
    """

    def __init__(self) -> None:
        self._buffers: dict[Place, Tensor] = {}
        self._seen: dict[Any, Tensor] = {}

    def __call__(self, content: dict[str, Any]) -> dict[str, Any]:
        self._seen = {}
        copied: dict[str, Any] = mapped(content, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies to pinned memory return early
        return copied

    def _copy(self, tensor: Tensor, place: Place) -> Tensor:
        tensor = tensor.detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # Tied weights are one tensor in a file too.
        same = (local.untyped_storage().data_ptr(), local.storage_offset(), local.size(), local.stride(), local.dtype)
        if local.numel() and same in self._seen:
            return self._seen[same]
        self._seen[same] = self._into_buffer(tensor, local, place)
        return self._seen[same]

    def _into_buffer(self, tensor: Tensor, local: Tensor, place: Place) -> Tensor:
        buffer = self._buffers.get(place)
        fits = buffer is not None and type(buffer) is type(tensor) and buffer.size() == tensor.size()
        if buffer is None or not fits or buffer.dtype != tensor.dtype:
            if isinstance(tensor, DTensor):
                buffer = self._buffers[place] = tensor.to("cpu", copy=True)
                return buffer
            pinned = tensor.device.type == "cuda"
            buffer = self._buffers[place] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        into = buffer.to_local() if isinstance(buffer, DTensor) else buffer
        into.copy_(local, non_blocking=True)
        return buffer


def gathered(content: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A copy on the host with every sharded tensor whole; all ranks call this together.

    On a GPU no more than one whole tensor exists at a time.

    Args:
        content: of a checkpoint, on every rank.
        keep: whether this rank wants the result; the others get their tensors empty.
    """

    def gather(tensor: Tensor, place: Place) -> Tensor:
        own = tensor.detach()
        whole = own.full_tensor() if isinstance(own, DTensor) else own
        if not keep:
            return torch.empty(0)
        # What was gathered is a copy already, unless this rank held all of it.
        held = own.to_local() if isinstance(own, DTensor) else own
        fresh = whole.untyped_storage().data_ptr() != held.untyped_storage().data_ptr()
        return whole.cpu() if fresh else whole.to("cpu", copy=True)

    result: dict[str, Any] = mapped(content, gather)
    return result


def mapped(value: Any, tensors: Callable[[Tensor, Place], Tensor], place: Place = ()) -> Any:
    """A deep copy in which ``tensors`` decides about each tensor, by the keys that lead to it."""
    if isinstance(value, Tensor):
        return tensors(value, place)
    if isinstance(value, dict):
        same = copy.copy(value)  # an OrderedDict of a module carries attributes
        for key, item in value.items():
            same[key] = mapped(item, tensors, (*place, key))
        return same
    if type(value) in (list, tuple):
        return type(value)(mapped(item, tensors, (*place, number)) for number, item in enumerate(value))
    return copy.deepcopy(value)
