"""A pretrained backbone with its own preprocessing and tokenizer: pictures and texts in, features out.

Axes: B samples; H, W height and width of a picture; S side of the square that the backbone takes; D width of the
backbone; P prefix tokens (class, registers); N patches; L tokens of the batch's longest text; T text tokens packed on
one axis.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from mmssl.backbone import Backbone, Normalizes
from mmssl.data.crops import ResizeCenterCrop, middle
from mmssl.data.images import load_image, rgb_pixels
from mmssl.data.tokenizer import TextTokenizer, beginning
from mmssl.draws import Draws
from mmssl.types import BadSample, Text

Pool = Literal["cls", "mean"]
Picture = PIL.Image.Image | bytes | Tensor
Pictures = Picture | Sequence[Picture]


class Encoded(NamedTuple):
    """Features after the backbone's final norm.

    ``tokens`` are, of a picture, its prefix tokens (class, registers) and its patches row by row, K = P + N; of a text
    its tokens, [CLS] first, K = L; of a pair the picture's, then the text's, K = P + N + L.  Where ``valid`` is False
    there is padding, and the token is zero.
    """

    pooled: Float[Tensor, "B D"]
    tokens: Float[Tensor, "B K D"]
    valid: Bool[Tensor, "B K"]


class Pretrained(Normalizes):
    """A backbone that takes pictures and texts as they come; :func:`mmssl.load_backbone` makes one.

    ``pool`` of the methods says what ``pooled`` is.  "cls": the class token of a picture or pair, [CLS] of a text.
    "mean": the mean of a picture's patches, of a text's tokens ([CLS] and [SEP] among them), of a pair's patches and
    text tokens; never of prefix tokens.  None: "cls" where there is such a token, else "mean".  Masked pretraining
    trains neither as a summary: for frozen features of MAE "mean" is usually the better one, for fine-tuning both do.

    Moving the module moves all: inputs are brought to its device and dtype.  ``module.compile()`` and
    ``torch.compile(module)`` compile :meth:`forward`, which the ``encode`` methods call.

    Attributes: ``backbone``, ``tokenizer`` (None: no text), ``img_size``, ``embed_dim``.
    """

    def __init__(
        self, backbone: Backbone, tokenizer: TextTokenizer | None, about: dict[str, Any] | None = None
    ) -> None:
        super().__init__(backbone.pixel_mean, backbone.pixel_std)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.about = about or {}
        self.img_size, self.embed_dim = backbone.img_size, backbone.embed_dim

    # ---- from what people have

    def encode_image(self, images: Pictures, pool: Pool | None = None) -> Encoded:
        """Features of pictures.

        Args:
            images: one picture or several: PIL images, encoded files as bytes, uint8 tensors [3, H, W]; or one uint8
                tensor [B, 3, H, W].  They are resized and cropped as in evaluation; squares of the backbone's size pass
                as they are.

        Raises:
            ValueError: no picture, one that cannot be decoded, or a tensor of another type or shape.
        """
        return cast(Encoded, self(self.pixels(images), None, pool))

    def encode_text(self, texts: str | Sequence[str], pool: Pool | None = None) -> Encoded:
        """Features of texts; what is longer than the backbone's ``max_text_tokens`` is cut, [SEP] stays last.

        Raises:
            ValueError: no text, or the backbone knows none.
        """
        return cast(Encoded, self(None, self.text(texts), pool))

    def encode_pair(self, images: Pictures, texts: str | Sequence[str], pool: Pool | None = None) -> Encoded:
        """Features of pairs: each picture and its text see each other.

        Raises:
            ValueError: as the two above, or unequal numbers of pictures and texts.
        """
        pixels, text = self.pixels(images), self.text(texts)
        if len(pixels) != len(text.cu_seqlens) - 1:
            raise ValueError(f"{len(pixels)} pictures came with {len(text.cu_seqlens) - 1} texts; give one per picture")
        return cast(Encoded, self(pixels, text, pool))

    # ---- preprocessing

    def pixels(self, images: Pictures) -> UInt8[Tensor, "B 3 S S"]:
        """Pictures as the backbone takes them, on its device: short side to S (bicubic), the central square."""
        if isinstance(images, Tensor) and images.ndim == 4:
            return self._square(images)
        several = [images] if isinstance(images, PIL.Image.Image | bytes | Tensor) else list(images)
        if not several:
            raise ValueError("there is no picture to encode")
        squares = [self._picture(i, image) for i, image in enumerate(several)]
        return squares[0] if len(squares) == 1 else torch.cat(squares)

    def _picture(self, place: int, image: Picture) -> UInt8[Tensor, "1 3 S S"]:
        crop = ResizeCenterCrop(self.img_size)
        if isinstance(image, Tensor):
            return self._square(image[None])
        try:
            if isinstance(image, bytes):
                square = load_image(image, crop, Draws(0))
            elif isinstance(image, PIL.Image.Image):
                pixels = rgb_pixels(image)
                square = crop.view(pixels.shape[0], pixels.shape[1], Draws(0)).take(pixels)
            else:
                raise ValueError(
                    f"picture {place} is a {type(image).__name__}; give a PIL image (PIL.Image.open(path), "
                    "PIL.Image.fromarray(array)), a file's bytes or a uint8 tensor [3, height, width]"
                )
        except BadSample as error:
            raise ValueError(f"picture {place} cannot be used: {error}") from error
        return square[None].to(self.mean.device)

    def _square(self, images: Tensor) -> UInt8[Tensor, "B 3 S S"]:
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] != 3 or not len(images):
            raise ValueError(
                f"pictures are a tensor {list(images.shape)} of {images.dtype}; give uint8 [B, 3, height, width] with "
                "values from 0 to 255, not normalised"
            )
        size = (self.img_size, self.img_size)
        if images.shape[2:] == size:
            return images.to(self.mean.device)
        view = ResizeCenterCrop(self.img_size).view(images.shape[2], images.shape[3], Draws(0))
        if images.device.type == "cpu":
            rows = images.permute(0, 2, 3, 1).numpy()  # [B, 3, H, W] -> [B, H, W, 3]
            return torch.stack([view.take(np.ascontiguousarray(row)) for row in rows]).to(self.mean.device)
        top, left, height, width = view.box
        part = images[:, :, top : top + height, left : left + width].float()  # devices resize no uint8
        part = F.interpolate(part, view.size, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
        top, left = middle(part.shape[2], self.img_size), middle(part.shape[3], self.img_size)
        return part[:, :, top : top + self.img_size, left : left + self.img_size].to(self.mean.device)

    def text(self, texts: str | Sequence[str]) -> Text:
        """Texts as packed tokens, on the backbone's device."""
        if self.tokenizer is None:
            raise ValueError("this backbone knows no text: it was pretrained on pictures alone")
        several = [texts] if isinstance(texts, str) else list(texts)
        if not several:
            raise ValueError("there is no text to encode")
        for place, text in enumerate(several):
            if not isinstance(text, str):
                raise ValueError(f"text {place} is a {type(text).__name__}; give strings")
        room = self.backbone.max_text_tokens
        encoded = [self.tokenizer.encode(text).ids for text in several]
        ids = [beginning(row, room) for row in encoded]
        ends = list(itertools.accumulate(len(row) for row in ids))
        device = self.mean.device
        return Text(
            input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
            cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32, device=device),
            max_seqlen=max(len(row) for row in ids),
            hidden=torch.empty(0, dtype=torch.int64, device=device),
            labels=torch.empty(0, dtype=torch.int64, device=device),
        )

    # ---- on the device

    def forward(
        self,
        pixels: UInt8[Tensor, "B 3 S S"] | Float[Tensor, "B 3 S S"] | None = None,
        text: Text | None = None,
        pool: Pool | None = None,
    ) -> Encoded:
        """Features of prepared pictures, packed texts, or pairs of them, as :meth:`pixels` and :meth:`text` make them.

        Pixels in floating point are taken to be normalised already.

        With pictures, a text segment beyond the last picture is padding and left out.  The text's part of ``tokens`` is
        as wide as ``text.max_seqlen`` (at most ``max_text_tokens``).

        Raises:
            ValueError: nothing given, an unknown ``pool``, or "cls" for a backbone without class token.
        """
        encoded = self.backbone(None if pixels is None else self.normal(pixels), None, text)
        tokens, valid = [], []
        if encoded.patches is not None:
            tokens = [encoded.prefix, encoded.patches]
            valid = [part.new_ones(part.shape[:2], dtype=torch.bool) for part in tokens]
        if text is not None:
            words, real = self._padded(encoded.text, text, None if pixels is None else len(pixels))
            tokens.append(words)
            valid.append(real)
        pooled = self.pooled(pool, encoded.prefix, tokens, valid)
        return Encoded(pooled, torch.cat(tokens, 1), torch.cat(valid, 1))

    def _padded(
        self, rows: Float[Tensor, "T D"], text: Text, samples: int | None
    ) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """Packed tokens, one text a row; a gather, so that nothing waits for the device."""
        starts, lengths = text.cu_seqlens[:-1].long(), text.cu_seqlens.diff()
        if samples is not None:
            starts, lengths = starts[:samples], lengths[:samples]
        place = torch.arange(min(text.max_seqlen, self.backbone.max_text_tokens), device=rows.device)
        valid = place < lengths[:, None]  # B, L
        index = (starts[:, None] + place).clamp(max=rows.shape[0] - 1)
        return zero_at_padding(rows[index], valid), valid

    def normal(self, pixels: UInt8[Tensor, "B 3 S S"] | Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
        """Pixels as the backbone's patch embedding takes them."""
        if pixels.is_floating_point():
            return pixels.to(self.mean.dtype)
        return self.normalized(pixels).to(self.mean.dtype)

    def pooled(
        self, pool: Pool | None, prefix: Tensor | None, tokens: list[Tensor], valid: list[Tensor]
    ) -> Float[Tensor, "B D"]:
        """One vector a sample, of [prefix, patches, text] or a part of them, zero where they are not ``valid``."""
        if pool not in ("cls", "mean", None):
            raise ValueError(f"pool is {pool!r}; choose 'cls' or 'mean'")
        if prefix is None:
            first: Tensor | None = tokens[0][:, 0]
        else:
            first = prefix[:, 0] if self.backbone.vit.cls_token is not None else None
        if pool == "cls" and first is None:
            raise ValueError("this backbone has no class token; pool by 'mean'")
        if pool != "mean" and first is not None:
            return first
        start = 0 if prefix is None else 1  # prefix tokens are no content
        content, real = torch.cat(tokens[start:], 1), torch.cat(valid[start:], 1)
        return cast(Tensor, content.sum(1) / real.sum(1, keepdim=True).clamp(min=1))  # padding is zero


def zero_at_padding(tokens: Float[Tensor, "B L D"], valid: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    """A product would keep a NaN: of another text, or of a row that is all padding."""
    return torch.where(valid[..., None], tokens, 0.0)
