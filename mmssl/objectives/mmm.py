"""Joint masked modelling of image-text pairs.

FLAVA (Singh et al. 2022) gave the name, M3AE (Geng et al. 2022) the shape, BEiT-3 (Wang et al. 2023) the experts.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from mmssl.backbone import Backbone, Decoder
from mmssl.data.crops import RandomResizedCrop, ResizeCenterCrop
from mmssl.data.tokenizer import TextTokenizer
from mmssl.draws import Draws
from mmssl.masking.image import ImageStrategy
from mmssl.masking.text import HiddenTokens, TextStrategy
from mmssl.objectives.base import (
    ImageExample,
    Pixels,
    PrepareImage,
    PrepareText,
    Ratio,
    TextHead,
    begin_backbone,
    check_image_masking,
    check_ratio,
    check_text_masking,
    guesses,
    reconstruction_loss,
    token_losses,
)
from mmssl.objectives.mae import PrepareMAE
from mmssl.objectives.mlm import PrepareMLM
from mmssl.training.completion import Completion, unit_pixels
from mmssl.training.module import PretrainModule
from mmssl.types import Batch, Loss, Sample


class PairExample(NamedTuple):
    image: ImageExample
    text: HiddenTokens


@dataclass(frozen=True)
class PrepareMMM:
    """The loader's half: pictures with hidden patches and their packed, corrupted captions."""

    image: PrepareImage
    text: PrepareText
    alone: dict[str, PrepareMAE | PrepareMLM]  # for sources of images alone ("image") and of texts alone ("text")
    needs: tuple[str, ...] = ("image", "text")

    def only(self, part: str) -> PrepareMAE | PrepareMLM:
        """What prepares a source that has "image" or "text" alone."""
        return self.alone[part]

    def sample(self, sample: Sample, draws: Draws, index: int) -> PairExample:
        return PairExample(self.image.sample(sample, draws), self.text.sample(sample, draws, index))

    def collate(self, examples: list[PairExample], valid: list[bool] | None = None) -> Batch:
        image = self.image.collate([e.image for e in examples])
        text = self.text.collate([e.text for e in examples], valid)
        counts = {"text": len(text.labels), "image": image.hidden.numel()}
        return Batch(index=0, keys=[], image=image, text=text, counts=counts)


class PairPrediction(NamedTuple):
    """Of the hidden tokens and of the hidden patches; None for what a batch does not hold."""

    logits: Float[Tensor, "M W"] | None
    patches: Float[Tensor, "B U K"] | None


class MMMNetwork(nn.Module):
    def __init__(self, backbone: Backbone, decoder: Decoder, pixels: Pixels) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.pixels = pixels
        self.text_head = TextHead(backbone.embed_dim, backbone.token_embedding)

    def forward(self, batch: Batch) -> PairPrediction:
        """Hidden tokens and hidden patches, both predicted from one encoding of what is visible of the pair.

        Of a batch of images alone, or of texts alone, there is only the one half.
        """
        image, text = batch.image, batch.text
        if image is None:
            assert text is not None
            return PairPrediction(self.text_head(self.backbone(text=text).text[text.hidden]), None)
        encoded = self.backbone(self.pixels(image.pixels), image.visible, text)
        logits = None if text is None else self.text_head(encoded.text[text.hidden])  # [M, D] -> [M, V]
        if image.hidden.shape[1] == 0:  # the picture is whole: there is nothing to decode
            return PairPrediction(logits, encoded.prefix.new_zeros(batch.size, 0, self.pixels.patch_dim))
        return PairPrediction(logits, self.decoder(encoded, image.visible, image.hidden, text))


