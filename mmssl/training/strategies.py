"""How the ranks share the work: DDP, or FSDP2 through Lightning's ModelParallelStrategy.

Under DDP every rank holds the whole model.  Under FSDP2 every rank holds 1 / ranks of each parameter and of its
optimizer state; a block's parameters are gathered when its forward runs and freed behind it.  In both all ranks
are data-parallel, and gradients are averaged over them.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer import Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mmssl.training.fsdp_checkpoint import SavesSharded

Dtype = Literal["float32", "bfloat16"]


class FSDP(SavesSharded):
    """FSDP2 over all ranks; ``configs/strategy/fsdp.yaml`` chooses it.

    The model's ``configure_model`` has to call :meth:`shard`, as :class:`mmssl.training.module.PretrainModule` does.

    Args:
        checkpoint: ``sharded`` saves a folder into which every rank writes its part, ``full`` one file, gathered on
            rank 0.  Either is gone on with by any number of ranks, under DDP or alone.
        param_dtype: of the gathered parameters; bfloat16 halves what is sent and needs ``precision: bf16-mixed``.
            Vectors (norms, biases) and the optimizer's copy stay float32.
        reduce_dtype: in which gradients are added up over the ranks.
        reshard_after_forward: free a block's parameters between its forward and its backward.  False takes more memory
            and sends a third less.
        sync_every_micro_batch: with accumulation, add up the gradients over the ranks behind every micro-batch, of
            which a rank then keeps its part.  False sends them once a step, a third less in all, but every rank holds
            the whole model's gradients meanwhile.
        timeout: of a collective.

    Raises:
        ValueError: for another word than these.
    """

    def __init__(
        self,
        checkpoint: Literal["sharded", "full"] = "sharded",
        param_dtype: Dtype = "float32",
        reduce_dtype: Dtype = "float32",
        reshard_after_forward: bool = True,
        sync_every_micro_batch: bool = True,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        if checkpoint not in ("sharded", "full"):
            raise ValueError(f"checkpoint of mmssl.FSDP is {checkpoint!r}; choose sharded or full")
        for name, dtype in {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}.items():
            if dtype not in get_args(Dtype):
                raise ValueError(f"{name} of mmssl.FSDP is {dtype!r}; choose float32 or bfloat16")
        if param_dtype == "bfloat16" and not _keeps_vectors():
            raise ValueError(
                f"param_dtype of mmssl.FSDP is bfloat16, for which torch {torch.__version__} is too old: it would send "
                "norms and biases in it as well; leave param_dtype out, or take a newer torch"
            )
        super().__init__(save_distributed_checkpoint=checkpoint == "sharded", timeout=timeout)
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.reshard_after_forward = reshard_after_forward
        self.sync_every_micro_batch = sync_every_micro_batch

    def setup_environment(self) -> None:
        # Lightning's own sizes, with "auto", make a mesh of nodes x devices: on one node that shards nothing, and the
        # module would give every rank the same data.
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        _check_sharded(self.lightning_module)
        # Parameters that were gathered in inference mode cannot be trained on afterwards.
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def shard(self, network: nn.Module) -> None:
        """Shard ``network``'s blocks, then what is left of it, in place; what is sharded already stays as it is.

        A block is each child of a part that is called ``blocks``.  Compile and recompute inside of it, before.

        Raises:
            ValueError: bfloat16 parameters without autocast.
        """
        if isinstance(network, FSDPModule):  # configure_model is called again for every fit, validate, ...
            return
        gathered: dict[str, Any] = {}
        if self.param_dtype == "bfloat16":
            if self.precision_plugin.precision != "bf16-mixed":
                raise ValueError(
                    f"param_dtype of mmssl.FSDP is bfloat16 under trainer.precision {self.precision_plugin.precision}; "
                    "set trainer.precision: bf16-mixed, or leave param_dtype out"
                )
            gathered = {"param_dtype": torch.bfloat16, "param_dtype_override_fn": _own_dtype_of_vectors}
        policy = MixedPrecisionPolicy(
            reduce_dtype=getattr(torch, self.reduce_dtype),  # torch 2.15 gave None another meaning
            cast_forward_inputs=False,  # autocast decides; the residual stream stays float32
            **gathered,
        )
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"], "mp_policy": policy}
        if self.world_size > 1:
            _begin_alike(network, self.root_device)
            _keep_buffers_alike(network)
        for block in blocks_of(network):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(network, **options)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Around all micro-batches of a step but the last: within, gradients stay with their rank, if so chosen."""
        self._synchronise(self.sync_every_micro_batch)
        try:
            yield
        finally:
            self._synchronise(True)

    def _synchronise(self, on: bool) -> None:
        assert self.model is not None
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(on, recurse=False)


