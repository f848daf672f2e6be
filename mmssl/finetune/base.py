"""What every classifier shares: from a source to a network, the loss, the metrics, the parameter groups."""

from typing import Any, ClassVar, Literal, cast, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MetricCollection

from mmssl.backbone import Backbone, make_backbone
from mmssl.data.crops import Crop
from mmssl.data.tokenizer import TextTokenizer
from mmssl.finetune.labels import Labels
from mmssl.finetune.layers import freeze, layer_groups, layer_ids
from mmssl.finetune.network import ClassifierNetwork, Logits, Pool
from mmssl.finetune.prepare import PrepareLabelled, Tokens
from mmssl.finetune.targets import Kind, make_target
from mmssl.pretrained import Pretrained, load_backbone
from mmssl.pretrained.whole import read_checkpoint
from mmssl.training.module import PretrainModule, Rows
from mmssl.types import Batch, Loss

Mode = Literal["full", "linear_probe"]
Weights = Literal["online", "ema"]

SHAPE = "backbone"  # of a checkpoint: what builds its backbone, so that the source it once came from may go


def without_source(checkpoint: str) -> dict[str, Any]:
    """A classifier's arguments, by name, with which a checkpoint of it needs no other source; of others none."""
    shape = read_checkpoint(checkpoint, tensors=False).get(SHAPE)
    if shape is None:
        return {}
    name = shape.pop("name")
    return {"backbone": None, "backbone_name": name, "backbone_options": shape, "img_size": None}