class MMM(PretrainModule):
    """Hide words and patches of a pair at once: each is predicted from the visible words and the visible patches.

    Of several sources in ``data.train`` some may hold images alone or texts alone (FLAVA): a batch of these trains the
    same backbone, head and decoder as masked images or as masked text.

    Args:
        tokenizer: path of a tokenizer.json (``mmssl tokenizer train`` makes one).
        backbone: name of a timm model (its VisionTransformer and Eva classes).
        backbone_options: further arguments of :class:`mmssl.Backbone`, such as ``experts: true``.
        text_mask_ratio: part of a caption's ordinary tokens that is hidden, or [first, last] over the run.
        image_mask_ratio: part of the patches that is hidden.
        text_alone_mask_ratio: as ``text_mask_ratio``, where a text has no picture that could help to guess.
        image_alone_mask_ratio: as ``image_mask_ratio``, where a picture has no text.
        text_masking: random, whole_word or span.
        image_masking: random, block or multi_block.
        text_weight, image_weight: of the two losses, 0 or more and not both 0 (M3AE's paper weighs text 0.5).
        max_tokens: longest caption in tokens, special tokens included; longer ones give a random window.
        vocab_size: if given, must equal the tokenizer's.
        norm_pix_loss: predict patches with their own mean and variance taken out.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the pixel decoder, used in pretraining only.
        crop_scale, flip: the augmentation.  Captions often name sides and parts: crop gently, do not flip.
        pad_to_multiple_of: the packed axis is rounded up to this many tokens.
        init_from: where the backbone starts from instead of noise: a run, checkpoint or export of mmssl, with whatever
            picture size, tokenizer and text length, or a file with a vision transformer's weights (timm's, MAE's).
        kwargs: optimizer and schedule, see :class:`PretrainModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        backbone: str = "vit_base_patch16_224",
        backbone_options: dict[str, Any] | None = None,
        text_mask_ratio: Ratio = 0.3,
        image_mask_ratio: float = 0.75,
        text_alone_mask_ratio: Ratio = 0.15,
        image_alone_mask_ratio: float = 0.75,
        text_masking: TextStrategy = "whole_word",
        image_masking: ImageStrategy = "random",
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        max_tokens: int = 64,
        vocab_size: int | None = None,
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = False,
        pad_to_multiple_of: int = 128,
        init_from: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        for name, weight in {"text_weight": text_weight, "image_weight": image_weight}.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}; give 0 or more")
        if text_weight == image_weight == 0:
            raise ValueError("text_weight and image_weight are both 0: nothing would be learned; raise one")
        self.tokenizer = TextTokenizer(tokenizer)
        check_text_masking(self.tokenizer, vocab_size, text_mask_ratio, text_masking, max_tokens)
        check_ratio("text_alone_mask_ratio", text_alone_mask_ratio)
        encoder = begin_backbone(
            backbone,
            backbone_options,
            PrepareMMM.needs,
            init_from,
            self.tokenizer,
            vocab_size=self.tokenizer.vocab_size,
            max_text_tokens=max_tokens,
        )
        check_image_masking(encoder.grid_size, image_mask_ratio, image_masking)
        check_image_masking(encoder.grid_size, image_alone_mask_ratio, image_masking)
        self.text_mask_ratio, self.image_mask_ratio = text_mask_ratio, image_mask_ratio
        self.text_alone_mask_ratio, self.image_alone_mask_ratio = text_alone_mask_ratio, image_alone_mask_ratio
        self.text_masking, self.image_masking = text_masking, image_masking
        self.max_tokens, self.pad_to_multiple_of = max_tokens, pad_to_multiple_of
        self.crop_scale, self.flip = crop_scale, flip
        self.network: MMMNetwork = MMMNetwork(
            encoder,
            Decoder(
                encoder.embed_dim,
                embed_dim=decoder_embed_dim,
                depth=decoder_depth,
                num_heads=decoder_num_heads,
                grid_size=encoder.grid_size,
                patch_size=encoder.patch_size,
                num_prefix_tokens=encoder.num_prefix_tokens,
                text=True,
                max_text_tokens=max_tokens,
            ),
            Pixels(encoder.pixel_mean, encoder.pixel_std, encoder.patch_size, norm_pix_loss),
        )
        self.loss_weights = {"text": text_weight, "image": image_weight}

    def prepare(self, train: bool) -> PrepareMMM:
        size = self.network.backbone.img_size
        crop = RandomResizedCrop(size, scale=self.crop_scale, flip=self.flip) if train else ResizeCenterCrop(size)
        image = PrepareImage(crop, self.network.backbone.grid_size, self.image_mask_ratio, self.image_masking)
        text = PrepareText(
            self.tokenizer,
            self.max_tokens,
            self.text_mask_ratio,
            self.text_masking,
            self.total_batches,
            train,
            self.pad_to_multiple_of,
        )
        alone: dict[str, PrepareMAE | PrepareMLM] = {
            "image": PrepareMAE(replace(image, ratio=self.image_alone_mask_ratio)),
            "text": PrepareMLM(replace(text, ratio=self.text_alone_mask_ratio)),
        }
        return PrepareMMM(image, text, alone)

    def compare(self, prediction: PairPrediction, batch: Batch) -> dict[str, Loss]:
        losses = {}
        if batch.text is not None and prediction.logits is not None:
            losses["text"], losses["text_accuracy"] = token_losses(prediction.logits, batch.text.labels)
        if batch.image is not None and prediction.patches is not None:
            pixels = self.network.pixels
            target = pixels.targets(pixels(batch.image.pixels), batch.image.hidden)
            losses["image"] = reconstruction_loss(prediction.patches, target, batch.valid)
        return losses

    def complete(self, batch: Batch) -> Completion:
        prediction, found = self(batch), Completion()
        if batch.text is not None:
            found = guesses(prediction.logits, batch.text, batch.size)
        if batch.image is None:
            return found
        pixels = self.network.pixels
        seen, completed = pixels.complete(pixels(batch.image.pixels), batch.image, prediction.patches.float())
        return found._replace(original=unit_pixels(batch.image.pixels), visible=seen, completed=completed)