def distribute(module: LightningModule, network: nn.Module, leaves_unused: bool) -> None:
    """What the strategy of the module's Trainer needs of it before its optimizer is made.

    Args:
        leaves_unused: whether there are steps in which some parameters get no gradient, on all ranks the same ones.

    Raises:
        ValueError: a strategy that would train something else without a word.
    """
    strategy = module._trainer and module.trainer.strategy
    if isinstance(strategy, FSDP):
        averages = [c for c in module.trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        if averages:
            raise ValueError(
                f"trainer.callbacks has {type(averages[0]).__name__}, which copies the whole model, and a sharded one "
                "cannot be copied; take the callback out, or train under DDP: --config configs/strategy/ddp.yaml"
            )
        strategy.shard(network)
    elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        # FSDP1 refuses CPUs and corrupts Adam's moments in full checkpoints; the other's default mesh shards nothing.
        raise ValueError(
            f"trainer.strategy is Lightning's {type(strategy).__name__}; take mmssl's: "
            "--config configs/strategy/fsdp.yaml, or trainer.strategy: {class_path: mmssl.FSDP}"
        )
    elif isinstance(strategy, DDPStrategy):
        if strategy._ddp_kwargs.get("static_graph"):
            raise ValueError(
                "trainer.strategy has static_graph: true, which can leave the ranks' weights apart; leave it out"
            )
        # DDP is made later, with these arguments.
        if leaves_unused and not strategy._ddp_kwargs.setdefault("find_unused_parameters", True):
            raise ValueError(
                "trainer.strategy has find_unused_parameters: false, but sources of images or texts alone leave "
                "parameters without a gradient, for which DDP would wait; leave it out"
            )
        # DDP would send all buffers from rank 0 before every forward.  Those that are constants need no sending.
        saved = module.state_dict(keep_vars=True).keys()
        constants = [name for name, _ in module.named_buffers() if name not in saved]
        module._ddp_params_and_buffers_to_ignore = constants  # type: ignore[assignment]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The children of every part of ``network`` that is called ``blocks``: of the backbone, of a decoder."""
    found = [part for name, part in network.named_modules() if name.split(".")[-1] == "blocks"]
    return [block for part in found for block in part.children()]


def whole(value: Tensor) -> Tensor:
    """A sharded value as a plain tensor, the same on all ranks; all ranks call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _keeps_vectors() -> bool:
    """Whether this torch can leave some parameters in float32; 2.11 cannot."""
    return any(field.name == "param_dtype_override_fn" for field in fields(MixedPrecisionPolicy))


def _own_dtype_of_vectors(parameter: Tensor) -> torch.dtype | None:
    return parameter.dtype if parameter.ndim < 2 else None


def _check_sharded(module: LightningModule) -> None:
    """A parameter that is not sharded is not synchronised either: the ranks would train apart."""
    plain = [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if plain:
        more = f" and {len(plain) - 3} more" if len(plain) > 3 else ""
        raise ValueError(
            f"mmssl.FSDP: the parameters {', '.join(plain[:3])}{more} of {type(module).__name__} are not sharded, so "
            "every rank would train its own; keep them inside of self.network, and call super().configure_model()"
        )


def _begin_alike(network: nn.Module, device: torch.device) -> None:
    """Rank 0's parameters and buffers for all, as DDP does it: sharding puts together what each rank has."""
    for tensor in [*network.parameters(), *network.buffers()]:
        if not tensor.is_meta:
            sent = tensor.detach().to(device)
            torch.distributed.broadcast(sent, 0)
            tensor.data.copy_(sent)


def _keep_buffers_alike(network: nn.Module) -> None:
    """What the ranks count apart (a BatchNorm's averages) is rank 0's for all before every forward, as under DDP."""
    names = [name for name, _ in network.named_buffers() if name in network.state_dict(keep_vars=True)]

    def share(module: nn.Module, _: Any) -> None:
        for name in names:
            torch.distributed.broadcast(module.get_buffer(name), 0)

    if names:
        network.register_forward_pre_hook(share)
