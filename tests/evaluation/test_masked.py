"""Scores of masked prediction against models whose score is known, and against sums made by hand."""

import io
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pairs import COLOURS, TINY, caption, picture, sample
from PIL import Image as PILImage

import mmssl
from mmssl.data.tokenizer import whole_words
from mmssl.draws import Draws
from mmssl.evaluation.masked import ALL, MaskedScores, _wrong_pictures, masked_prediction
from mmssl.objectives.base import Pixels
from mmssl.types import Batch, Sample

PATCHES, PATCH = 16, 8
SAMPLES = [sample(i) for i in range(40)]
Pairs = list[tuple[int, int]]


def kinds(sample: Sample) -> list[str]:
    """Colours are one kind; of the other words those that the tokenizer splits would be no kind of their own."""
    words = whole_words(sample.members["txt"].decode())
    return ["colour" if word in COLOURS else "rest" for word in words]


class Fake:
    """The loader's half of a real MMM; what it predicts is given by a test."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: str, normalize: bool = False, **arguments: Any) -> None:
        arguments = {"text_masking": "whole_word", "max_tokens": 32, "pad_to_multiple_of": 1, **arguments}
        real = mmssl.MMM(
            tokenizer, "vit_tiny_patch16_224", TINY, decoder_embed_dim=32, decoder_num_heads=4, **arguments
        )
        self.prepare, self.tokenizer = real.prepare, real.tokenizer
        pixels = Pixels((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), PATCH, normalize)
        self.network = SimpleNamespace(backbone=SimpleNamespace(num_patches=PATCHES), pixels=pixels)
        self.seen: list[Batch] = []

    def __call__(self, batch: Batch) -> Any:
        assert batch.image is not None
        assert batch.text is not None
        self.seen.append(batch)
        ids = self.words(batch)
        assert len(ids) == len(batch.text.labels)
        logits = torch.nn.functional.one_hot(ids, self.tokenizer.vocab_size).float()
        return SimpleNamespace(logits=logits, patches=self.patches(batch))

    def words(self, batch: Batch) -> torch.Tensor:
        assert batch.text is not None
        return batch.text.labels

    def patches(self, batch: Batch) -> torch.Tensor:
        """In the space of the targets; here black's neighbour, the mean that pixels are normalised by."""
        assert batch.image is not None
        return torch.zeros(*batch.image.hidden.shape, PATCH * PATCH * 3)


class ReadsColours(Fake):
    """Reads both colours off the picture, and nothing else."""

    def words(self, batch: Batch) -> torch.Tensor:
        assert batch.image is not None
        assert batch.text is not None
        bounds = batch.text.cu_seqlens.tolist()
        known = torch.full_like(batch.text.input_ids, self.tokenizer.pad_id)
        for s, pixels in enumerate(batch.image.pixels):
            ink, paper = (_name(pixels[:, y, x].tolist()) for y, x in ((10, 16), (1, 1)))
            ids = self.tokenizer.encode(f"a {ink} square with {paper}").ids[:-1]
            known[bounds[s] : bounds[s] + len(ids)] = torch.from_numpy(ids)[: bounds[s + 1] - bounds[s]]
        return known[batch.text.hidden]


def _name(colour: list[int]) -> str:
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], colour, strict=True)))


def test_what_only_the_picture_tells_is_right_with_it_and_chance_without(tokenizer_path: str) -> None:
    fake = ReadsColours(tokenizer_path)
    scores = masked_prediction(fake, SAMPLES, kinds, rounds=4, batch_size=16).words
    colour = scores["colour"].summary()
    assert colour["words"] > 50
    assert colour["right_picture"] == 100
    assert 5 < colour["wrong_picture"] < 50  # four colours
    assert colour["gain"] == pytest.approx(100 - colour["wrong_picture"])
    assert scores[ALL].words == scores["colour"].words + scores["rest"].words
    assert scores[ALL].right_picture == scores["colour"].right_picture + scores["rest"].right_picture
    assert scores[ALL].wrong_picture == scores["colour"].wrong_picture + scores["rest"].wrong_picture


