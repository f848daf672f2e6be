"""RandAugment and random erasing against timm's own, and as functions of a sample's draws."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from labelled import CLASSES, write_labelled
from lightning import Callback
from pairs import TINY
from test_classifiers import SCRATCH, trainer
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch import Tensor

import mmssl
from mmssl.draws import Draws
from mmssl.finetune.augment import OPERATIONS, RandAugment, RandomErasing


def photo(side: int = 32) -> Tensor:
    """Smooth colours, all different: every operation changes it.  uint8 [3, side, side], channels-last strides."""
    x = np.linspace(0, 1, side)
    planes = np.stack([x[:, None] * x, x[None] * np.ones((side, 1)), np.sin(6 * x)[:, None] * 0.5 + 0.5 * x], -1)
    return torch.from_numpy((20 + 200 * planes).astype(np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 9.0, 10.0])
def test_arguments_are_timms(name: str, magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    level_to_arguments = auto_augment.LEVEL_TO_ARG[name]
    for sign, number in ((1, 0.2), (-1, 0.8)):
        monkeypatch.setattr(random, "random", lambda number=number: number)
        expected = level_to_arguments(magnitude, {}) if level_to_arguments else ()
        expected = expected if isinstance(expected, tuple) else (expected,)
        expected = (1,) if (name, magnitude) == ("PosterizeIncreasing", 10.0) else expected  # 0 bits are no picture
        assert OPERATIONS[name](magnitude / 10, sign) == pytest.approx(expected, abs=1e-12)


def test_operations_are_timms() -> None:
    assert list(OPERATIONS) == auto_augment._RAND_INCREASING_TRANSFORMS


def test_pictures_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations with the same strengths, applied by timm's own class."""
    ours, seen = RandAugment(9, (100, 110, 120)), set()
    for i in range(200):
        chosen = ours.chosen(Draws(5, i))
        picture = PIL.Image.fromarray(photo().permute(1, 2, 0).numpy())
        for name, arguments in chosen:
            seen.add(name)
            hparams = {"img_mean": (100, 110, 120), "interpolation": PIL.Image.Resampling.BICUBIC}
            operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=9, hparams=hparams)
            operation.level_fn = lambda level, hparams, arguments=arguments: arguments
            picture = operation(picture)
        assert np.array_equal(ours(photo(), Draws(5, i)).permute(1, 2, 0).numpy(), np.array(picture)), chosen
    assert seen == set(OPERATIONS)


def test_the_strongest_of_all() -> None:
    """At the end of the scale, where timm's own class fails with a newer Pillow."""
    names = Counter(name for i in range(300) for name, _ in RandAugment(10).chosen(Draws(0, i)))
    assert set(names) == set(OPERATIONS)
    for i in range(300):
        assert RandAugment(10)(photo(8), Draws(0, i)).shape == (3, 8, 8)


def test_what_is_drawn_is_spread_as_timms() -> None:
    """How often each operation comes, how strong, with which sign, and how many a picture gets."""
    n, recorded = 20_000, Counter()
    ours = RandAugment(9)
    levels: list[float] = []
    signs: Counter[bool] = Counter()
    pictures: Counter[int] = Counter()
    for i in range(n):
        chosen = ours.chosen(Draws(1, i))
        pictures[len(chosen)] += 1
        for name, arguments in chosen:
            recorded[name] += 1
            if name == "Rotate":
                levels.append(abs(arguments[0]) / 3)
                signs[arguments[0] > 0] += 1
    for count, part in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert pictures[count] / n == pytest.approx(part, abs=0.015)
    for name in OPERATIONS:
        assert recorded[name] / n == pytest.approx(1 / 15, rel=0.12), name
    assert signs[True] / len(levels) == pytest.approx(0.5, abs=0.06)
    random.seed(0)
    timms = np.sort([min(max(random.gauss(9, 0.5), 0.0), 10.0) for _ in range(len(levels))])
    assert np.abs(np.sort(levels) - timms).mean() < 0.06  # the earth mover's distance
    assert np.mean(np.array(levels) == 10) == pytest.approx(0.0228, abs=0.015)


