"""The grids a person looks at: colours, sizes, the steps they are drawn at, and that drawing changes nothing."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from pairs import TINY
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader

import mmssl
from mmssl.data.tokenizer import TextTokenizer, train_tokenizer
from mmssl.training.callbacks.pictures import Pictures, _pieces, draw_grid
from mmssl.training.completion import Completion

GREEN, RED, GREY, DARK = (0, 130, 50), (200, 30, 30), (120, 120, 120), (40, 40, 40)


def completion(tokenizer: TextTokenizer, text: str, hidden: list[int], wrong: dict[int, int]) -> Completion:
    """``hidden`` positions of one text; guessed right, but for the positions in ``wrong``."""
    ids = tokenizer.encode(text).ids.tolist()
    seen = [tokenizer.mask_id if p in hidden else i for p, i in enumerate(ids)]
    guesses = [wrong.get(p, ids[p]) for p in hidden]
    return Completion(input_ids=[seen], hidden=[hidden], labels=[[ids[p] for p in hidden]], guesses=[guesses])


def colours_in(grid: PILImage.Image) -> set[tuple[int, int, int]]:
    return set(map(tuple, np.asarray(grid).reshape(-1, 3).tolist()))


def test_right_guesses_are_green_wrong_ones_red_with_the_truth(tokenizer_path: str) -> None:
    tokenizer = TextTokenizer(tokenizer_path)
    text = "a red square with blue paper"
    ids = tokenizer.encode(text).ids.tolist()
    right = completion(tokenizer, text, [2], {})
    assert ("".join(word for word, _ in _pieces(right, tokenizer, 0))) == " a red square with blue paper"
    assert [word for word, colour in _pieces(right, tokenizer, 0) if colour == GREEN] == [" red"]
    assert GREEN in colours_in(draw_grid(right, tokenizer))
    assert RED not in colours_in(draw_grid(right, tokenizer))

    wrong = completion(tokenizer, text, [2, 3], {2: ids[5]})
    coloured = [piece for piece in _pieces(wrong, tokenizer, 0) if piece[1] != DARK]
    assert coloured == [(" blue", RED), (" (red)", GREY), (" square", GREEN)]
    assert {RED, GREY, GREEN, DARK} <= colours_in(draw_grid(wrong, tokenizer))


def test_sizes_and_places_of_the_pictures(tokenizer_path: str) -> None:
    shades = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1, 1)
    original, visible, completed = shades.expand(3, 2, 3, 8, 8)
    grid = draw_grid(Completion(original, visible, completed * 7 - 3), tile=50)  # out of [0, 1]: cut, not wrapped
    assert grid.size == (3 * 56 + 6, 2 * 56 + 6)
    pixels = np.asarray(grid)
    for row in range(2):
        for column, shade in enumerate((0, 128, 255)):
            x, y = 6 + 56 * column, 6 + 56 * row
            assert (pixels[y : y + 50, x : x + 50] == shade).all()
    assert (pixels[:6] == 255).all()
    assert (pixels[:, 56:62] == 255).all()

    tokenizer = TextTokenizer(tokenizer_path)
    text = completion(tokenizer, "a red square", [2], {})
    both = draw_grid(text._replace(original=original[:1], visible=visible[:1], completed=completed[:1]), tokenizer, 50)
    assert both.size == (3 * 56 + 520 + 6, 56 + 6)
    assert (np.asarray(both)[:, 3 * 56 : 3 * 56 + 12] == 255).all()  # the text keeps clear of the pictures
    words_only = draw_grid(text, tokenizer)
    assert words_only.size == (526, 20 + 6 + 6)


@pytest.mark.parametrize("text", ["a red square with blue paper under it " * 12, "red" * 33])
def test_long_texts_are_wrapped_within_the_picture(tokenizer_path: str, text: str) -> None:
    tokenizer = TextTokenizer(tokenizer_path)
    grid = np.asarray(draw_grid(completion(tokenizer, text, [2], {}), tokenizer))
    assert grid.shape[0] > 45
    assert (grid[:, -6:] == 255).all()
    assert (grid[-6:] == 255).all()


@pytest.mark.parametrize("model", ["wordpiece", "bpe", "unigram"])
def test_texts_read_as_they_were_written(model: str, tmp_path: Path) -> None:
    texts = ["a red square with blueish paper", "the reddish squares of Zoë are upon tables"] * 10
    tokenizer = train_tokenizer(texts, 280 if model == "bpe" else 60, tmp_path / "t.json", model, lowercase=True)
    text = texts[0]
    assert len(tokenizer.encode(text).ids) > 8 + 2  # words are split
    pieces = _pieces(completion(tokenizer, text, [2, 3], {}), tokenizer, 0)
    assert "".join(word for word, _ in pieces).strip() == text


# ---- the callback


class Modes(Callback):
    """Notes, at the start of every batch, who is in training mode."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((pl_module.training, pl_module.network.decoder.training))


