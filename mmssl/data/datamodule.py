"""The data of a run, as users name it in YAML."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mmssl.data.budget import Budget
from mmssl.data.cache import Cache
from mmssl.data.identity import histories, identity, write_shards_file
from mmssl.data.index import ShardIndex
from mmssl.data.loader import Loader, StartMethod, default_workers, leave_cores, tell_of_many_workers
from mmssl.data.order import check_world, choose_lanes
from mmssl.data.shards import ShardSet
from mmssl.data.sources import SourceConfig, check_members, prepare_of, read_sources
from mmssl.data.stream import EvalSet, Source, TrainStream
from mmssl.types import Batch, Prepare

_TELL = 10.0  # seconds between two lines while shards are indexed


class DataModule(LightningDataModule):
    """Streams WebDataset shards for training and evaluation; goes on exactly where a checkpoint left off.

    Args:
        train: shards to train on: a path, brace pattern, glob, folder, or a list of these; or several sources,
            ``{name: {shards: ..., weight: ...}}``, of which every batch takes one.  With ``only: image`` or
            ``only: text`` a source of an objective of pairs has pictures or texts alone.
        val: shards to validate, test and predict on; none by default.
        batch_size: samples of a batch over *all* ranks.
        val_batch_size: the same for validation; None means ``batch_size``.
        num_workers: loader processes of every rank; None means its share of the cores less one, at most 8; 0 loads
            in the training process.  More than there are cores are started, and told of.
        lanes: sequences the shards are read in side by side; the number of ranks must divide it.  None means
            the largest divisor of ``batch_size`` up to 64 (more for batches above 1,024).
        seed: of the order and of every random draw.
        budget: part of the samples that may be bad before the run stops, over all ranks, counted from 1,000 samples on
            since the last start; in evaluation in every pass.
        prefetch_factor: batches every worker prepares ahead; raised in training where all workers together would hold
            fewer than one optimizer step accumulates.  A rank then keeps up to two steps' batches in memory.
        val_samples: validate on this many samples, spread evenly over ``val``; None means all.
        allow_appended: go on with a run whose shards became more, behind the known ones.  The epoch that was begun is
            finished without them, the next one has them all.
        bad_samples: file that names every bad sample; None means ``bad_samples.jsonl`` in the run's folder.
        cache_dir: folder of the node's own disk for pieces of remote shards; None means ``$MMSSL_CACHE``, or else one
            in ``$TMPDIR`` or ``/tmp``.
        cache_limit_gb: how much may lie there, in 10⁹ bytes.
        multiprocessing_context: fork, spawn or forkserver; None means the system's default.

    Raises:
        ValueError: in the constructor, for a value that makes no sense; in ``setup``, for shards or a world size that
            do not fit; in ``load_state_dict``, if the saved run had other data.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, SourceConfig],
        val: str | list[str] | None = None,
        batch_size: int = 256,
        val_batch_size: int | None = None,
        num_workers: int | None = None,
        lanes: int | None = None,
        seed: int = 0,
        budget: float = 0.01,
        prefetch_factor: int = 2,
        val_samples: int | None = None,
        allow_appended: bool = False,
        bad_samples: str | None = None,
        cache_dir: str | None = None,
        cache_limit_gb: float = 50.0,
        multiprocessing_context: StartMethod | None = None,
    ) -> None:
        super().__init__()
        self.lanes = choose_lanes(batch_size, lanes)
        if val_batch_size is not None and val_batch_size < 1:
            raise ValueError(f"val_batch_size is {val_batch_size}; give at least 1, or null for batch_size")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; give 0 or more, or null for a default")
        if prefetch_factor < 1:
            raise ValueError(f"prefetch_factor is {prefetch_factor}; give at least 1 batch")
        if not 0 <= budget <= 1:
            raise ValueError(f"budget is {budget}; give the part of samples that may be bad, from 0 to 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; give 0 or more")
        self.train, self.val = read_sources(train), val
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.seed, self.budget, self.val_samples = seed, budget, val_samples
        self.allow_appended = allow_appended
        self.cache = Cache(cache_dir, cache_limit_gb)
        self.bad_samples, self.multiprocessing_context = bad_samples, multiprocessing_context
        self.batches = 0  # trained, not merely loaded
        self._train: TrainStream | None = None
        self._val: EvalSet | None = None
        self._saved: dict[str, Any] | None = None
        self._loaders: list[Loader] = []
        self._shards_named = False  # in the run's folder, once there is a checkpoint to compare with

    # ---- set up

    def prepare_data(self) -> None:
        """Index the shards once per node; the other ranks then find the indices.  Says so where it takes long."""
        for shards in self._wanted().values():
            ShardSet(shards, _Patience(), cache=self.cache)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert module is not None
        bad_samples = self._bad_samples()
        os.makedirs(os.path.dirname(bad_samples) or ".", exist_ok=True)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if stage == "fit":
            check_world(self.lanes, world, self.batch_size)
            prepare: Prepare = module.prepare(train=True)  # type: ignore[operator]
            sources = []
            for name, source in self.train.items():
                shards = ShardSet(source["shards"], cache=self.cache)
                own = prepare_of(name, source, prepare, type(module).__name__)
                check_members(shards, own, type(module).__name__)
                sources.append(Source(name, shards, float(source.get("weight", 1.0)), own))
            self._train = TrainStream(
                sources,
                prepare,
                seed=self.seed,
                batch_size=self.batch_size,
                lanes=self.lanes,
                rank=rank,
                world=world,
                bad_samples=bad_samples,
            )
            for shards, order in zip((source.shards for source in sources), self._train.orders, strict=True):
                shards.check_cache(self.lanes // self.trainer.num_nodes * (order.window // order.block + 1))
            if self._saved is not None:
                self._go_on(self._saved)
        if self.val is not None:
            prepare = module.prepare(train=False)  # type: ignore[operator]
            shards = ShardSet(self.val, cache=self.cache)
            check_members(shards, prepare, type(module).__name__)
            self._val = EvalSet(
                shards,
                prepare,
                seed=self.seed,
                batch_size=self.val_batch_size,
                limit=self.val_samples,
                rank=rank,
                world=world,
                bad_samples=bad_samples,
            )
        elif stage != "fit":
            raise ValueError(
                f"data.val is not set, but mmssl {getattr(stage, 'value', stage)} runs on it; give its shards"
            )

    def _folder(self) -> str:
        assert self.trainer is not None
        return self.trainer.default_root_dir

    def _bad_samples(self) -> str:
        return self.bad_samples or os.path.join(self._folder(), "bad_samples.jsonl")

    def _wanted(self) -> dict[str, str | list[str]]:
        training = self.trainer is None or self.trainer.state.fn == "fit"
        wanted = {name: source["shards"] for name, source in self.train.items()} if training else {}
        # A key that no source can have.
        return wanted if self.val is None else {**wanted, "": self.val}

    # ---- loaders

    def train_dataloader(self) -> Loader:
        if self._train is None:
            raise RuntimeError("call setup('fit') first; the Trainer does")
        return self._loader(self._train)

    def val_dataloader(self) -> Loader | list[Any]:
        return [] if self._val is None else self._loader(self._val)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def preview(self, samples: int) -> Batch | None:
        """The same few validation samples on every rank, for pictures; None without validation data."""
        if self._val is None:
            return None
        few = self._val.samples
        shards = few.sources[0].shards
        count = min(samples, len(shards))
        return EvalSet(shards, few.prepare, seed=self.seed, batch_size=count, limit=count).batch(0)

    def _loader(self, data: TrainStream | EvalSet) -> Loader:
        assert self.trainer is not None
        trainer = self.trainer
        workers = default_workers(trainer.num_devices) if self.num_workers is None else self.num_workers
        training = isinstance(data, TrainStream)
        if training and self.num_workers is not None:
            rank_zero_only(tell_of_many_workers)(workers, trainer.num_devices)
        if training and trainer.strategy.root_device.type == "cpu":
            leave_cores(workers, trainer.num_devices)
        loader = Loader(
            data,
            workers=workers if isinstance(data, TrainStream) else min(workers, len(data)),
            prefetch=self.prefetch_factor,
            start_method=self.multiprocessing_context,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            first=(lambda: self.batches) if training else None,
            accumulate=(lambda: trainer.accumulate_grad_batches) if training else None,
            budget=Budget(self.budget, self._bad_samples(), alone=trainer.world_size == 1),
        )
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    # ---- state

    def trained(self, batches: int) -> None:
        """Called after every optimizer step: so many global batches are in the weights."""
        self.batches = batches

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source's samples have been trained on, by name; 1.5: one and a half times."""
        return {} if self._train is None else self._train.epochs(self.batches)

    def describe(self, batches: int) -> dict[str, str]:
        """What there is to train on and to validate on, for a person; ``batches``: of the whole run."""
        said = {}
        if self._train is not None:
            epochs = self._train.epochs(batches)
            for source in self._train.samples.sources:
                title = "train" if len(epochs) == 1 else f"train {source.name}"
                shards = source.shards
                said[title] = (
                    f"{len(shards)} samples in {len(shards.shards)} shards, {_brief(epochs[source.name])} epochs"
                )
        if self._val is not None:
            said["val"] = f"{self._val.count} of {self._val.total} samples"
        return said

    def check_budget(self, gather: Callable[[Any], list[Any]]) -> None:
        """Called by all ranks together, now and then: raises TooManyBadSamples on all of them, or on none.

        ``gather`` brings every rank's object to every rank.
        """
        for loader in self._loaders:
            loader.budget.check(gather)

    def state_dict(self) -> dict[str, Any]:
        """A few integers and a fingerprint, the same on every rank; empty if this run does not train."""
        if self._train is None:
            return {}
        assert self.trainer is not None
        if self.trainer.is_global_zero and not self._shards_named:
            self._shards_named = True
            try:
                write_shards_file(self._train, self._folder())
            except OSError as error:  # it only makes a later error more precise
                rank_zero_warn(f"cannot write the names of the shards to {self._folder()}: {error.strerror}")
        return {"batches": self.batches, **identity(self._train)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the last trained batch.  Raises ValueError if the order of samples would be another one."""
        if self._train is None:
            self._saved = state_dict  # checked by setup, if this run trains at all
        else:
            self._go_on(state_dict)
        self.batches = state_dict["batches"]

    def _go_on(self, saved: dict[str, Any]) -> None:
        assert self._train is not None
        before = {source["name"]: source["history"] for source in saved.get("sources", [])}
        grown = histories(saved, self._train, self._folder(), appended=self.allow_appended)
        self._train.grow(grown)
        for (name, history), now in zip(before.items(), grown, strict=True):
            if history != now:
                epoch, samples = now[-1]
                rank_zero_only(print)(
                    f"mmssl: source {name}: shards were appended; from its epoch {epoch} on it has {samples} samples "
                    f"instead of {history[-1][1]}",
                    flush=True,
                )


def _brief(number: float) -> str:
    """Three digits or all before the point: 0.0123, 2.76, 2760."""
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


class _Patience:
    """Tells every ten seconds how many shards have been indexed."""

    def __init__(self) -> None:
        self._shards = self._samples = 0
        self._told = time.monotonic()

    def __call__(self, shard: ShardIndex) -> None:
        self._shards += 1
        self._samples += shard.samples
        if time.monotonic() - self._told >= _TELL:
            self._told = time.monotonic()
            print(f"mmssl: indexing shards: {self._shards} done, {self._samples} samples", file=sys.stderr, flush=True)
