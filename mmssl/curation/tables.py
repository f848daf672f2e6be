"""Rows of CSV, TSV, JSONL, Parquet and Arrow files as records for ``mmssl shards write``.

Arrow files are those that Hugging Face's ``datasets`` keeps on disk (``save_to_disk``).

A picture's column holds a path (relative to the table's folder, or absolute), the encoded bytes (Parquet), base64, or
Hugging Face's {"bytes": ..., "path": ...}.
"""

import base64
import binascii
import csv
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mmssl.curation.records import Record, extension_of, safe_key

# How base64 of JPEG, PNG, GIF, WebP, BMP and TIFF begins: a path that begins so and is that long does not exist.
_BASE64 = re.compile(r"(?:data:[\w/+.-]+;base64,|(?=/9j/|iVBOR|R0lGOD|UklGR|Qk|SUkq|TU0A)(?=.{64}))", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ROWS = 64  # of Parquet at a time: pictures may lie in them


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the picture, the text, the label and the key; the others go to the .json."""

    image: str | None = None
    text: str | None = None
    label: str | None = None
    key: str | None = None

    def named(self) -> dict[str, str]:
        return {option: name for option, name in vars(self).items() if name is not None}


class _BadRow(Exception):
    """(reason, detail) of one row."""


def check_table(path: str, columns: Columns) -> None:
    """Raises ValueError if the table cannot be read at all, or lacks a column that was named."""
    try:
        names = first_columns(path)
    except OSError as error:
        raise ValueError(f"source {path}: {error.strerror or error}; check the file") from None
    if columns.image is None and columns.text is None:
        raise ValueError(
            f"source {path}: which column holds what? Its columns are {_listed(names)}; "
            "name the picture's by the option image, the text's by the option text, or both"
        )
    for option, name in columns.named().items():
        if name not in names:
            raise ValueError(f"source {path}: has no column {name!r} (for {option}); its columns are {_listed(names)}")


def table_records(path: str, columns: Columns) -> Iterator[Record]:
    """The rows of a table.  Raises ValueError where reading fails."""
    extension = extension_of(path)
    try:
        rows = {"csv": _csv, "tsv": _csv, "parquet": _parquet, "arrow": _arrow}.get(extension, _jsonl)(path)
        for number, row in rows:
            where = f"{path}: row {number}"
            yield _record(where, row, columns, path) if isinstance(row, dict) else Record(where, problem=row)
    except OSError as error:
        raise ValueError(f"source {path}: {error.strerror or error}; check the file") from None


def first_columns(path: str) -> list[str]:
    """The columns of a table; of JSONL, those that its first thousand rows have."""
    extension = extension_of(path)
    if extension == "parquet":
        return list(_open_parquet(path).schema_arrow.names)
    if extension == "arrow":
        return list(_open_arrow(path).schema.names)
    if extension in ("csv", "tsv"):
        with _open(path) as file:
            return next(_reader(file, extension), [])
    with open(path, "rb") as file:
        rows = [row for line in islice(file, 1000) if isinstance(row := _json_row(line), dict)]
    return list(dict.fromkeys(name for row in rows for name in row))


Row = dict[str, Any] | tuple[str, str]  # or what is wrong with it


def _csv(path: str) -> Iterator[tuple[int, Row]]:
    extension = extension_of(path)
    with _open(path) as file:
        reader = _reader(file, extension)
        names: list[str] = next(reader, [])
        number = 0
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, ("not_csv", str(error))
                continue
            if not row:  # a blank line
                number -= 1
            elif len(row) != len(names):
                yield number, ("wrong_columns", f"{len(row)} fields for {len(names)} columns")
            else:
                yield number, dict(zip(names, row, strict=True))


def _open(path: str) -> Any:
    # What is not UTF-8 survives as surrogates, so that one bad row does not end the table.
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _reader(file: Any, extension: str) -> Any:
    csv.field_size_limit(1 << 30)  # pictures may stand in fields, as base64
    return csv.reader(file, delimiter="\t" if extension == "tsv" else ",")


def _jsonl(path: str) -> Iterator[tuple[int, Row]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_row(line)


def _json_row(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return "not_utf8", str(error)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        return "not_json", str(error)
    return row if isinstance(row, dict) else ("not_json", "not an object")


def _parquet(path: str) -> Iterator[tuple[int, Row]]:
    return _batches(path, _open_parquet(path).iter_batches(batch_size=_ROWS))


def _arrow(path: str) -> Iterator[tuple[int, Row]]:
    stream = _open_arrow(path)
    return _batches(path, (batch.slice(at, _ROWS) for batch in stream for at in range(0, len(batch), _ROWS)))


def _batches(path: str, batches: Iterator[Any]) -> Iterator[tuple[int, Row]]:
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:  # what pyarrow's own exceptions are
            reason = str(error).splitlines()[0]
            raise ValueError(f"source {path}: damaged behind row {number} ({reason}); restore it") from None
        if batch is None:
            return
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _open_parquet(path: str) -> Any:
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"source {path}: is no whole Parquet file ({reason}); check it") from None


def _open_arrow(path: str) -> Any:
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(path))
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"source {path}: is no whole Arrow stream ({reason}); check it") from None


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"source {path}: Parquet and Arrow need pyarrow, which is not installed; pip install 'mmssl[parquet]'"
        ) from None
    return pyarrow


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "unknown, for it is empty"


def _record(where: str, row: dict[str, Any], columns: Columns, path: str) -> Record:
    special = columns.named()
    try:
        values = {option: row.get(name) for option, name in special.items()}
        record = Record(where)
        if "key" in special:
            record.key = safe_key(_string(values["key"], "key"))
            if not record.key:
                raise _BadRow("no_key", f"the column {special['key']!r} is empty")
        if "image" in special:
            record.image = _image(values["image"], path)
        if "text" in special:
            record.text = _string(values["text"], "text")
        if values.get("label") not in (None, ""):
            record.label = _string(values["label"], "label")
        record.fields = {
            name: _plain(value) for name, value in row.items() if name not in special.values() and value is not None
        }
        return record
    except _BadRow as problem:
        reason, detail = problem.args
        return Record(where, problem=(reason, detail))


def _string(value: Any, what: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "surrogateescape")
    elif isinstance(value, float) and value.is_integer() and what != "text":
        text = str(int(value))  # what pandas makes of integers in a column with gaps
    elif isinstance(value, (str, int, float)):
        text = str(value)
    else:
        raise _BadRow(f"no_{what}", f"holds {type(value).__name__}, not text")
    if any("\udc80" <= c <= "\udcff" for c in text):
        raise _BadRow("not_utf8", f"the {what}")
    return text


def _image(value: Any, path: str) -> str | bytes:
    if isinstance(value, dict):  # Hugging Face's Image feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise _BadRow("no_image", "the column is empty" if not value else f"holds {type(value).__name__}")
    begin = _BASE64.match(value)
    if begin:
        try:
            return base64.b64decode(value[begin.end() :], validate=True)
        except binascii.Error as error:
            raise _BadRow("not_base64", str(error)) from None
    if _URL.match(value):
        raise _BadRow("url", f"{value[:200]} is not fetched; use img2dataset")
    return os.path.join(os.path.dirname(path), value)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    return str(value)  # dates, decimals
