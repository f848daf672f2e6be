"""A module and a data module of a few lines, to test the machinery around training without training anything real."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mmssl.types import Batch, Text


class ToyModule(LightningModule):
    """Remembers every batch it stepped on; ``dropout`` makes the weights depend on torch's global generator."""

    def __init__(self, width: int = 4, ratio: float = 0.5, dropout: float = 0.5, step_seconds: float = 0.0) -> None:
        super().__init__()
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is {ratio}; give a number between 0 and 1")
        self.network = nn.Sequential(nn.Linear(2, width), nn.Dropout(dropout), nn.Linear(width, 1))
        self.step_seconds = step_seconds
        self.register_buffer("seen", torch.zeros(1000, dtype=torch.int64))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        time.sleep(self.step_seconds)
        self.seen[batch.index] += 1
        loss = self.network(torch.tensor([[float(batch.index), 1.0]])).square().mean()
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", float(batch.index), batch_size=batch.size)

    test_step = validation_step

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.trainer.datamodule.trained(self.trainer.fit_loop.total_batch_idx + 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class OtherModule(ToyModule):
    def __init__(self, depth: int = 1) -> None:
        super().__init__()


class ToyStream(IterableDataset):
    def __init__(self, first: int, number: int | None) -> None:
        self.first, self.number = first, number

    def __iter__(self) -> Iterator[Batch]:
        index = self.first
        while self.number is None or index < self.first + self.number:
            ids = torch.zeros(5, dtype=torch.int64)
            text = Text(ids, torch.tensor([0, 2, 4, 5]), 2, ids[:1], ids[:1])
            yield Batch(index=index, keys=["a", "b"], text=text, bad=[("toy.tar", "truncated")])
            index += 1


class ToyData(LightningDataModule):
    def __init__(self, train: str = "nothing", batch_size: int = 2, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers
        self.batches = 0

    def trained(self, batches: int) -> None:
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(ToyStream(self.batches, None), batch_size=None, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(ToyStream(0, 2), batch_size=None)

    test_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]
