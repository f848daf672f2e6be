"""Masked autoencoder (He et al. 2022)."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mmssl.backbone import Backbone, Decoder
from mmssl.data.crops import RandomResizedCrop, ResizeCenterCrop
from mmssl.draws import Draws
from mmssl.masking.image import ImageStrategy
from mmssl.objectives.base import (
    ImageExample,
    Pixels,
    PrepareImage,
    begin_backbone,
    check_image_masking,
    reconstruction_loss,
)
from mmssl.training.completion import Completion, unit_pixels
from mmssl.training.module import PretrainModule
from mmssl.types import Batch, Loss, Sample


@dataclass(frozen=True)
class PrepareMAE:
    """The loader's half: pictures with the indices of their visible and hidden patches."""

    image: PrepareImage
    needs: tuple[str, ...] = ("image",)

    def sample(self, sample: Sample, draws: Draws, index: int) -> ImageExample:
        return self.image.sample(sample, draws)

    def collate(self, examples: list[ImageExample], valid: list[bool] | None = None) -> Batch:
        image = self.image.collate(examples)
        return Batch(index=0, keys=[], image=image, counts={"image": image.hidden.numel()})


class MAENetwork(nn.Module):
    def __init__(self, backbone: Backbone, decoder: Decoder, pixels: Pixels) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.pixels = pixels

    def forward(self, batch: Batch) -> Float[Tensor, "B U K"]:
        """The hidden patches, in the space of the targets."""
        assert batch.image is not None
        image = batch.image
        encoded = self.backbone(self.pixels(image.pixels), image.visible)
        return self.decoder(encoded, image.visible, image.hidden)


class MAE(PretrainModule):
    """Hide patches of a picture, encode the visible ones alone, predict the pixels of the hidden ones.

    The loss is the mean squared error over hidden patches, each normalised to zero mean and unit variance unless
    ``norm_pix_loss`` is false.

    Args:
        backbone: name of a timm model (its VisionTransformer and Eva classes).
        backbone_options: further arguments of :class:`mmssl.Backbone`.
        mask_ratio: part of the patches that is hidden.
        masking: random, block or multi_block.
        norm_pix_loss: predict patches with their own mean and variance taken out (He et al. 2022, section 4.1).
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder, used in pretraining only.
        crop_scale: smallest and largest area of the random resized crop, as a part of the picture.
        flip: mirror every second picture.
        init_from: where the backbone starts from instead of noise: a run, checkpoint or export of mmssl, with whatever
            picture size, tokenizer and text length, or a file with a vision transformer's weights (timm's, MAE's).
        kwargs: optimizer and schedule, see :class:`PretrainModule`.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224",
        backbone_options: dict[str, Any] | None = None,
        mask_ratio: float = 0.75,
        masking: ImageStrategy = "random",
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        init_from: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        encoder = begin_backbone(backbone, backbone_options, PrepareMAE.needs, init_from)
        check_image_masking(encoder.grid_size, mask_ratio, masking)
        self.mask_ratio, self.masking = mask_ratio, masking
        self.crop_scale, self.flip = crop_scale, flip
        self.network: MAENetwork = MAENetwork(
            encoder,
            Decoder(
                encoder.embed_dim,
                embed_dim=decoder_embed_dim,
                depth=decoder_depth,
                num_heads=decoder_num_heads,
                grid_size=encoder.grid_size,
                patch_size=encoder.patch_size,
                num_prefix_tokens=encoder.num_prefix_tokens,
            ),
            Pixels(encoder.pixel_mean, encoder.pixel_std, encoder.patch_size, norm_pix_loss),
        )
        self.loss_weights = {"image": 1.0}

    def prepare(self, train: bool) -> PrepareMAE:
        size = self.network.backbone.img_size
        crop = RandomResizedCrop(size, scale=self.crop_scale, flip=self.flip) if train else ResizeCenterCrop(size)
        return PrepareMAE(PrepareImage(crop, self.network.backbone.grid_size, self.mask_ratio, self.masking))

    def compare(self, prediction: Float[Tensor, "B U K"], batch: Batch) -> dict[str, Loss]:
        assert batch.image is not None
        pixels = self.network.pixels
        target = pixels.targets(pixels(batch.image.pixels), batch.image.hidden)
        return {"image": reconstruction_loss(prediction, target, batch.valid)}

    def complete(self, batch: Batch) -> Completion:
        assert batch.image is not None
        pixels = self.network.pixels
        seen, completed = pixels.complete(pixels(batch.image.pixels), batch.image, self(batch).float())
        return Completion(unit_pixels(batch.image.pixels), seen, completed)
