"""The pictures: which glyphs the fonts inside matplotlib hold, and how one is drawn."""

import functools
import io
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from demo_data.captions import COLOURS, JITTER, PAPERS, SCRIPTS, Style, case_of, compose, name_of, script_of
from mmssl.draws import Draws, mix

SURVEY_PIXELS = 48
JPEG_QUALITY = 92
# Font sizes as parts of the picture's side: the usual ones, then those for glyphs that would stick out or be a speck.
_USUAL = tuple(np.linspace(0.8, 0.98, 7))
_SMALLER = (0.6, 0.5, 0.4, 0.32, 0.25, 0.18, 0.12)
_LARGER = (1.4, 1.9, 2.6, 3.6)
_SHIFT = 0.1  # the place varies by this part of the side
_SPECK = 0.22  # a glyph's longer side is at least this part of the picture's


class Drawing(NamedTuple):
    """How a glyph looks: its size in pixels at SURVEY_PIXELS, and its ink shrunk to 16 x 16."""

    width: int
    height: int
    shrunk: bytes


class Glyph(NamedTuple):
    """A character in a font, with what the drawing shows of the font's style."""

    codepoint: int
    font: str  # path of the font file
    style: Style


def font_files(folder: Path) -> list[str]:
    """The DejaVu and STIX fonts (the others are TeX's own encodings, and a font of missing boxes)."""
    return sorted(str(path) for path in folder.glob("*.ttf") if path.name.startswith(("DejaVu", "STIX")))


def survey(path: str) -> list[tuple[int, Drawing]]:
    """Every code point to draw from a font, with its look.

    Left out: what `name_of` leaves out, what draws nothing, and what draws the font's box for missing glyphs.
    """
    font = _font(path, SURVEY_PIXELS)
    with TTFont(path, lazy=True) as table:
        characters = table.getBestCmap()
    absent = next(chr(c) for c in (0xFFFF, 0x10FFFF, 0xE000) if c not in characters)
    missing = _drawing(font, absent)
    found = []
    for codepoint, glyph in sorted(characters.items()):
        drawing = _drawing(font, chr(codepoint)) if name_of(chr(codepoint)) and glyph != ".notdef" else None
        if drawing is not None and drawing != missing:
            found.append((codepoint, drawing))
    return found


def with_styles(surveys: dict[str, list[tuple[int, Drawing]]]) -> list[Glyph]:
    """All glyphs; of its font's style each has only what all fonts share that draw it with the same look.

    Many signs look the same in the bold font and in the regular one: calling one of them bold would be a lie.
    """
    by_character: dict[int, list[tuple[str, Drawing]]] = defaultdict(list)
    for path, found in surveys.items():
        for codepoint, drawing in found:
            by_character[codepoint].append((path, drawing))
    glyphs = []
    for codepoint, drawn in by_character.items():
        styles = [font_style(path) for path, _ in drawn]
        for (path, _), row in zip(drawn, _alike([drawing for _, drawing in drawn]), strict=True):
            like_it = [style for style, alike in zip(styles, row, strict=True) if alike]
            shown = [values[0] if len(set(values)) == 1 else None for values in zip(*like_it, strict=True)]
            glyphs.append(Glyph(codepoint, path, Style(*shown)))
    return glyphs


def is_validation(codepoint: int, seed: int, part: float) -> bool:
    """The split is by character, so that no validation character is in a training picture in any font."""
    return mix(0x76616C, seed, codepoint) < part * 2.0**64


def sample(glyph: Glyph, size: int, image_format: str, draws: Draws) -> dict[str, Any]:
    """One pair in img2dataset's layout: the picture, .txt, .json and .cls."""
    character = chr(glyph.codepoint)
    u = draws.uniform(11).tolist()
    ink = list(PAPERS)[int(u[0] * len(PAPERS))]
    paper = PAPERS[ink][int(u[1] * len(PAPERS[ink]))]
    ink_rgb, paper_rgb = _jittered(ink, u[2:5]), _jittered(paper, u[5:8])
    blend = np.linspace(paper_rgb, ink_rgb, 256).round().astype(np.uint8)  # [coverage, channel]
    pixels = blend[draw(character, glyph.font, size, *u[8:11])]
    caption, words = compose(character, ink, paper, glyph.style)
    about = {
        "caption": caption,
        "char": character,
        "codepoint": f"U+{glyph.codepoint:04X}",
        "name": name_of(character),
        "font": " ".join(filter(None, _font(glyph.font, SURVEY_PIXELS).getname())),
        "script": script_of(character),
        "case": case_of(character),
        "weight": glyph.style.weight,
        "slant": glyph.style.slant,
        "family": glyph.style.family,
        "ink": ink,
        "paper": paper,
        "ink_rgb": ink_rgb,
        "paper_rgb": paper_rgb,
        "words": words,
        "width": size,
        "height": size,
    }
    return {
        image_format: encode(pixels, image_format),
        "txt": caption,
        "json": about,
        "cls": SCRIPTS.index(about["script"]),
    }