def run(
    folder: Path,
    shards: str,
    callbacks: list[Callback],
    *,
    frozen: bool = False,
    val: bool = True,
    accumulate: int = 2,
    **trainer: Any,
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    options = {**TINY, "drop_path_rate": 0.3}  # draws from the global generator in every step
    module = mmssl.MAE("vit_tiny_patch16_224", options, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)
    if frozen:
        module.network.decoder.eval()
    data = mmssl.DataModule(shards, val=shards if val else None, batch_size=8, num_workers=0, val_samples=8)
    runner = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **{"max_steps": 5, "logger": False, **trainer},
    )
    runner.fit(module, data)
    return module.state_dict()


def drawn(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (folder / "pictures").glob("*"))


def test_drawing_changes_no_weight_and_happens_at_the_right_steps(tmp_path: Path, pair_shards: str) -> None:
    with_pictures = run(tmp_path / "with", pair_shards, [Pictures(every_n_steps=2, samples=3)])
    without = run(tmp_path / "without", pair_shards, [])
    for name, weight in without.items():
        assert torch.equal(with_pictures[name], weight), name
    assert drawn(tmp_path / "with") == [2, 4, 5]  # and 5: the end
    assert PILImage.open(tmp_path / "with" / "pictures" / "step-00000002.png").size == (3 * 118 + 6, 3 * 118 + 6)


def test_every_picture_is_drawn_once(tmp_path: Path, pair_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Pictures, "_save", lambda self, trainer, grid, step: saved.append(step))
    run(tmp_path, pair_shards, [Pictures(every_n_steps=1, samples=2)], accumulate=3, max_steps=3)
    assert saved == [1, 2, 3]


def test_a_full_disk_stops_no_run(
    tmp_path: Path, pair_shards: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Images(DummyLogger):
        steps: ClassVar[list[int]] = []

        def log_image(self, key: str, images: list[Any], step: int) -> None:
            self.steps.append(step)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PILImage.Image, "save", full)
    run(tmp_path, pair_shards, [Pictures(every_n_steps=1, samples=2)], accumulate=1, max_steps=3, logger=Images())
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert Images.steps == [1, 2, 3]


def test_training_mode_is_restored_part_by_part(tmp_path: Path, pair_shards: str) -> None:
    modes = Modes()
    run(tmp_path, pair_shards, [Pictures(every_n_steps=1, samples=2), modes], frozen=True, accumulate=1, max_steps=3)
    assert modes.seen == [(True, False)] * 3


def test_without_validation_data_nothing_is_drawn(tmp_path: Path, pair_shards: str) -> None:
    run(tmp_path, pair_shards, [Pictures(every_n_steps=1)], val=False, max_steps=2)
    assert not (tmp_path / "pictures").exists()


def test_with_a_plain_loader_nothing_is_drawn(tmp_path: Path) -> None:
    from toy import ToyModule, ToyStream

    class Plain(ToyModule):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super(ToyModule, self).optimizer_step(*args, **kwargs)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    runner = Trainer(default_root_dir=tmp_path, max_steps=2, callbacks=[Pictures(every_n_steps=1)], **quiet)
    runner.fit(Plain(), DataLoader(ToyStream(0, None), batch_size=None))
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"samples": 0}])
def test_nonsense_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        Pictures(**arguments)
