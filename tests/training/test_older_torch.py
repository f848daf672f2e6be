"""What the oldest torch that pyproject.toml allows lacks, and what mmssl does there."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import mmssl
from mmssl.training import strategies


@dataclass(frozen=True)
class Policy:
    """MixedPrecisionPolicy of torch 2.11."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True


def shard_by_it(module: nn.Module, mp_policy: Policy, **options: Any) -> None:
    fully_shard(module, mp_policy=MixedPrecisionPolicy(**asdict(mp_policy)), **options)  # this torch wants its own


def test_fsdp_with_the_policy_of_torch_2_11(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategies, "MixedPrecisionPolicy", Policy)
    monkeypatch.setattr(strategies, "fully_shard", shard_by_it)

    def shard(rank: int) -> None:
        strategy = mmssl.FSDP()
        strategy._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        network = nn.Linear(3, 2)
        strategy.shard(network)
        assert isinstance(network, FSDPModule)
        network(torch.ones(1, 3)).sum().backward()

    together(1, tmp_path / "meet", shard)
    with pytest.raises(
        ValueError, match=r"param_dtype of mmssl.FSDP is bfloat16, for which torch .* is too old"
    ) as said:
        mmssl.FSDP(param_dtype="bfloat16")
    assert "\n" not in str(said.value)