def test_both_guesses_see_the_same_text_and_a_whole_picture(tokenizer_path: str) -> None:
    fake = Fake(tokenizer_path)
    masked_prediction(fake, SAMPLES[:12], kinds, batch_size=12)
    hidden_patches, right, wrong = fake.seen
    assert hidden_patches.image is not None
    assert hidden_patches.image.hidden.shape == (12, 12)
    for batch in (right, wrong):
        assert batch.image is not None
        assert batch.text is not None
        assert torch.equal(batch.text.input_ids, hidden_patches.text.input_ids)  # type: ignore[union-attr]
        assert batch.image.hidden.shape == (12, 0)
        assert torch.equal(batch.image.visible, torch.arange(PATCHES).expand(12, -1))
    pictures = [np.asarray(PILImage.open(io.BytesIO(picture(i)))).transpose(2, 0, 1) for i in range(12)]
    for i in range(12):
        assert np.array_equal(right.image.pixels[i].numpy(), pictures[i])  # type: ignore[union-attr]
        (j,) = [j for j in range(12) if np.array_equal(wrong.image.pixels[i].numpy(), pictures[j])]  # type: ignore[union-attr]
        assert caption(i) != caption(j)


@pytest.mark.parametrize("strategy", ["whole_word", "random"])
def test_a_word_counts_only_if_all_its_hidden_tokens_are_right(tokenizer_path: str, strategy: str) -> None:
    class MissesTheRest(Fake):
        """Wrong on every ## token, right on every other."""

        def words(self, batch: Batch) -> torch.Tensor:
            labels = batch.text.labels.clone()  # type: ignore[union-attr]
            for i, label in enumerate(labels.tolist()):
                if self.tokenizer.token(label).startswith("##"):
                    labels[i] = self.tokenizer.unk_id
            return labels

    odd = [Sample(f"{i}", "memory.tar", {"png": picture(i), "txt": text.encode()}) for i, text in enumerate(ODD)]
    fake = MissesTheRest(tokenizer_path, text_masking=strategy, text_mask_ratio=0.6)
    scores = masked_prediction(fake, odd, lambda s: whole_words(s.members["txt"].decode()), rounds=20).words
    # By hand: which words had a hidden ## token, in the texts that the model saw.
    words, right = Counter[str](), Counter[str]()
    for batch in _word_batches(fake.seen):
        bounds = batch.text.cu_seqlens.tolist()
        hidden = set(batch.text.hidden.tolist())
        for s, text in enumerate(ODD):
            position = bounds[s] + 1
            for word in whole_words(text):
                tokens = [fake.tokenizer.token(int(t)) for t in fake.tokenizer.encode(word).ids[1:-1]]
                mine = [token for k, token in enumerate(tokens) if position + k in hidden]
                position += len(tokens)
                words[word] += bool(mine)
                right[word] += bool(mine) and not any(token.startswith("##") for token in mine)
    split = [word for word in words if len(fake.tokenizer.encode(word).ids) > 3]
    assert split
    assert all(scores[word].right_picture == scores[word].wrong_picture == right[word] for word in words)
    assert all(scores[word].words == words[word] for word in words)
    whole = [word for word in words if words[word] and word not in split]  # an unknown word is never hidden
    assert whole
    assert all(right[word] == words[word] for word in whole)
    if strategy == "whole_word":
        assert all(right[word] == 0 for word in split)


ODD = ["a greenish square wider", "blueness under a table", "red squares upon papers"]


def _word_batches(seen: list[Batch]) -> list[Batch]:
    """The batches guessed with the right picture: the first of the two whose picture is whole."""
    return [batch for batch in seen if batch.image is not None and batch.image.hidden.shape[1] == 0][::2]


def test_long_texts_score_their_beginning(tokenizer_path: str) -> None:
    fake = Fake(tokenizer_path, max_tokens=8)
    scores = masked_prediction(fake, SAMPLES, lambda s: whole_words(s.members["txt"].decode()), rounds=8).words
    assert "red" in scores  # the second word
    assert "table" not in scores  # the last but one
    assert all(score.right_picture == score.words for score in scores.values())


