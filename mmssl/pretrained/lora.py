"""Backbones that were fine-tuned with low-rank adapters, read as if they had never had any."""

from collections.abc import Iterator, Mapping

from torch import Tensor

LORA = "lora_scale"  # of a checkpoint: how often the adapters count
_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


class Merged(Mapping[str, Tensor]):
    """peft's tensors under the backbone's own names: weight + scale * B @ A, put together when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        self._tensors, self._scale = tensors, scale
        self._names = {name.replace(_BASE, "."): name for name in tensors if _A not in name and _B not in name}

    def __getitem__(self, name: str) -> Tensor:
        inside = self._names[name]
        tensor = self._tensors[inside]
        a, b = (inside.replace(_BASE, part) for part in (_A, _B))
        if _BASE not in inside or a not in self._tensors:
            return tensor
        return tensor + self._scale * (self._tensors[b] @ self._tensors[a])

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
