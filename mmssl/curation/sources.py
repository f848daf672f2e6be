"""What ``mmssl shards write`` reads: folders of images, folders of texts, text files, and tables (see tables.py).

A source becomes records, in an order that does not change, before any picture or document is opened.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mmssl.curation.records import Record, extension_of, safe_key
from mmssl.curation.tables import Columns, check_table, table_records
from mmssl.data.members import IMAGE_EXTENSIONS

_BESIDE = {"txt": "text_path", "json": "json_path", "cls": "label_path"}
TABLES = ("csv", "tsv", "jsonl", "ndjson", "parquet", "arrow")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_STATE = "state.json"  # of a data set that Hugging Face's datasets saved


def records_of(sources: Sequence[str], columns: Columns, folder_labels: bool, per_line: bool) -> Iterator[Record]:
    """The records of all sources, one after the other.

    Args:
        sources: folders of images (with captions beside them), of texts or of tables; tables; .txt files.
        columns: of the tables.
        folder_labels: the names of the folders that hold the images become classes.
        per_line: every line of a .txt is a document.

    Raises:
        ValueError: at once, for a source that cannot be read at all and for options that do not fit the sources.
    """
    kinds = {source: kind_of(source) for source in sources}
    if not kinds:
        raise ValueError("no source is given; name folders, .txt files or tables")
    if len(kinds) < len(sources):
        raise ValueError("a source is named twice; name every source once")
    for source, kind in kinds.items():
        for table in _tables(source) if kind in ("table", "tables") else []:
            check_table(table, columns)
    found = set(kinds.values())
    if columns.named() and not found & {"table", "tables"}:
        raise ValueError(f"--{next(iter(columns.named()))} names a table's column, and no source is a table")
    if folder_labels and "images" not in found:
        raise ValueError("--labels folder needs a folder of images")
    if per_line and not found & {"text", "texts"}:
        raise ValueError("--per_line is for .txt files, and no source is one")
    return _all_records(kinds, columns, folder_labels, per_line)


def _all_records(kinds: Mapping[str, str], columns: Columns, folder_labels: bool, per_line: bool) -> Iterator[Record]:
    folders = [source for source, kind in kinds.items() if kind == "images"]
    classes = classes_of(folders) if folder_labels else None
    for source, kind in kinds.items():
        if kind == "images":
            yield from image_records(source, classes)
        elif kind in ("text", "texts"):
            yield from text_records(source, per_line)
        else:
            for table in _tables(source):
                yield from table_records(table, columns)


def _tables(source: str) -> list[str]:
    if not os.path.isdir(source):
        return [source]
    if os.path.isfile(os.path.join(source, _STATE)):
        return _saved_dataset(source)
    return [os.path.join(here, name) for here, names in walk(source) for name in names if extension_of(name) in TABLES]


def _saved_dataset(folder: str) -> list[str]:
    """The files of a data set that ``datasets`` saved, without those it keeps beside for itself (cache-*.arrow)."""
    try:
        with open(os.path.join(folder, _STATE), encoding="utf-8") as file:
            state = json.load(file)
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source {folder}: its {_STATE} is not that of a saved data set ({error}); check it") from None
    if state.get("_indices_data_files"):
        raise ValueError(
            f"source {folder}: rows were chosen or shuffled, but its files hold all of them in the old order; save it "
            "again after dataset.flatten_indices()"
        )
    return [os.path.join(folder, name) for name in names]


def kind_of(source: str) -> str:
    """ "images", "texts", "tables" (a folder of them), "table" or "text".

    Raises:
        ValueError: for a source that is missing or of no known kind.
    """
    if "://" in source:
        raise ValueError(
            f"source {source}: URLs are not fetched; download first (img2dataset fetches images from a list of URLs)"
        )
    if not os.path.exists(source):
        raise ValueError(f"source {source}: not found (working folder {os.getcwd()}); check the path")
    if not os.path.isdir(source):
        extension = extension_of(source)
        if extension in TABLES:
            return "table"
        if extension == "txt":
            return "text"
        hint = "it is a shard already" if extension == "tar" else "its kind is unknown"
        raise ValueError(f"source {source}: {hint}; give folders, .txt, or tables ({', '.join(TABLES)})")
    if os.path.isfile(os.path.join(source, "dataset_dict.json")):
        parts = sorted(name for name in os.listdir(source) if os.path.isfile(os.path.join(source, name, _STATE)))
        raise ValueError(f"source {source}: holds several data sets ({', '.join(parts)}); name the folder of one")
    if os.path.isfile(os.path.join(source, _STATE)):
        return "tables"
    seen: set[str] = set()
    for _, files in walk(source):
        seen.update(map(extension_of, files))
        if seen.intersection(IMAGE_EXTENSIONS):
            return "images"
    if "txt" in seen:
        return "texts"
    if seen.intersection(TABLES):
        return "tables"
    raise ValueError(f"source {source}: holds no image, no .txt and no table; check the path")


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder below and the names of its files, sorted.  Names that begin with a dot are left out.

    Raises:
        ValueError: for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"source {error.filename}: {error.strerror}; check its permissions")

    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in seen:  # links that lead in a circle, or to the same folder again
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        yield here, sorted(name for name in files if not name.startswith("."))


def classes_of(folders: list[str]) -> dict[str, int]:
    """Names of the folders that hold images, numbered in order; see :func:`in_order`."""
    names = {
        class_of(here)
        for folder in folders
        for here, files in walk(folder)
        if any(extension_of(name) in IMAGE_EXTENSIONS for name in files)
    }
    return {name: number for number, name in enumerate(in_order(names))}


def in_order(names: Iterable[str]) -> list[str]:
    """Classes' names sorted (as torchvision's ImageFolder does), but as numbers where all are integers: 2 before 10."""
    found = sorted(names)
    return sorted(found, key=int) if all(map(_INTEGER.fullmatch, found)) else found


def class_of(folder: str) -> str:
    return os.path.basename(os.path.abspath(folder))


def image_records(source: str, classes: Mapping[str, int] | None) -> Iterator[Record]:
    """A folder of images: captions in .txt or .json lie beside them, classes in .cls or in the folders' names."""
    for here, files in walk(source):
        names = set(files)
        used = set()
        for name in files:
            if extension_of(name) not in IMAGE_EXTENSIONS:
                continue
            stem = os.path.splitext(name)[0]
            path = os.path.join(here, name)
            record = Record(path, key_of(os.path.join(here, stem), source), path)
            for extension, attribute in _BESIDE.items():
                if f"{stem}.{extension}" in names:
                    setattr(record, attribute, os.path.join(here, f"{stem}.{extension}"))
                    used.add(f"{stem}.{extension}")
            if classes is not None:
                label = class_of(here)
                record.label = str(classes[label])
                record.fields = {"label": label}
            yield record
        for name in files:
            if extension_of(name) not in IMAGE_EXTENSIONS and name not in used:
                reason = "no_image" if extension_of(name) in _BESIDE else "unknown_kind"
                yield Record(os.path.join(here, name), problem=(reason, "no image of this name lies beside it"))


def text_records(source: str, per_line: bool) -> Iterator[Record]:
    """A .txt file or a folder of them: one document each, or one a line."""
    if os.path.isdir(source):
        paths = [os.path.join(here, name) for here, files in walk(source) for name in files]
    else:
        paths = [source]
    for path in paths:
        if extension_of(path) != "txt":
            yield Record(path, problem=("unknown_kind", "not a .txt"))
        elif per_line:
            yield from _lines(path)
        else:
            root = source if os.path.isdir(source) else os.path.dirname(source)
            yield Record(path, key_of(os.path.splitext(path)[0], root), text_path=path)


def _lines(path: str) -> Iterator[Record]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():  # blank lines hold nothing that could be lost
                    where = f"{path}: line {number}"
                    try:
                        yield Record(where, text=line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    except UnicodeDecodeError as error:
                        yield Record(where, problem=("not_utf8", str(error)))
    except OSError as error:
        yield Record(path, problem=("cannot_be_read", error.strerror or str(error)))


def key_of(path: str, root: str) -> str:
    return safe_key(os.path.relpath(path, root or "."))
