"""How FSDP2 saves and loads: a folder that all ranks write, or one file that is gathered on rank 0."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from mmssl.pretrained.whole import CheckpointError
from mmssl.training.host_copy import HostCopy, gathered
from mmssl.training.reshard import load_sharded
from mmssl.training.sharded import write_sharded
from mmssl.training.together import fail_together


class SavesSharded(ModelParallelStrategy):
    """Lightning's own way writes where the checkpoint before stood, unpickles what it loads, and cannot put a folder
    together for one process; this replaces it.  States go by the optimizer's own numbers of parameters, as in a file.
    """

    _group: Any = None
    settle: Callable[[], None] = staticmethod(lambda: None)  # waits for what a Saver writes in the background

    @property
    def saves_sharded(self) -> bool:
        return self._save_distributed_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The live weights, sharded: who keeps them copies them."""
        assert self.model is not None
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The live state, sharded, by numbers of parameters."""
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return own.state_dict()

    def writing(self, content: dict[str, Any], path: Path) -> Callable[[], None]:
        """What this rank has to run, in any thread, to write ``content``; all ranks call this together."""
        if self.saves_sharded:
            if self._group is None:  # of its own: a thread's messages must not come between the training's
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            return partial(write_sharded, content, path, self._group)
        whole = gathered(content, keep=self.is_global_zero)
        return partial(self.checkpoint_io.save_checkpoint, whole, path) if self.is_global_zero else _nothing

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save at once, on all ranks together: for ``trainer.save_checkpoint``, as other people's callbacks call it.

        Raises:
            CheckpointError: on every rank, if it, or an earlier one in the background, failed on any.
        """
        self.settle()  # two writes at once would get each other's messages
        if self.saves_sharded and self.root_device.type != "cpu":
            checkpoint = HostCopy()(checkpoint)
        write = self.writing(checkpoint, Path(self.broadcast(filepath)))
        message, cause = None, None
        try:
            write()
        except CheckpointError as error:
            message, cause = str(error), error
        fail_together(message, cause=cause)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the model and its optimizers; the rest is returned.

        Raises:
            CheckpointError: on every rank, if it is damaged or does not fit.
        """
        assert self.model is not None
        return load_sharded(Path(checkpoint_path), self.model, self.optimizers)


def _nothing() -> None:
    """What a rank writes that has nothing to write."""