class Classifier(PretrainModule):
    """Base of the classifiers: pooled features, a linear head, cross-entropy.

    Args:
        num_classes: classes are 0 to num_classes - 1; for regression how many numbers there are.
        target: class, one of the classes; multilabel, any number of them; regression, numbers (bring them to about unit
            size).
        backbone: what :func:`mmssl.load_backbone` opens (a run's folder, a checkpoint, an export); null trains
            ``backbone_name`` from scratch.
        backbone_weights: online, or ema where the source has them.
        backbone_name, backbone_options: without a source, a timm model and further arguments of
            :class:`mmssl.Backbone`.
        img_size: another picture size in pixels than that of pretraining; positions are interpolated.
        label_key: field of the sample's .json that holds the label; null for the .cls.
        pool: mean over all patches and text tokens, or cls, the class token (of texts alone: their first).
        mode: full trains everything; linear_probe the head alone, on features of the backbone as it stands.
        head_norm: normalise features by batch statistics before the head, as MAE's linear probe does.
        layer_decay: the rate falls by this factor for every layer below the head (BEiT, MAE: 0.65 to 0.75); 1: it does
            not.
        frozen_layers: 1 freezes the embeddings, 1 + n the first n blocks too.
        drop_path_rate: stochastic depth at the last block, growing linearly from 0.
        label_smoothing: part of the target that is spread over all classes.
        tokenizer, max_tokens: see :class:`TextClassifier`.
        kwargs: optimizer and schedule, see :class:`mmssl.training.module.PretrainModule`.

    Raises:
        ValueError: for a value that makes no sense, or a source that cannot serve.
    """

    needs: ClassVar[tuple[str, ...]]
    tokenizer: TextTokenizer | None = None
    max_tokens = 0
    pad_to_multiple_of = 1
    network: ClassifierNetwork

    def __init__(
        self,
        num_classes: int,
        target: Kind = "class",
        backbone: str | None = None,
        backbone_weights: Weights = "online",
        backbone_name: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        img_size: int | None = None,
        label_key: str | None = None,
        pool: Pool = "mean",
        mode: Mode = "full",
        head_norm: bool = False,
        layer_decay: float = 1.0,
        frozen_layers: int = 0,
        drop_path_rate: float = 0.0,
        label_smoothing: float = 0.0,
        tokenizer: str | None = None,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.target = make_target(target, num_classes)
        if target == "regression" and label_smoothing:
            raise ValueError(
                f"label_smoothing is {label_smoothing}, but numbers have no classes to spread over; take 0"
            )
        if max_tokens is not None and max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}, of which [CLS] and [SEP] take 2; give at least 3")
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; choose full or linear_probe")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay is {layer_decay}; give a factor above 0, at most 1")
        for name, part in {"drop_path_rate": drop_path_rate, "label_smoothing": label_smoothing}.items():
            if not 0 <= part < 1:
                raise ValueError(f"{name} is {part}; it must lie in [0, 1)")
        self.num_classes, self.label_key = num_classes, label_key
        self.layer_decay, self.label_smoothing = layer_decay, label_smoothing
        self._max_tokens = max_tokens
        if backbone is not None and (backbone_name is not None or backbone_options):
            raise ValueError("backbone names a source, which knows its own model; leave out backbone_name and _options")
        if backbone is not None:
            pretrained = load_backbone(
                backbone, weights=backbone_weights, img_size=img_size, drop_path_rate=drop_path_rate
            )
            encoder = pretrained.backbone.train()
            self._take_tokenizer(backbone, pretrained, tokenizer)
        else:
            options = {"img_size": img_size, "drop_path_rate": drop_path_rate, **(backbone_options or {})}
            encoder = self._from_scratch(backbone_name, options, tokenizer)
        if "text" not in self.needs:
            encoder.drop_text()
        encoder.freeze_unused(self.needs)
        probe = mode == "linear_probe"
        if probe:
            encoder.requires_grad_(False)
        freeze(encoder, frozen_layers)
        self.network = ClassifierNetwork(encoder, self.needs, num_classes, pool, probe, head_norm)
        self.loss_weights = {"label": 1.0}
        self.metrics = MetricCollection(self.target.metrics(), compute_groups=False)

    def _from_scratch(self, name: str | None, options: dict[str, Any], tokenizer: str | None) -> Backbone:
        if name is None:
            raise ValueError("neither backbone nor backbone_name is given; name a pretrained source or a timm model")
        if "text" not in self.needs:
            return make_backbone(name, options, self.needs)
        if tokenizer is None:
            raise ValueError("tokenizer is not given, and no pretrained backbone has one; name a tokenizer.json")
        self.tokenizer = TextTokenizer(tokenizer)
        room = options.setdefault("max_text_tokens", self._max_tokens or 128)
        self.max_tokens = self._max_tokens or room
        return make_backbone(name, {**options, "vocab_size": self.tokenizer.vocab_size}, self.needs)

    def _take_tokenizer(self, source: str, pretrained: Pretrained, tokenizer: str | None) -> None:
        if "text" not in self.needs:
            return
        if pretrained.tokenizer is None:
            raise ValueError(
                f"backbone {source} was pretrained without text; {type(self).__name__} needs one that knows text "
                "(mmssl.MLM, mmssl.MMM)"
            )
        if tokenizer is not None and TextTokenizer(tokenizer).to_json() != pretrained.tokenizer.to_json():
            raise ValueError(f"tokenizer {tokenizer} is not the one of backbone {source}; leave it out")
        room = pretrained.backbone.max_text_tokens
        self.tokenizer, self.max_tokens = pretrained.tokenizer, self._max_tokens or room
        if self.max_tokens > room:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, but backbone {source} has {room} positions; give no more"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[SHAPE] = self.network.backbone.arguments()

    # ---- the loader's half

    def prepare(self, train: bool) -> PrepareLabelled:
        predicts = self._trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        tokens = None
        if self.tokenizer is not None:
            tokens = Tokens(self.tokenizer, self.max_tokens, self.pad_to_multiple_of)
        backbone = self.network.backbone
        labels = Labels(self.target, self.label_key, required=not predicts)
        return PrepareLabelled(self.crop(train), tokens, labels, backbone.num_patches)

    def crop(self, train: bool) -> Crop | None:
        """How pictures are cropped; None for texts alone."""
        return None

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
        if batch.valid is not None:
            logits, labels = logits[batch.valid], labels[batch.valid]
        if len(labels):
            self.metrics.update(*self.target.scores(logits, labels))

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

    # ---- optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        ids, head = layer_ids(self.network.backbone)
        return layer_groups(
            self,
            {f"network.backbone.{name}": layer for name, layer in ids.items()},
            head,
            lr=self.lr,
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
            no_weight_decay=self.no_weight_decay(),
        )