def draw(character: str, font_path: str, size: int, scale: float, across: float, down: float) -> np.ndarray:
    """The glyph's coverage, uint8 [size, size], drawn at its final size with antialiasing.

    ``scale``, ``across`` and ``down`` in [0, 1) vary the em size and the place.  The baseline stays near its natural
    height, so that a comma is low and an apostrophe high.
    """
    margin = max(1, size // 32)
    usual = _USUAL[int(scale * len(_USUAL))]
    font, box, longest = _fitted(font_path, character, usual * size)
    if longest > size - 2 * margin:
        for part in (*(part for part in _USUAL[::-1] if part < usual), *_SMALLER):
            font, box, longest = _fitted(font_path, character, part * size)
            if longest <= size - 2 * margin:
                break
    elif longest < _SPECK * size:
        for part in _LARGER:
            font, box, longest = _fitted(font_path, character, part * size)
            if longest >= _SPECK * size:
                break
    x = (size - box[0] - box[2]) / 2 + (across - 0.5) * _SHIFT * size
    y = size / 2 + 0.32 * font.size + (down - 0.5) * _SHIFT * size
    x = min(max(x, margin - box[0]), size - margin - box[2])
    y = min(max(y, margin - box[1]), size - margin - box[3])
    canvas = Image.new("L", (size, size))
    ImageDraw.Draw(canvas).text((round(x), round(y)), character, fill=255, font=font, anchor="ls")
    return np.asarray(canvas)


def encode(pixels: np.ndarray, image_format: str) -> bytes:
    """uint8 [H, W, 3] as "jpg" (4:4:4, so that thin coloured strokes keep their colour) or "png"."""
    if image_format == "jpg":
        return simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def font_style(path: str) -> Style:
    """The style by the names in the font file."""
    family, style = _font(path, SURVEY_PIXELS).getname()
    return Style(
        weight="bold" if "Bold" in str(style) else "regular",
        slant="italic" if {"Italic", "Oblique"} & set(str(style).split()) else "upright",
        family="mono" if "Mono" in str(family) else "sans" if "Sans" in str(family) else "serif",
    )


@functools.lru_cache(maxsize=700)
def _font(path: str, pixels: int) -> ImageFont.FreeTypeFont:
    # The basic layout: one glyph needs no shaping, and Raqm is not in every build of Pillow.
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


def _fitted(path: str, character: str, pixels: float) -> tuple[ImageFont.FreeTypeFont, tuple[float, ...], float]:
    font = _font(path, max(4, round(pixels)))
    box = font.getbbox(character, anchor="ls")
    return font, box, max(box[2] - box[0], box[3] - box[1])


def _drawing(font: ImageFont.FreeTypeFont, character: str) -> Drawing | None:
    mask = font.getmask(character, mode="L")
    box = mask.getbbox()
    if box is None:
        return None
    shrunk = Image.frombytes("L", mask.size, bytes(mask)).resize((16, 16), Image.Resampling.BOX, box=box)
    return Drawing(box[2] - box[0], box[3] - box[1], shrunk.tobytes())


def _alike(drawings: list[Drawing]) -> np.ndarray:
    """Which pairs look the same: bool [n, n].  Thresholds by eye: "+" in sans and serif does, "o" and "A" do not."""
    ink = np.array([np.frombuffer(d.shrunk, np.uint8) for d in drawings], np.float32)
    sizes = np.array([d[:2] for d in drawings])
    difference = np.abs(ink[:, None] - ink[None]).mean(-1)
    mean = ink.mean(-1)
    same_size = (np.abs(sizes[:, None] - sizes[None]) <= 1).all(-1)
    return same_size & (difference <= 0.03 * (mean[:, None] + mean[None]))


def _jittered(colour: str, u: list[float]) -> list[int]:
    jitter = (int(x * (2 * JITTER + 1)) - JITTER for x in u)
    return [min(max(c + j, 0), 255) for c, j in zip(COLOURS[colour], jitter, strict=True)]