def test_painting_the_mean_colour_by_hand(tokenizer_path: str) -> None:
    """From the files' pixels, patch by patch, in plain NumPy."""
    fake = Fake(tokenizer_path)
    score = masked_prediction(fake, SAMPLES, kinds, batch_size=16).patches
    prepare = fake.prepare(train=False)
    mean_error = model_error = patches = 0.0
    for i, pair in enumerate(SAMPLES):
        truth = np.asarray(PILImage.open(io.BytesIO(pair.members["png"]))).astype(np.float64) / 255
        hidden = prepare.sample(pair, Draws(0, 0, i), 0).image.hidden
        tiles = [truth[8 * (n // 4) : 8 * (n // 4) + 8, 8 * (n % 4) : 8 * (n % 4) + 8] for n in range(PATCHES)]
        mean = np.mean([tiles[n] for n in range(PATCHES) if n not in hidden], axis=(0, 1, 2))
        for n in hidden:
            mean_error += ((tiles[n] - mean) ** 2).mean()
            model_error += ((tiles[n] - np.array([0.5, 0.4, 0.3])) ** 2).mean()  # Fake predicts zeros
            patches += 1
    assert score.patches == patches == 40 * 12
    assert score.mean_colour == pytest.approx(mean_error, rel=1e-5)
    assert score.model == pytest.approx(model_error, rel=1e-5)
    assert score.summary()["ratio"] == pytest.approx(model_error / mean_error, rel=1e-5)
    assert score.summary()["model"] == pytest.approx(model_error / patches, rel=1e-5)


def test_the_mean_has_ratio_one_and_the_truth_zero(tokenizer_path: str) -> None:
    class PaintsMean(Fake):
        def patches(self, batch: Batch) -> torch.Tensor:
            pixels, image = self.network.pixels, batch.image
            assert image is not None
            tiles = pixels.patchify(pixels(image.pixels))
            seen = torch.stack([tiles[s, image.visible[s]].view(-1, 3).mean(0) for s in range(len(tiles))])
            return seen.repeat(1, PATCH * PATCH).unsqueeze(1).expand(-1, image.hidden.shape[1], -1)

    class KnowsAll(Fake):
        def patches(self, batch: Batch) -> torch.Tensor:
            pixels, image = self.network.pixels, batch.image
            assert image is not None
            tiles = pixels.patchify(pixels(image.pixels))
            return torch.stack([tiles[s, image.hidden[s]] for s in range(len(tiles))])

    def ratio(fake: Fake) -> float:
        return masked_prediction(fake, SAMPLES, kinds).patches.summary()["ratio"]

    assert ratio(PaintsMean(tokenizer_path)) == pytest.approx(1, abs=1e-5)
    assert ratio(KnowsAll(tokenizer_path)) == pytest.approx(0, abs=1e-8)


def test_normalised_patches_have_no_squared_error_of_pixels(tokenizer_path: str) -> None:
    score = masked_prediction(Fake(tokenizer_path, normalize=True), SAMPLES, kinds).patches
    assert (score.patches, score.model, score.mean_colour) == (0, 0, 0)


def _plain(scores: MaskedScores) -> Any:
    return {k: vars(v) for k, v in scores.words.items()}, scores.patches.patches, round(scores.patches.model, 3)


def test_scores_do_not_depend_on_the_batch_size_and_depend_on_the_seed(tokenizer_path: str) -> None:
    done: list[int] = []
    fake = ReadsColours(tokenizer_path)
    one = masked_prediction(fake, SAMPLES, kinds, batch_size=7, progress=done.append)
    assert done == [7, 7, 7, 7, 7, 5]
    assert _plain(masked_prediction(fake, SAMPLES, kinds, batch_size=40)) == _plain(one)
    assert _plain(masked_prediction(fake, SAMPLES, kinds, seed=1)) != _plain(one)
    twice = masked_prediction(fake, SAMPLES, kinds, rounds=2)
    assert twice.patches.patches == one.patches.patches  # pictures are hidden once
    assert twice.words[ALL].words > 1.5 * one.words[ALL].words


@pytest.mark.parametrize("captions", [["a", "b"], ["a"] * 9 + ["b"], ["a", "b", "c"] * 5, list("aabbbbcdaaaa")])
def test_a_wrong_picture_never_shares_the_caption(captions: list[str]) -> None:
    for seed in range(20):
        others = _wrong_pictures(captions, seed)
        assert len(others) == len(captions)
        assert all(captions[other] != captions[i] for i, other in enumerate(others))
    if len(captions) > 2:
        assert len({tuple(_wrong_pictures(captions, seed)) for seed in range(20)}) > 1


def test_one_caption_alone_has_no_wrong_picture(tokenizer_path: str) -> None:
    with pytest.raises(ValueError, match=re.escape("at least two different captions")):
        masked_prediction(Fake(tokenizer_path), [SAMPLES[0], SAMPLES[0]], kinds)
