"""Masked prediction as a score: words guessed with the right and with a wrong picture, patches against a mean colour.

Axes as in mmssl.types.  Works with any module that has the MMM objective's two halves.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.data.members import sample_text
from mmssl.draws import Draws
from mmssl.types import Batch, Sample

ALL = "all words"


@dataclass
class WordScore:
    """Hidden words of one kind: how many, and how many were guessed whole with each picture."""

    words: int = 0
    right_picture: int = 0
    wrong_picture: int = 0

    def summary(self) -> dict[str, float]:
        """Accuracies in percent and the gain in points."""
        n = max(1, self.words)
        right, wrong = 100 * self.right_picture / n, 100 * self.wrong_picture / n
        return {"words": self.words, "right_picture": right, "wrong_picture": wrong, "gain": right - wrong}


@dataclass
class PatchScore:
    """Squared error over hidden patches, pixels in [0, 1]: the model's, and that of the visible ones' mean colour."""

    patches: int = 0
    model: float = 0.0
    mean_colour: float = 0.0

    def summary(self) -> dict[str, float | None]:
        """Means over the patches; no ratio where nothing was scored."""
        n = max(1, self.patches)
        ratio = self.model / self.mean_colour if self.mean_colour else None
        return {"patches": self.patches, "model": self.model / n, "mean_colour": self.mean_colour / n, "ratio": ratio}


@dataclass
class MaskedScores:
    words: dict[str, WordScore] = field(default_factory=lambda: defaultdict(WordScore))
    patches: PatchScore = field(default_factory=PatchScore)


@torch.no_grad()
def masked_prediction(
    module: Any,
    samples: Sequence[Sample],
    kinds_of_words: Callable[[Sample], list[str]],
    *,
    seed: int = 0,
    rounds: int = 1,
    batch_size: int = 128,
    progress: Callable[[int], None] = lambda n: None,
) -> MaskedScores:
    """Score a joint model on pairs.

    Words: the text is hidden as in validation (its ratio and strategy), the picture is whole.  The same hidden words
    are guessed twice, with the sample's own picture and with another sample's; a word counts if all its tokens are
    right.  A wrong picture is never one with the same caption.
    Patches: pictures are hidden as in validation, the text likewise.  Meaningful for plain pixels only, so it is left
    at zero for a model that predicts normalised patches.

    Args:
        module: an MMM with weights loaded, on the device to use.
        samples: validation pairs.
        kinds_of_words: for each whole word of a sample's text the row of the table it counts in.
        rounds: how often each text is hidden, each time with other draws.
        progress: called with the number of pairs done.
    """
    prepare = module.prepare(train=False)
    scores = MaskedScores()
    others = _wrong_pictures([sample_text(s) for s in samples], seed)
    every_patch = torch.arange(module.network.backbone.num_patches)
    for turn in range(rounds):
        for start in range(0, len(samples), batch_size):
            chosen = list(range(start, min(start + batch_size, len(samples))))
            examples = [prepare.sample(samples[i], Draws(seed, turn, i), 0) for i in chosen]
            batch = prepare.collate(examples)
            batch.keys = [samples[i].key for i in chosen]
            batch = batch.to(module.device)
            if turn == 0:
                _score_patches(module, batch, scores.patches)
            whole = dataclasses.replace(
                batch.image,
                visible=every_patch.expand(len(chosen), -1).to(module.device),
                hidden=batch.image.hidden[:, :0],
            )
            swapped = [prepare.sample(samples[others[i]], Draws(seed, turn, i), 0).image.pixels for i in chosen]
            wrong = dataclasses.replace(whole, pixels=torch.stack(swapped).to(module.device))
            hits = [
                (module(dataclasses.replace(batch, image=image)).logits.argmax(-1) == batch.text.labels).cpu()
                for image in (whole, wrong)
            ]
            _count_words(module.tokenizer, [samples[i] for i in chosen], batch, hits, kinds_of_words, scores.words)
            progress(len(chosen))
    return scores


def _wrong_pictures(captions: list[str], seed: int) -> list[int]:
    """For each sample one with another caption: its neighbour on a random ring, moved on where captions agree.

    Not a shift of the samples' own order, in which neighbours, or every fourth sample, may look alike.
    """
    n = len(captions)
    if len(set(captions)) < 2:
        raise ValueError("all captions are equal; a wrong picture needs at least two different captions")
    ring = Draws(seed, n).permutation(n).tolist()
    others = [0] * n
    for place, i in enumerate(ring):
        step = 1
        while captions[ring[(place + step) % n]] == captions[i]:
            step += 1
        others[i] = ring[(place + step) % n]
    return others


def _score_patches(module: Any, batch: Batch, score: PatchScore) -> None:
    pixels = module.network.pixels
    if pixels.normalize_patches:
        return
    assert batch.image is not None
    _, completed = pixels.complete(pixels(batch.image.pixels), batch.image, module(batch).patches.float())
    truth = pixels.patchify(batch.image.pixels.float() / 255)
    index = batch.image.hidden.unsqueeze(-1).expand(-1, -1, truth.shape[-1])
    predicted = pixels.patchify(completed).gather(1, index)
    hidden = truth.gather(1, index)
    channels = batch.image.pixels.shape[1]
    seen = truth.gather(1, batch.image.visible.unsqueeze(-1).expand(-1, -1, truth.shape[-1]))
    mean = seen.reshape(len(seen), -1, channels).mean(1)  # [B, C]
    score.patches += hidden.shape[0] * hidden.shape[1]
    score.model += float((predicted - hidden).square().mean(-1).sum())
    painted_mean = mean.unsqueeze(1).repeat(1, 1, hidden.shape[-1] // channels)
    score.mean_colour += float((painted_mean - hidden).square().mean(-1).sum())


def _count_words(
    tokenizer: Any,
    samples: list[Sample],
    batch: Batch,
    hits: list[Tensor],
    kinds_of_words: Callable[[Sample], list[str]],
    scores: dict[str, WordScore],
) -> None:
    assert batch.text is not None
    hidden = batch.text.hidden.cpu().numpy()
    bounds = batch.text.cu_seqlens.cpu().numpy()
    for s, sample in enumerate(samples):
        text = sample_text(sample)
        kinds, word_ids = kinds_of_words(sample), tokenizer.encode(text).word_ids
        here = np.flatnonzero((hidden >= bounds[s]) & (hidden < bounds[s + 1]))
        owners = word_ids[hidden[here] - bounds[s]]
        for word in np.unique(owners):
            tokens = here[owners == word]
            right, wrong = (bool(h[tokens].all()) for h in hits)
            for kind in (ALL, kinds[word]):
                scores[kind].words += 1
                scores[kind].right_picture += right
                scores[kind].wrong_picture += wrong
