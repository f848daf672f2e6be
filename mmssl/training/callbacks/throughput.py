"""How fast a run goes and what it waits for, measured without ever waiting for the device."""

import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from mmssl.training.callbacks.ranks import Pace, Slowest
from mmssl.training.together import hear_all
from mmssl.training.votes import Clock


class _FetchTimer(Profiler):
    """Measures how long the training loop waits for its next batch; passes everything on to the real profiler."""

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self._inner = inner
        self._began = 0.0
        self.waited = 0.0

    def start(self, action_name: str) -> None:
        self._inner.start(action_name)
        if action_name.endswith("train_dataloader_next"):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.waited += time.perf_counter() - self._began
        self._inner.stop(action_name)

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self._inner.setup(*args, **kwargs)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._inner.teardown(*args, **kwargs)

    def summary(self) -> str:
        return self._inner.summary()

    def describe(self) -> None:
        self._inner.describe()


class Throughput(Callback):
    """Logs, every ``trainer.log_every_n_steps`` optimizer steps, means since the last time:

    - ``speed/samples_per_second``, ``speed/text_tokens_per_second``: over all ranks; padding is no text
    - ``speed/step_seconds``: wall time of an optimizer step; ``speed/data_wait_seconds``: of it, waiting for the loader
    - ``speed/data_wait_share``: the waiting as a part of all time, 0 to 1
    - with several ranks, ``speed/rank_wait_seconds``: of a step, waiting for the others in its first collective, the
      mean of all ranks; ``speed/compute_seconds``: the rest, in which gradients are sent while others are computed
    - with several ranks, ``health/slowest_rank`` and ``health/imbalance``: by how much it is slower than the median
      rank until it meets the others, as a part of a step
    - ``data/<counter>``: the sum of ``Batch.notes`` since the run began, over all ranks, for instance
      ``data/bad/truncated``
    - ``data/epoch``, or ``data/epoch/<source>`` for each of several: how often its samples have been trained on

    Validation, pictures and checkpoints are not counted, so this callback comes first in the list.  On a GPU the
    host runs ahead of the device; over a window the means are right all the same, because the queue between the
    two is short.
    """

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()  # of this rank; what was before a resumption, rank 0 has
        self._step = 0
        self._batch_start = 0.0
        self._timer: _FetchTimer | None = None
        self._clock: Clock | None = None
        self._slowest = Slowest()
        self.latest: dict[str, float] = {}  # the last window's numbers, for the progress line
        self._clear()

    def _clear(self) -> None:
        self._samples = self._steps = 0
        self._tokens: Tensor | int = 0  # on the device, and read only when it is logged
        self._worked = 0.0
        if self._timer is not None:
            self._timer.waited = 0.0
        if self._clock is not None:
            self._clock.read()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if self._timer is None:
            self._timer = _FetchTimer(trainer.profiler)  # type: ignore[attr-defined]
            trainer.profiler = self._timer  # type: ignore[attr-defined]
        self._clock = getattr(getattr(pl_module, "votes", None), "clock", None)
        self._slowest = Slowest()
        self._clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._worked += time.perf_counter() - self._batch_start
        self._samples += getattr(batch, "size", 0)
        text = getattr(batch, "text", None)
        if text is not None:
            self._tokens = self._tokens + text.cu_seqlens[batch.size].long()
        self._totals.update(getattr(batch, "notes", {}))
        if trainer.global_step == self._step:  # a micro-batch inside an accumulated step
            return
        self._step = trainer.global_step
        self._steps += 1
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)
            self._clear()

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        waited = 0.0 if self._timer is None else self._timer.waited
        seconds = max(self._worked + waited, 1e-9)
        ranks = trainer.world_size  # every rank has batches of one size
        self.latest = {
            "samples_per_second": ranks * self._samples / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait_seconds": waited / self._steps,
            "data_wait_share": waited / seconds,
        }
        worked, met = (0.0, 0.0) if self._clock is None else self._clock.read()
        mine = Pace(socket.gethostname(), waited, worked)
        every = hear_all((int(self._tokens), self._totals, mine, met))
        tokens, totals = sum(rank[0] for rank in every), _total(rank[1] for rank in every)
        if tokens:
            self.latest["text_tokens_per_second"] = tokens / seconds
        if ranks > 1 and self._clock is not None:
            self.latest["rank_wait_seconds"] = sum(rank[3] for rank in every) / ranks / self._steps
            self.latest["compute_seconds"] = (
                self.latest["step_seconds"] - self.latest["data_wait_seconds"] - self.latest["rank_wait_seconds"]
            )
            for name, value in self._slowest.judge([rank[2] for rank in every], self._steps, seconds).items():
                pl_module.log(f"health/{name}", value, rank_zero_only=True, batch_size=1)
        for name, value in self.latest.items():
            pl_module.log(f"speed/{name}", value, rank_zero_only=True, batch_size=1)
        for name, total in totals.items():
            pl_module.log(f"data/{name}", float(total), rank_zero_only=True, batch_size=1)
        epochs: dict[str, float] = getattr(getattr(trainer, "datamodule", None), "epochs", {})
        for source, epoch in epochs.items():
            name = "data/epoch" if len(epochs) == 1 else f"data/epoch/{source}"
            pl_module.log(name, epoch, rank_zero_only=True, batch_size=1)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["notes"] = dict(_total(hear_all(self._totals)))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._totals = Counter(checkpoint.get("notes", {}) if trainer.is_global_zero else {})


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())
