"""Classification of pictures, texts and pairs on top of a pretrained backbone."""

from typing import Any, cast

from mmssl.data.crops import RandomResizedCrop, ResizeCenterCrop
from mmssl.finetune.base import Classifier
from mmssl.finetune.network import Logits, Mixing
from mmssl.types import Batch


class _Pictures(Classifier):
    """What classifiers with pictures share: the crops."""

    def _set_crops(self, scale: tuple[float, float], flip: bool) -> None:
        self.crop_scale, self.flip = scale, flip

    def crop(self, train: bool) -> RandomResizedCrop | ResizeCenterCrop:
        size = self.network.backbone.img_size
        return RandomResizedCrop(size, scale=self.crop_scale, flip=self.flip) if train else ResizeCenterCrop(size)


class ImageClassifier(_Pictures):
    """Classes of pictures.

    Args:
        crop_scale, flip: the augmentation, a random resized crop and mirroring; see
            :class:`mmssl.data.crops.RandomResizedCrop`.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=None, max_tokens=None, **kwargs)
        self._set_crops(crop_scale, flip)
        if (mixup or cutmix) and self.target.kind != "class":
            raise ValueError(f"mixup {mixup} and cutmix {cutmix} mix classes, but target is {self.target.kind}; take 0")
        self.mixing = Mixing(mixup, cutmix, self.num_classes)

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


class PairClassifier(_Pictures):
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
        self._set_crops(crop_scale, flip)
