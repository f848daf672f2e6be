"""Classification (and regression) of pictures, texts and pairs on top of a pretrained backbone."""

from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MetricCollection

from mmssl.finetune.augment import Augment, RandAugment, RandomErasing
from mmssl.finetune.base import FineTuned, Pictured
from mmssl.finetune.labels import Labels
from mmssl.finetune.network import ClassifierNetwork, Logits, Mixing, Pool
from mmssl.finetune.prepare import PrepareLabelled
from mmssl.finetune.targets import Kind, make_target
from mmssl.training.completion import Rows
from mmssl.types import Batch, Loss

Mode = Literal["full", "linear_probe"]


class Classifier(FineTuned):
    """Base of the classifiers: pooled features, a linear head, cross-entropy.

    Args:
        num_classes: classes are 0 to num_classes - 1; for regression how many numbers there are.
        target: class, one of the classes; multilabel, any number of them; regression, numbers (bring them to about unit
            size).
        label_key: field of the sample's .json that holds the label; null for the .cls.
        pool: mean over all patches and text tokens, or cls, the class token (of texts alone: their first).
        mode: full trains everything; linear_probe the head alone, on features of the backbone as it stands.
        head_norm: normalise features by batch statistics before the head, as MAE's linear probe does.
        label_smoothing: part of the target that is spread over all classes.
        kwargs: see :class:`FineTuned`.

    Raises:
        ValueError: for a value that makes no sense, or a source that cannot serve.
    """

    network: ClassifierNetwork

    def __init__(
        self,
        num_classes: int,
        target: Kind = "class",
        label_key: str | None = None,
        pool: Pool = "mean",
        mode: Mode = "full",
        head_norm: bool = False,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.target = make_target(target, num_classes)
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; choose full or linear_probe")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
        if target == "regression" and label_smoothing:
            raise ValueError(f"label_smoothing is {label_smoothing}, but numbers have no classes; take 0")
        self.num_classes, self.label_key, self.label_smoothing = num_classes, label_key, label_smoothing
        encoder = self.network.backbone
        if mode == "linear_probe" and self._lora_scale is not None:
            raise ValueError("mode is linear_probe, which trains the head alone, but lora_rank is given; choose one")
        if mode == "linear_probe":
            encoder.requires_grad_(False)
        self.network = ClassifierNetwork(encoder, self.needs, num_classes, pool, mode == "linear_probe", head_norm)
        self.loss_weights = {"label": 1.0}
        self.metrics = MetricCollection(self.target.metrics(), compute_groups=False)

    def metric_names(self) -> set[str]:
        return {"loss_label", *map(str, self.metrics)}

    # ---- the loader's half

    def prepare(self, train: bool) -> PrepareLabelled:
        predicts = self._trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        labels = Labels(self.target, self.label_key, required=not predicts)
        patches = self.network.backbone.num_patches
        return PrepareLabelled(self.crop(train), self.tokens(), labels, patches, self.augment(train))

    def augment(self, train: bool) -> tuple[Augment, ...]:
        """What is done to cropped pictures, in order."""
        return ()

    # ---- the device's half

    def compare(self, prediction: Logits, batch: Batch) -> dict[str, Loss]:
        assert batch.labels is not None
        logits = prediction.logits.float()
        targets = batch.labels if prediction.targets is None else prediction.targets
        smoothing = self.label_smoothing if self.training else 0.0
        errors = self.target.errors(logits, targets, smoothing)  # B
        if batch.valid is not None:
            return {"label": Loss((errors * batch.valid).sum(), batch.valid.sum().float())}
        count = torch.full((), float(len(errors)), device=errors.device)
        losses = {"label": Loss(errors.sum(), count)}
        if prediction.targets is None:
            for name, total in self.target.hits(logits.detach(), batch.labels).items():
                losses[name] = Loss(total, count)
        return losses

    def measure(self, prediction: Logits, batch: Batch) -> None:
        assert batch.labels is not None
        logits, labels = prediction.logits.float(), batch.labels
        valid = torch.ones(len(labels), dtype=torch.bool, device=labels.device) if batch.valid is None else batch.valid
        self.metrics.update(*self.target.scores(logits, labels, valid))

    def measured(self) -> dict[str, Tensor]:
        values = cast(dict[str, Tensor], self.metrics.compute())
        self.metrics.reset()
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> Rows:
        """A line for each sample: key, prediction, truth (null if unknown); see each target's ``row``."""
        assert batch.labels is not None
        logits, labels = self(batch).logits.float().cpu(), batch.labels.cpu()
        valid = [True] * batch.size if batch.valid is None else batch.valid.tolist()
        rows = [
            {"key": key, **self.target.row(row, label)}
            for key, label, row, use in zip(batch.keys, labels, logits, valid, strict=True)
            if use
        ]
        return Rows("labels", rows)


class ImageClassifier(Pictured, Classifier):
    """Classes of pictures.

    Args:
        crop_scale, flip: the augmentation, a random resized crop and mirroring; see
            :class:`mmssl.data.crops.RandomResizedCrop`.
        rand_augment: magnitude, up to 10, of two random changes of colour or place; see
            :class:`mmssl.finetune.augment.RandAugment`.  0 is off.
        random_erasing: probability that a rectangle of a picture becomes noise; 0 is off.
        mixup, cutmix: alpha of each; 0 is off, and where both are on every batch takes one of them.
        kwargs: see :class:`Classifier`.
    """

    needs = ("image",)

    def __init__(
        self,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        rand_augment: float = 0.0,
        random_erasing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=None, max_tokens=None, **kwargs)
        self.set_crops(crop_scale, flip)
        backbone = self.network.backbone
        red, green, blue = (round(255 * mean) for mean in backbone.pixel_mean)
        changes = (
            (rand_augment, RandAugment(rand_augment, (red, green, blue))),
            (random_erasing, RandomErasing(random_erasing, backbone.pixel_mean, backbone.pixel_std)),
        )
        self._augment = tuple(change for strength, change in changes if strength)
        if (mixup or cutmix) and self.target.kind != "class":
            raise ValueError(f"mixup {mixup} and cutmix {cutmix} mix classes, but target is {self.target.kind}; take 0")
        self.mixing = Mixing(mixup, cutmix, self.num_classes)

    def augment(self, train: bool) -> tuple[Augment, ...]:
        return self._augment if train else ()

    def forward(self, batch: Batch) -> Logits:
        if not self.training or not self.mixing:
            return cast(Logits, self.network(batch))
        return cast(Logits, self.network(batch, self.mixing, self.global_rank))


class TextClassifier(Classifier):
    """Classes of texts.

    Args:
        tokenizer: a tokenizer.json, for training from scratch; a pretrained backbone has its own.
        max_tokens: longest text in tokens, special tokens included, of longer ones the beginning; null for all that
            the pretrained backbone has positions for (from scratch: 128).
        pad_to_multiple_of: the packed axis is rounded up to this many tokens.
        kwargs: see :class:`Classifier`.
    """

    needs = ("text",)

    def __init__(
        self,
        tokenizer: str | None = None,
        max_tokens: int | None = None,
        pad_to_multiple_of: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=tokenizer, max_tokens=max_tokens, **kwargs)
        self.pad_to_multiple_of = pad_to_multiple_of


class PairClassifier(Pictured, Classifier):
    """Classes of pictures with texts: answers to questions, entailment.

    Args:
        tokenizer, max_tokens, pad_to_multiple_of: see :class:`TextClassifier`.
        crop_scale, flip: the augmentation; texts often name sides and parts.
        kwargs: see :class:`Classifier`.
    """

    needs = ("image", "text")

    def __init__(
        self,
        tokenizer: str | None = None,
        max_tokens: int | None = None,
        pad_to_multiple_of: int = 128,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=tokenizer, max_tokens=max_tokens, **kwargs)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.set_crops(crop_scale, flip)
