"""Small grids a person can look at: original, visible part, completion, and the caption with its guesses."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from mmssl.training.completion import Completion
from mmssl.training.messages import warn
from mmssl.types import Batch

_TILE, _GAP, _TEXT_WIDTH, _FONT = 112, 6, 520, 15
_SEEN, _RIGHT, _WRONG, _TRUTH = (40, 40, 40), (0, 130, 50), (200, 30, 30), (120, 120, 120)


class Pictures(Callback):
    """Complete the same few validation samples every ``every_n_steps`` optimizer steps.

    Writes ``pictures/step-00000100.png`` in the run's folder and hands the grid to every logger that takes images.
    All ranks run the forward pass (a sharded model gathers its weights in it); rank 0 draws.
    """

    def __init__(self, every_n_steps: int = 1000, samples: int = 8) -> None:
        if every_n_steps < 1 or samples < 1:
            raise ValueError(f"every_n_steps {every_n_steps} and samples {samples} must be 1 or more")
        self.every_n_steps = every_n_steps
        self.samples = samples
        self._batch: Batch | None = None
        self._drawn = -1
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn = trainer.global_step  # 0, or where a resumed run had drawn already

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._drawn:
            self._drawn = step  # with accumulation the step stays the same for several batches
            self._draw(trainer, pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._drawn:
            self._draw(trainer, pl_module, trainer.global_step)

    def _draw(self, trainer: Trainer, module: Any, step: int) -> None:
        preview = getattr(trainer.datamodule, "preview", None)  # type: ignore[attr-defined]
        if preview is None:
            return
        if self._batch is None:
            self._batch = preview(self.samples)
        if self._batch is None:  # no validation data
            return
        modes = {part: part.training for part in module.modules()}  # a frozen part may stand in eval mode
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            completion = module.complete(self._batch.to(module.device))
        for part, mode in modes.items():
            part.training = mode
        if trainer.is_global_zero:
            self._save(trainer, draw_grid(completion, getattr(module, "tokenizer", None)), step)

    def _save(self, trainer: Trainer, grid: PILImage.Image, step: int) -> None:
        path = Path(trainer.default_root_dir) / "pictures" / f"step-{step:08d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
        except OSError as error:  # a full disk: a run is worth more than a picture of it
            if not self._warned:
                warn(f"cannot write {path} ({error.strerror or error}); training goes on without the file")
            self._warned = True
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("pictures", [grid], step=step)


def draw_grid(completion: Completion, tokenizer: Any = None, tile: int = _TILE) -> PILImage.Image:
    """One row a sample: three pictures if there are any, then the text if there is one.

    In the text, hidden words stand as the model guessed them: green if right, red if wrong with the truth in
    brackets behind.
    """
    columns = [p for p in (completion.original, completion.visible, completion.completed) if p is not None]
    samples = len(columns[0]) if columns else len(completion.input_ids or [])
    has_text = completion.input_ids is not None and tokenizer is not None
    left = len(columns) * (tile + _GAP)
    font = ImageFont.load_default(_FONT)
    texts = [_pieces(completion, tokenizer, i) for i in range(samples)] if has_text else []
    lines = [_wrap(pieces, font) for pieces in texts]
    line_height = _FONT + 5
    heights = [
        max(tile if columns else 0, line_height * len(lines[i]) if has_text else 0) + _GAP for i in range(samples)
    ]
    width = left + (_TEXT_WIDTH if has_text else 0) + _GAP
    grid = PILImage.new("RGB", (width, sum(heights) + _GAP), "white")
    pen = ImageDraw.Draw(grid)
    y = _GAP
    for i in range(samples):
        for c, pictures in enumerate(columns):
            picture = _to_pil(pictures[i]).resize((tile, tile), PILImage.Resampling.NEAREST)
            grid.paste(picture, (_GAP + c * (tile + _GAP), y))
        if has_text:
            for row, line in enumerate(lines[i]):
                x = float(left + 2 * _GAP)
                for word, colour in line:
                    pen.text((x, y + row * line_height), word, fill=colour, font=font)
                    x += font.getlength(word)
        y += heights[i]
    return grid


def _to_pil(picture: Tensor) -> PILImage.Image:
    array = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return PILImage.fromarray(array)


def _pieces(completion: Completion, tokenizer: Any, i: int) -> list[tuple[str, tuple[int, int, int]]]:
    """The text of sample i as coloured pieces; a piece that begins a word begins with a space."""
    spell = _speller(tokenizer)
    ids = (completion.input_ids or [])[i]
    hidden = dict(zip((completion.hidden or [])[i], range(len(ids)), strict=False))
    pieces: list[tuple[str, tuple[int, int, int]]] = []
    for position, token_id in enumerate(ids):
        if position not in hidden:
            if token_id not in tokenizer.special_ids:
                pieces.append((spell(token_id), _SEEN))
            continue
        guess = (completion.guesses or [])[i][hidden[position]]
        truth = (completion.labels or [])[i][hidden[position]]
        pieces.append((spell(guess), _RIGHT if guess == truth else _WRONG))
        if guess != truth:
            pieces.append((f" ({spell(truth).strip()})", _TRUTH))
    return pieces


@lru_cache(maxsize=2)
def _speller(tokenizer: Any) -> Callable[[int], str]:
    """From token ids to readable text, where a token that begins a word begins with a space.

    A vocabulary marks either what goes on with a word (WordPiece's ##) or what begins one (byte-level BPE's Ġ,
    SentencePiece's ▁); which of them it is, its most frequent mark tells.
    """
    marks = ("##", "Ġ", "▁")
    spellings = [tokenizer.token(id) for id in tokenizer.ordinary_ids]
    mark = max(marks, key=lambda mark: sum(spelling.startswith(mark) for spelling in spellings))
    if mark == "Ġ":
        return lambda id: tokenizer.decode([id]) or tokenizer.token(id)  # its letters are bytes in disguise
    if mark == "▁":
        return lambda id: tokenizer.token(id).replace(mark, " ")
    return lambda id: spelling[2:] if (spelling := tokenizer.token(id)).startswith(mark) else f" {spelling}"


def _wrap(pieces: list[tuple[str, tuple[int, int, int]]], font: Any) -> list[list[tuple[str, tuple[int, int, int]]]]:
    lines: list[list[tuple[str, tuple[int, int, int]]]] = [[]]
    x = 0.0
    for text, colour in pieces:
        length = font.getlength(text)
        if x + length > _TEXT_WIDTH - 3 * _GAP and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((text, colour))
        x += length
    return lines