def test_erasing_is_spread_as_timms() -> None:
    """The part of the area, the form, the place and the values, against timm's class on normalised pictures."""
    side, n = 32, 3000
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours, theirs = RandomErasing(0.25, mean, std), TimmErasing(0.25, mode="pixel", device="cpu")
    random.seed(0)
    torch.manual_seed(0)

    def numbers(changed: Tensor) -> tuple[float, ...] | None:
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        if not len(rows):
            return None
        h, w = float(rows[-1] - rows[0] + 1), float(columns[-1] - columns[0] + 1)
        return h * w / side**2, math.log(h / w), float(rows[0]), float(columns[0])

    found: list[list[tuple[float, ...]]] = [[], []]
    values: list[Tensor] = []
    for i in range(n):
        grey = torch.full((3, side, side), 255, dtype=torch.uint8)  # hardly a value of the noise
        erased = ours(grey, Draws(0, i))
        boxes = ours.box(side, Draws(0, i))
        assert (boxes is None) == torch.equal(erased, grey)
        if boxes is not None:
            top, left, h, w = boxes
            part = erased[:, top : top + h, left : left + w]
            values.append(part.reshape(3, -1).double() / 255)
            outside = erased.clone()
            outside[:, top : top + h, left : left + w] = 255
            assert torch.equal(outside, grey)
            found[0].append((h * w / side**2, math.log(h / w), float(top), float(left)))
        other = numbers((theirs(torch.full((3, side, side), 99.0)) != 99).any(0))
        if other is not None:
            found[1].append(other)
    for group in found:
        assert len(group) / n == pytest.approx(0.25, abs=0.03)
    for mine, timms in zip(np.array(found[0]).T, np.array(found[1]).T, strict=True):
        spread = timms.std()
        assert mine.mean() == pytest.approx(timms.mean(), abs=0.15 * spread)
        assert mine.std() == pytest.approx(spread, rel=0.15)
    noise = torch.cat(values, 1)
    clipped = torch.randn(3, 200_000, dtype=torch.double) * torch.tensor(std)[:, None] + torch.tensor(mean)[:, None]
    clipped = clipped.clamp(0, 1)
    torch.testing.assert_close(noise.mean(1), clipped.mean(1), atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(1), clipped.std(1), atol=0.01, rtol=0)


def test_a_function_of_the_draws_alone() -> None:
    """The same draws, the same picture; other samples and other epochs, other ones; what is given stays as it was."""
    for change in (RandAugment(9), RandomErasing(0.5)):
        source = photo()
        before = source.clone()
        runs = []
        for seed in (1, 2):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            runs.append([change(source, Draws(0, epoch, i)) for epoch in range(2) for i in range(30)])
        first, again = runs
        assert all(map(torch.equal, first, again))
        assert torch.equal(source, before)
        different = [not torch.equal(a, b) for a, b in zip(first[:30], first[30:], strict=True)]  # epoch by epoch
        assert sum(different) > 10
        assert len({picture.numpy().tobytes() for picture in first[:30]}) > 10
        assert all(p.stride() == source.stride() for p in first)  # channels-last, as pictures are stacked


def test_nothing_drawn_is_identity() -> None:
    assert torch.equal(RandomErasing(0.0)(photo(), Draws(0)), photo())
    weak = RandAugment(0)
    for i in range(100):  # at magnitude 0 colours and places hardly move
        for name, arguments in weak.chosen(Draws(0, i)):
            neutral = {"Rotate": 0, "ShearX": 0, "TranslateXRel": 0, "ColorIncreasing": 1}.get(name)
            assert neutral is None or abs(arguments[0] - neutral) < 6
    plain, off = (mmssl.ImageClassifier(**SCRATCH, **more) for more in ({}, {"rand_augment": 0, "random_erasing": 0}))
    assert plain.prepare(True).augment == off.prepare(True).augment == ()


def pictures_seen(shard: str, workers: int, **more: Any) -> list[Tensor]:
    """The pictures of 12 batches of 8, two epochs of 48."""
    module = mmssl.ImageClassifier(**SCRATCH, **more)
    data = mmssl.DataModule(shard, shard, batch_size=8, num_workers=workers)
    seen: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch.image.pixels.clone())

    trainer(Path(shard).parent, 12, callbacks=[Watch()]).fit(module, data)
    return seen


def test_the_loader_augments_training_alone(tmp_path: Path) -> None:
    """Whatever the number of workers; validation and predictions see the plain picture."""
    shard = write_labelled(tmp_path / "a.tar", 48)
    strong = {"rand_augment": 9, "random_erasing": 0.25}
    alone, workers = pictures_seen(shard, 0, **strong), pictures_seen(shard, 2, **strong)
    assert all(map(torch.equal, alone, workers))
    plain = pictures_seen(shard, 0)
    changed = [not torch.equal(a, b) for x, y in zip(alone, plain, strict=True) for a, b in zip(x, y, strict=True)]
    assert 0.5 < np.mean(changed) < 0.9  # 1 - 0.25 * 0.75 = 0.81, but some operations leave some pictures as they are
    module = mmssl.ImageClassifier(**SCRATCH, **strong)
    assert [type(change) for change in module.prepare(True).augment] == [RandAugment, RandomErasing]
    assert module.prepare(False).augment == ()
    assert module.prepare(True).augment[0].fill == (128, 128, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rand_augment": 11}, "rand_augment is 11; give a magnitude up to 10"),
        ({"rand_augment": -1}, "rand_augment is -1"),
        ({"random_erasing": 1.5}, "random_erasing is 1.5; give a probability"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmssl.ImageClassifier(
            num_classes=CLASSES, backbone_name="vit_tiny_patch16_224", backbone_options=TINY, **options
        )
