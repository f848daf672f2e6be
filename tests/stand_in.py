"""A stand-in for a Trainer, for the tests of what a Saver writes."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mmssl
from mmssl.training.checkpoint import AtomicCheckpointIO

WORDS = 4_000_000  # 16 MB: long enough to write for kills to come meanwhile


class StandIn(pl.Trainer):
    """What a Saver needs of a Trainer; its state is one tensor, full of the step."""

    strategy: Any = None
    is_global_zero: Any = True

    def __init__(self, rank: int = 0, world: int = 1, words: int = WORDS) -> None:
        environment = LightningEnvironment()
        environment.set_global_rank(rank)
        cpu = torch.device("cpu")
        if world > 1:
            self.strategy = mmssl.FSDP()
            self.strategy.cluster_environment, self.strategy.parallel_devices = environment, [cpu] * world
        else:
            self.strategy = SimpleNamespace(is_global_zero=True, root_device=cpu, checkpoint_io=AtomicCheckpointIO())
        self.is_global_zero = rank == 0
        weight = torch.zeros(words)
        self.weight = distribute_tensor(weight, init_device_mesh("cpu", (world,)), [Shard(0)]) if world > 1 else weight
        self.step = 0
        self._checkpoint_connector = self

    def dump_checkpoint(self, weights_only: bool) -> dict[str, Any]:
        return {"state_dict": {"w": self.weight}, "global_step": self.step}
