"""Records, from which shards are written, and how a record becomes samples."""

import errno
import io
import json
import os
import stat
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmssl.curation.cutting import cut_text
from mmssl.data.images import decode_image
from mmssl.types import BadSample

_MAX_PIXELS = 170_000_000  # where pictures are made smaller; below what Pillow refuses
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


@dataclass(slots=True)
class Record:
    """One sample to be: where its parts are found.

    ``where`` names it in messages (a path, or "table.csv: row 12").  ``image`` is a path or the encoded bytes.  Text
    and label are given, or lie in files.  ``key`` is None where a running number is to be given.  ``problem`` is set
    for what is known to be unusable: (reason, detail).
    """

    where: str
    key: str | None = None
    image: str | bytes | None = None
    text: str | None = None
    text_path: str | None = None
    json_path: str | None = None
    label: str | None = None
    label_path: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # of the .json
    problem: tuple[str, str] | None = None


def extension_of(path: str) -> str:
    """The part behind the last dot, in lower case; "" where there is none."""
    return os.path.splitext(path)[1][1:].lower()


def safe_key(name: str) -> str:
    """A name as a key: dots would end it, and parts like ``__x`` would hide it (both become or lose "_")."""
    parts = []
    for part in name.replace("\\", "/").split("/"):
        part = "".join(c if c.isprintable() and c != "." else "_" for c in part)
        if part.startswith("__"):
            part = "_" + part.lstrip("_")
        if part:
            parts.append(part)
    return "/".join(parts)


def read_bytes(path: str) -> bytes:
    """A regular file's content.  Raises OSError, also for a device or a pipe, which might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", path)
    with open(path, "rb") as file:
        return file.read()


def read_text(path: str) -> str:
    """A file's text.  Raises OSError and UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8-sig")


def read_fields(path: str) -> dict[str, Any]:
    """A .json beside an image.  Raises OSError, UnicodeDecodeError and ValueError (not JSON, or not an object)."""
    fields = json.loads(read_text(path))
    if not isinstance(fields, dict):
        raise ValueError("holds no JSON object")
    return fields


@dataclass(frozen=True)
class Preparation:
    """How a record becomes samples.

    Args:
        short_side: pictures whose short side is longer, in pixels, are made that small and stored as JPEG; all
            others are copied byte for byte.  None copies all.
        quality: of these JPEGs, 1 to 95.
        max_words: texts without a picture are cut into pieces of at most so many words.

    Raises:
        ValueError: for values that make no sense.
    """

    short_side: int | None = None
    quality: int = 92
    max_words: int | None = None

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; give pixels, at least 1")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}; give a JPEG quality from 1 to 95")
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(f"max_words is {self.max_words}; give at least 1 word")


class Made(NamedTuple):
    """Samples of one record, (key, members) each, or what is wrong with it, and what was done."""

    where: str
    root: str  # the record's key, without the numbers of pieces
    samples: list[tuple[str, dict[str, bytes]]]
    problem: tuple[str, str] | None
    notes: list[str]


def prepare_chunk(preparation: Preparation, chunk: list[Record]) -> list[Made]:
    """Read, decode, re-encode and cut: what runs in every process."""
    return [_prepare(preparation, record) for record in chunk]


def _prepare(preparation: Preparation, record: Record) -> Made:
    root, problem = record.key or "", record.problem
    notes: list[str] = []
    samples: list[tuple[str, dict[str, bytes]]] = []
    if problem is None:
        try:
            samples = _samples(preparation, record, root, notes)
        except BadSample as bad:
            problem = (bad.reason, bad.detail)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problem = ("not_found" if missing else "cannot_be_read", f"{error.filename}: {error.strerror}")
        except UnicodeError as error:  # a subclass of ValueError, so it comes first
            problem = ("not_utf8", str(error))
        except (ValueError, RecursionError) as error:
            problem = ("not_json", f"{record.json_path}: {error}")
    return Made(record.where, root, samples, problem, [] if problem else notes)


def _samples(
    preparation: Preparation, record: Record, key: str, notes: list[str]
) -> list[tuple[str, dict[str, bytes]]]:
    fields = dict(record.fields)
    if record.json_path is not None:
        fields = read_fields(record.json_path) | fields
    text = read_text(record.text_path) if record.text_path is not None else record.text
    if text is None and record.json_path is not None:
        caption = fields.get("caption") or fields.get("text")
        text = caption if isinstance(caption, str) else None
    text = text.strip() if text is not None else None
    if text and "\0" in text:
        raise BadSample("nul_in_text", f"at character {text.index(chr(0))} of {len(text)}")
    members: dict[str, bytes] = {}
    if record.image is not None:
        extension, data = _image(preparation, record.image, notes)
        members[extension] = data
        if not text:
            notes.append("without_text")
    elif not text:
        raise BadSample("no_text", "empty")
    pieces = [text] if text else [None]
    if preparation.max_words is not None and record.image is None and text:
        pieces = list(cut_text(text, preparation.max_words))
    label = record.label
    if label is None and record.label_path is not None:
        label = read_text(record.label_path).strip()
    samples = []
    for number, piece in enumerate(pieces):
        own = dict(members)
        if piece:
            own["txt"] = piece.encode("utf-8")
        if len(pieces) > 1:
            fields |= {"piece": number, "pieces": len(pieces)}
        if fields:
            own["json"] = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")
        if label is not None:
            own["cls"] = label.encode("utf-8")
        samples.append((f"{key}-{number:04d}" if len(pieces) > 1 else key, own))
    if len(pieces) > 1:
        notes.append("cut")
    return samples


def _image(preparation: Preparation, source: str | bytes, notes: list[str]) -> tuple[str, bytes]:
    """(extension, bytes) of a picture that was decoded whole, so that only good ones are written."""
    if isinstance(source, str):
        source = read_bytes(source)
    side = preparation.short_side
    pixels = decode_image(source, *([_MAX_PIXELS] if side is not None else [])).permute(1, 2, 0).numpy()  # [H, W, 3]
    height, width = pixels.shape[:2]
    if side is None or min(height, width) <= side:
        if source[:2] == b"\xff\xd8":
            return "jpg", source
        with Image.open(io.BytesIO(source), formats=tuple(_EXTENSIONS)) as opened:
            return _EXTENSIONS[opened.format or ""], source
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    small = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=preparation.quality, subsampling="4:2:0")
    notes.append("made_smaller")
    return "jpg", data.getvalue()
