"""The LightningModule under every objective: optimizer, schedule, one global division, logging.

An objective gives three things: ``prepare`` (the loader's half), ``forward`` (the device's half) and ``compare``
(predictions to named sums).  Everything about *how* to train is here.
"""

from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mmssl.draws import mix
from mmssl.pretrained.sources import sha256
from mmssl.pretrained.whole import FORMAT, check_format
from mmssl.training.changed import Changed
from mmssl.training.completion import Completion, Rows
from mmssl.training.guard import StepGuard
from mmssl.training.messages import warn
from mmssl.training.optim import adamw, check_trainer, warmup_cosine
from mmssl.training.strategies import FSDP, distribute, whole
from mmssl.training.sums import add_up, means
from mmssl.training.together import hear_all
from mmssl.training.votes import Votes
from mmssl.types import Batch, Loss, Prepare


class PretrainModule(LightningModule):
    """Base of the pretraining objectives, and of fine-tuning.

    The loss of a step is sum_k weight_k * total_k / count_k, where total and count run over *all* ranks and all
    micro-batches of the optimizer step: dividing per rank or per micro-batch weighs tokens unequally.

    Args:
        lr: peak learning rate (absolute; published recipes often give a rate per 256 samples).
        weight_decay, betas, eps: of AdamW.  Norms, biases, positions and class tokens are not decayed.
        warmup_steps: optimizer steps of linear warm-up, followed by a half cosine to ``min_lr_ratio * lr`` at
            ``trainer.max_steps``.
        min_lr_ratio: the rate at the last step as a part of ``lr``.
        clip_grad_norm: largest 2-norm of the gradient; None measures without clipping.
        compile_blocks: torch.compile every transformer block (worth it on GPUs).
    """

    network: nn.Module

    def __init__(
        self,
        *,
        lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        warmup_steps: int = 0,
        min_lr_ratio: float = 0.0,
        clip_grad_norm: float | None = 1.0,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"lr": lr, "eps": eps}.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if weight_decay < 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must be 0 or more")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
        if not 0 <= min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {min_lr_ratio}; it must lie between 0 and 1")
        if clip_grad_norm is not None and clip_grad_norm <= 0:
            raise ValueError(f"clip_grad_norm is {clip_grad_norm}; use null to switch clipping off")
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.warmup_steps, self.min_lr_ratio, self.clip_grad_norm = warmup_steps, min_lr_ratio, clip_grad_norm
        self.compile_blocks = compile_blocks
        self.loss_weights: dict[str, float] = {}
        self.votes = Votes()
        self.guard = StepGuard()
        self._last_batch = -1
        self._window_total: dict[str, Tensor] = {}
        self._window_sums: dict[str, Tensor] = {}
        self._logged = False
        self._eval_sums: dict[str, Tensor] = {}

    # ---- what an objective gives

    def prepare(self, train: bool) -> Prepare:
        """The half that runs in the loader's workers."""
        raise NotImplementedError

    def compare(self, prediction: Any, batch: Batch) -> dict[str, Loss]:
        """Sums with counts by name.  The names in ``loss_weights`` are trained on, the others only reported."""
        raise NotImplementedError

    def measure(self, prediction: Any, batch: Batch) -> None:
        """In evaluation, note what :meth:`measured` needs beyond the sums of ``compare``."""

    def measured(self) -> dict[str, Tensor]:
        """Further metrics of the evaluation that ends, by name, over all ranks; forgets what they were made of."""
        return {}

    def complete(self, batch: Batch) -> Completion:
        """Pictures and guesses for a person; called without gradients on a small validation batch."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Any:
        return self.network(batch)

    # ---- what a checkpoint must agree with

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mmssl_format"] = FORMAT
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["max_steps"] = self.trainer.max_steps
        if (digest := self._tokenizer_digest()) is not None:
            checkpoint["tokenizer_sha256"] = digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError for a newer mmssl's file, another tokenizer than the weights', or other windows."""
        check_format(checkpoint.get("mmssl_format"), "the checkpoint")
        saved, mine = checkpoint.get("tokenizer_sha256"), self._tokenizer_digest()
        if saved is not None and mine is not None and saved != mine:
            raise ValueError(
                f"the tokenizer {self.tokenizer.path} is not the one that the checkpoint's weights were trained with "  # type: ignore[union-attr]
                f"(sha256 {mine[:8]}, not {saved[:8]}): its ids mean other words; name that one, which "
                "mmssl fit keeps as tokenizer.json in the run's folder"
            )
        steps, now = checkpoint.get("max_steps"), self._trainer and self.trainer.max_steps
        told = any(isinstance(c, Changed) for c in self.trainer.callbacks) if now else True  # type: ignore[attr-defined]
        if steps is not None and steps != now and not told and self.trainer.state.fn == TrainerFn.FITTING:
            rank_zero_only(warn)(
                f"trainer.max_steps was {steps} in the checkpoint, now {now}: the schedule ends there, so the learning "
                "rate is another one from here on"
            )
        before = checkpoint.get("accumulate_grad_batches")
        if before is None or self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if before != self.trainer.accumulate_grad_batches:
            raise ValueError(
                f"trainer.accumulate_grad_batches was {before} in the checkpoint, now "
                f"{self.trainer.accumulate_grad_batches}: its count of batches would not fit the windows; "
                f"set trainer.accumulate_grad_batches: {before} to go on, or begin a new run"
            )

    def _tokenizer_digest(self) -> str | None:
        tokenizer = getattr(self, "tokenizer", None)
        return None if tokenizer is None else sha256(tokenizer)

    @property
    def total_batches(self) -> int:
        """Batches of the whole run, for schedules that the loader follows."""
        if self._trainer is None:
            return 1
        return max(1, self.trainer.max_steps) * self.trainer.accumulate_grad_batches

    @property
    def leaves_unused(self) -> bool:
        """Whether a step may leave some parameters without a gradient, on all ranks the same ones."""
        sources = getattr(getattr(self.trainer, "datamodule", None), "train", None) if self._trainer else None
        return isinstance(sources, dict) and any("only" in source for source in sources.values())

    # ---- one step

    def configure_model(self) -> None:
        if self.compile_blocks:
            self.network.backbone.compile_blocks()  # type: ignore[operator, union-attr]
            self.compile_blocks = False  # configure_model is called again for every fit, validate, …
        distribute(self, self.network, self.leaves_unused)  # outside of what is compiled and recomputed

    def on_train_start(self) -> None:
        # The ranks are seeded alike, to begin alike; from here on each drops paths of its own.  A resumed run takes
        # its generators' state over later, before its first batch.
        if self.global_rank:
            torch.manual_seed(mix(torch.initial_seed(), self.global_rank) >> 1)  # 63 bits, as seeds are

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._last_batch = batch.index
        self.guard.note(batch.keys)
        begins = batch_idx % self.trainer.accumulate_grad_batches == 0
        # A rank's own work lies before its first collective (votes.Clock), and FSDP's forward begins with one.
        sharded = isinstance(self.trainer.strategy, FSDP)
        if begins and sharded:
            self._window_total = self._count_window(batch)
        sums = self.compare(self(batch), batch)
        if begins and not sharded:
            self._window_total = self._count_window(batch)
        if begins and (self._logged or not self._mixed):
            self._window_sums, self._logged = {}, False
        # DDP and FSDP average gradients over the ranks and Lightning divides by the micro-batches; we divide
        # by the count, so both are taken back here.
        undo = self.trainer.world_size * self.trainer.accumulate_grad_batches
        part = sum(
            weight * sums[name].total / self._window_total[name]
            for name, weight in self.loss_weights.items()
            if name in sums  # a source of images alone has no text
        )
        assert isinstance(part, Tensor)
        self._note(batch, sums, part.detach())
        return part * undo

    def _count_window(self, batch: Batch) -> dict[str, Tensor]:
        """Items of each loss over all ranks and all micro-batches of this optimizer step."""
        window = batch.window
        if window is None:  # a loader of the user's own: the best that can be known is this micro-batch
            window = {name: n * self.trainer.accumulate_grad_batches for name, n in batch.counts.items()}
        items = [float(window.get(name, 0)) for name in self.loss_weights]
        subject = f"{type(self).__name__} {batch.index} {batch.source} {len(batch.keys)} {list(self.loss_weights)}"
        counts = self.votes.add_up(items, subject, self.trainer.world_size, self.device)
        # No rank had an item: the total is 0 as well, and 0 / 1 gives the zero gradient it should be.
        return dict(zip(self.loss_weights, counts.clamp(min=1), strict=True))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here and not in on_train_batch_end: callbacks come before the module there, so a checkpoint would be
        # saved with the count of the step before and its samples would be repeated.  Only whole optimizer steps
        # count as trained: the gradients of a half window are not in a checkpoint.
        trained = getattr(getattr(self.trainer, "datamodule", None), "trained", None)
        if trained is not None:
            trained(self._last_batch + 1)
        if self._logs_now():
            self._check_budget()
        norm = self._clip()
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # which skips by itself, to find its scale
            self.guard.check(optimizer, norm, self.trainer.global_step + 1)
        if self._logs_now():
            for name, value in self._means(self._window_sums).items():
                self.log(f"train/{name}", value)
            self._logged = True
            self.log("train/grad_norm", norm)
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    def _clip(self) -> Tensor:
        """Scale the gradient down to ``clip_grad_norm``; its 2-norm before, over all ranks and the same on each."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        return norm

    # ---- logging

    def _logs_now(self) -> bool:
        # global_step grows after the optimizer's step, Lightning logs when the grown number divides.
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % every == 0

    @property
    def _mixed(self) -> bool:
        """Whether there are several sources, so that one step's losses would tell of one source alone."""
        sources = getattr(getattr(self.trainer, "datamodule", None), "train", None)
        return isinstance(sources, dict) and len(sources) > 1

    def _note(self, batch: Batch, sums: dict[str, Loss], part: Tensor) -> None:
        """Keep for the log: one step's sums, or of several sources every step's since the last logged one."""
        if self._mixed:
            # All ranks' and micro-batches' parts make up the step's loss, so each counts as its share of a step.
            share = 1 / (self.trainer.world_size * self.trainer.accumulate_grad_batches)
            step = Loss(part, torch.full((), share, device=part.device))
            sums = {"loss": step, **{f"{batch.source}/{name}": loss for name, loss in sums.items()}}
        elif not self._logs_now():
            return
        add_up(self._window_sums, sums, torch.float32)

    def _check_budget(self) -> None:
        """All ranks together: stop on all of them if too many samples were bad."""
        check = getattr(getattr(self.trainer, "datamodule", None), "check_budget", None)
        if check is not None and self.trainer.world_size > 1:
            check(hear_all)

    def _means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return means(sums, self.loss_weights, self.trainer.world_size)

    def on_validation_epoch_start(self) -> None:
        self._eval_sums = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        precise = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        prediction = self(batch)
        add_up(self._eval_sums, self.compare(prediction, batch), precise)
        self.measure(prediction, batch)

    def on_validation_epoch_end(self) -> None:
        if self._eval_sums:
            for name, value in {**self._means(self._eval_sums), **self.measured()}.items():
                self.log(f"val/{name}", value)
        self._check_budget()

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        for name, value in {**self._means(self._eval_sums), **self.measured()}.items():
            self.log(f"test/{name}", value)
        self._check_budget()

    def on_predict_epoch_end(self) -> None:
        self._check_budget()

    def on_train_end(self) -> None:
        self._check_budget()  # what came behind the last logged step

    def predict_step(self, batch: Batch, batch_idx: int) -> Completion | Rows:
        return self.complete(batch)

    # ---- optimizer

    def no_weight_decay(self) -> set[str]:
        """Names (wildcards) of parameters that are not decayed although they have two dimensions or more."""
        backbone: Any = self.network.backbone
        return {f"network.backbone.{name}" for name in backbone.no_weight_decay()} | {"*.mask_token", "*.modality"}

    def parameter_groups(self) -> list[dict[str, Any]] | None:
        """Groups with a weight decay and a rate of their own; None for the usual two, decayed and not."""
        return None

    def configure_optimizers(self) -> Any:
        check_trainer(self.trainer, self.warmup_steps)
        optimizer = adamw(
            self,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            no_weight_decay=self.no_weight_decay(),
            groups=self.parameter_groups(),
            # A fused step takes the scale of float16 gradients back itself, after we measured and clipped them.
            fused=getattr(self.trainer.precision_plugin, "scaler", None) is None,
        )
        schedule = warmup_cosine(self.warmup_steps, self.trainer.max_steps, self.min_lr_ratio)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }
