"""Masked language modelling (BERT, Devlin et al. 2019)."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mmssl.backbone import Backbone
from mmssl.data.tokenizer import TextTokenizer
from mmssl.draws import Draws
from mmssl.masking.text import HiddenTokens, TextStrategy
from mmssl.objectives.base import (
    PrepareText,
    Ratio,
    TextHead,
    begin_backbone,
    check_text_masking,
    guesses,
    token_losses,
)
from mmssl.training.completion import Completion
from mmssl.training.module import PretrainModule
from mmssl.types import Batch, Loss, Sample


@dataclass(frozen=True)
class PrepareMLM:
    """The loader's half: one packed axis of corrupted tokens."""

    text: PrepareText
    needs: tuple[str, ...] = ("text",)

    def sample(self, sample: Sample, draws: Draws, index: int) -> HiddenTokens:
        return self.text.sample(sample, draws, index)

    def collate(self, examples: list[HiddenTokens], valid: list[bool] | None = None) -> Batch:
        text = self.text.collate(examples, valid)
        return Batch(index=0, keys=[], text=text, counts={"text": len(text.labels)})


class MLMNetwork(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_head = TextHead(backbone.embed_dim, backbone.token_embedding)

    def forward(self, batch: Batch) -> Float[Tensor, "M K"]:
        """Logits of the hidden tokens."""
        assert batch.text is not None
        tokens = self.backbone(text=batch.text).text  # [T, D]
        return self.text_head(tokens[batch.text.hidden])  # [M, D] -> [M, K]


class MLM(PretrainModule):
    r"""Hide tokens of a text and predict them from the rest.

    $\mathcal L = \sum_{j \in \mathcal M} -\log p(i_j \mid g(h_j))$ over the hidden set, divided once by its size.
    Of the hidden tokens 80 % are shown as [MASK], 10 % as a random token, 10 % as they are.

    Args:
        tokenizer: path of a tokenizer.json (``mmssl tokenizer train`` makes one).
        backbone: name of a timm model (its VisionTransformer and Eva classes).
        backbone_options: further arguments of :class:`mmssl.Backbone`.
        mask_ratio: part of a text's ordinary tokens that is hidden, or [first, last] to move it in a straight line
            over the run (Wettig et al. 2023 argue for 0.15 to 0.4; Yang et al. 2023 for a falling one).
        masking: random, whole_word or span.
        max_tokens: longest text in tokens, special tokens included; longer ones give a random window.
        vocab_size: if given, must equal the tokenizer's.
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
        mask_ratio: Ratio = 0.15,
        masking: TextStrategy = "random",
        max_tokens: int = 512,
        vocab_size: int | None = None,
        pad_to_multiple_of: int = 128,
        init_from: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.tokenizer = TextTokenizer(tokenizer)
        check_text_masking(self.tokenizer, vocab_size, mask_ratio, masking, max_tokens)
        self.mask_ratio, self.masking, self.max_tokens = mask_ratio, masking, max_tokens
        self.pad_to_multiple_of = pad_to_multiple_of
        self.network: MLMNetwork = MLMNetwork(
            begin_backbone(
                backbone,
                backbone_options,
                PrepareMLM.needs,
                init_from,
                self.tokenizer,
                vocab_size=self.tokenizer.vocab_size,
                max_text_tokens=max_tokens,
            )
        )
        self.loss_weights = {"text": 1.0}

    def prepare(self, train: bool) -> PrepareMLM:
        return PrepareMLM(
            PrepareText(
                self.tokenizer,
                self.max_tokens,
                self.mask_ratio,
                self.masking,
                self.total_batches,
                train,
                self.pad_to_multiple_of,
            )
        )

    def compare(self, prediction: Float[Tensor, "M K"], batch: Batch) -> dict[str, Loss]:
        assert batch.text is not None
        loss, hits = token_losses(prediction, batch.text.labels)
        return {"text": loss, "text_accuracy": hits}

    def complete(self, batch: Batch) -> Completion:
        assert batch.text is not None
        return guesses(self(batch), batch.text, batch.size)
