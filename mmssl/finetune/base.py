"""What all fine-tuning shares: from a source to a backbone, its tokenizer, the parameter groups."""

from typing import Any, ClassVar, Literal

from torch import nn

from mmssl.backbone import Backbone, make_backbone
from mmssl.data.crops import Crop, RandomResizedCrop, ResizeCenterCrop
from mmssl.data.tokenizer import TextTokenizer
from mmssl.finetune.layers import freeze, layer_groups, layer_ids
from mmssl.finetune.lora import add_lora
from mmssl.finetune.prepare import Tokens
from mmssl.pretrained import Pretrained, load_backbone
from mmssl.pretrained.lora import LORA
from mmssl.pretrained.sources import TRAINED_ON, trained_on
from mmssl.pretrained.whole import read_checkpoint
from mmssl.training.module import PretrainModule

Weights = Literal["online", "ema"]

SHAPE = "backbone"  # of a checkpoint: what builds its backbone, so that the source it once came from may go


def without_source(checkpoint: str) -> dict[str, Any]:
    """Arguments, by name, with which a fine-tuned checkpoint needs no other source; of other checkpoints none."""
    shape = read_checkpoint(checkpoint, tensors=False, thorough=False).get(SHAPE)  # all of it is checked on loading
    if shape is None:
        return {}
    name = shape.pop("name")
    return {"backbone": None, "backbone_name": name, "backbone_options": shape, "img_size": None}


class FineTuned(PretrainModule):
    """Base of what is trained on top of a backbone.

    Args:
        backbone: what :func:`mmssl.load_backbone` opens (a run's folder, a checkpoint, an export); null trains
            ``backbone_name`` from scratch.
        backbone_weights: online, or ema where the source has them.
        backbone_name, backbone_options: without a source, a timm model and further arguments of
            :class:`mmssl.Backbone`.
        img_size: another picture size in pixels than that of pretraining; positions are interpolated.
        layer_decay: the rate falls by this factor for every layer below the head (BEiT, MAE: 0.65 to 0.75); 1: it does
            not.
        frozen_layers: 1 freezes the embeddings, 1 + n the first n blocks too.
        drop_path_rate: stochastic depth at the last block, growing linearly from 0.
        lora_rank: above 0 the backbone stays as it is, and low-rank adapters of this rank beside the linear layers of
            its blocks are trained (needs peft).  What :func:`mmssl.load_backbone` opens afterwards has them merged.
        lora_alpha, lora_dropout: adapters count alpha / rank times, null: twice; dropout before them.
        tokenizer, max_tokens: see :class:`TextClassifier`.
        kwargs: optimizer and schedule, see :class:`mmssl.training.module.PretrainModule`.

    Raises:
        ValueError: for a value that makes no sense, or a source that cannot serve.
    """

    needs: ClassVar[tuple[str, ...]]
    tokenizer: TextTokenizer | None = None
    max_tokens = 0
    pad_to_multiple_of = 1
    network: Any

    def __init__(
        self,
        backbone: str | None = None,
        backbone_weights: Weights = "online",
        backbone_name: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        img_size: int | None = None,
        layer_decay: float = 1.0,
        frozen_layers: int = 0,
        drop_path_rate: float = 0.0,
        lora_rank: int = 0,
        lora_alpha: int | None = None,
        lora_dropout: float = 0.0,
        tokenizer: str | None = None,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        if max_tokens is not None and max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}, of which [CLS] and [SEP] take 2; give at least 3")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay is {layer_decay}; give a factor above 0, at most 1")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; it must lie in [0, 1)")
        self.layer_decay, self._max_tokens = layer_decay, max_tokens
        self._trained_on = set(self.needs)
        if backbone is not None and (backbone_name is not None or backbone_options):
            raise ValueError("backbone names a source, which knows its own model; leave out backbone_name and _options")
        if backbone is not None:
            pretrained = load_backbone(
                backbone, weights=backbone_weights, img_size=img_size, drop_path_rate=drop_path_rate
            )
            encoder = pretrained.backbone.train()
            self._trained_on |= trained_on(pretrained.about)
            self._take_tokenizer(backbone, pretrained, tokenizer)
            limit = f"backbone {backbone} has"
        else:
            options = {"img_size": img_size, "drop_path_rate": drop_path_rate, **(backbone_options or {})}
            encoder = self._from_scratch(backbone_name, options, tokenizer)
            limit = "backbone_options' max_text_tokens gives"
        if "text" not in self.needs:
            encoder.drop_text()
        else:
            self.max_tokens = max_tokens or encoder.max_text_tokens
            if self.max_tokens > encoder.max_text_tokens:
                raise ValueError(
                    f"max_tokens is {max_tokens}, but {limit} {encoder.max_text_tokens} positions; give no more"
                )
        encoder.freeze_unused(self.needs)
        freeze(encoder, frozen_layers)
        self._lora_scale = None
        if lora_rank:
            if frozen_layers:
                raise ValueError(f"frozen_layers is {frozen_layers}, but with lora_rank {lora_rank} all are; take 0")
            self._lora_scale = add_lora(encoder, lora_rank, lora_alpha, lora_dropout)
        self.network = nn.ModuleDict({"backbone": encoder})  # to which a task's own class adds its head

    def _from_scratch(self, name: str | None, options: dict[str, Any], tokenizer: str | None) -> Backbone:
        if name is None:
            raise ValueError("neither backbone nor backbone_name is given; name a pretrained source or a timm model")
        if "text" not in self.needs:
            return make_backbone(name, options, self.needs)
        if tokenizer is None:
            raise ValueError("tokenizer is not given, and no pretrained backbone has one; name a tokenizer.json")
        self.tokenizer = TextTokenizer(tokenizer)
        options.setdefault("max_text_tokens", self._max_tokens or 128)
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
        self.tokenizer = pretrained.tokenizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[SHAPE] = self.network.backbone.arguments()
        checkpoint[TRAINED_ON] = sorted(self._trained_on)
        if self._lora_scale is not None:
            checkpoint[LORA] = self._lora_scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._trained_on |= set(checkpoint.get(TRAINED_ON, ()))  # it was built without the source that it came from

    def metric_names(self) -> set[str]:
        """What a validation gives, without "val/": known before a run, so that callbacks can be held to it."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Raises ValueError for a callback that watches a metric which no validation will give."""
        known = {f"val/{name}" for name in ("loss", *self.metric_names())}
        for callback in self.trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.startswith("val/") and monitor not in known:
                raise ValueError(
                    f"{type(callback).__name__} monitors {monitor}, but the validation of {type(self).__name__} gives "
                    f"{', '.join(sorted(known))}; set the callback's monitor to one of these"
                )

    def tokens(self) -> Tokens | None:
        """How texts become tokens; None where there is no text."""
        if self.tokenizer is None:
            return None
        return Tokens(self.tokenizer, self.max_tokens, self.pad_to_multiple_of)

    def crop(self, train: bool) -> Crop | None:
        """How pictures are cropped; None for texts alone."""
        return None

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


class Pictured(FineTuned):
    """What tasks with pictures share: the crops."""

    def set_crops(self, scale: tuple[float, float], flip: bool) -> None:
        self.crop_scale, self.flip = scale, flip

    def crop(self, train: bool) -> RandomResizedCrop | ResizeCenterCrop:
        size = self.network.backbone.img_size
        return RandomResizedCrop(size, scale=self.crop_scale, flip=self.flip) if train else ResizeCenterCrop(size)
