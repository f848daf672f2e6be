"""Packing plain files with labels into shards: what :class:`mmssl.FilesData` does once."""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmssl.curation.parallel import check_jobs
from mmssl.curation.records import Preparation, Record, extension_of
from mmssl.curation.sources import class_of, image_records, kind_of, records_of, walk
from mmssl.curation.tables import Columns
from mmssl.curation.writer import Written, write_shards
from mmssl.data.shards import ShardSet
from mmssl.finetune.numbering import Numbering, span, words_of
from mmssl.finetune.targets import Kind

CLASSES = "classes.json"
RANGE = "range.json"  # the smallest and the largest label, where labels are whole numbers
_MOST_SKIPPED = 0.01


@dataclass(frozen=True)
class Files:
    """The plain files of one part, and where in them the labels are; see :class:`mmssl.FilesData`."""

    sources: list[str]
    columns: Columns
    folder_labels: bool

    def __str__(self) -> str:
        return ", ".join(self.sources)

    def stats(self) -> Iterator[tuple[str, int, int]]:
        """(path, size, time in ns) of all that decides what is packed."""
        for path in (path for source in self.sources for path in self._paths(source)):
            try:
                found = os.stat(path)
            except OSError:  # a link to nowhere, say: counted with what cannot be used
                yield os.path.abspath(path), -1, -1
            else:
                yield os.path.abspath(path), found.st_size, found.st_mtime_ns

    def labels(self, kind: Kind | None) -> Counter[str]:
        """How often every word stands in a label."""
        return Counter(word for _, words in self.records(kind) for word in words or [])

    def records(self, kind: Kind | None) -> Iterator[tuple[Record, list[str] | None]]:
        """The records with the words of their labels; None where no folder or column is to have any."""
        for source in self.sources:
            if self.folder_labels and kind_of(source) == "images":
                for record in image_records(source, None):
                    name = class_of(os.path.dirname(record.where))
                    record.fields = {"label": name}
                    yield record, None if record.problem else [name]
                continue
            column = self.columns.label is not None and _is_table(source)
            for record in self._plain(source):
                yield record, words_of(record.label or "", kind) if column and not record.problem else None

    def check_labels(self) -> None:
        """Raises ValueError where nothing says what the labels are."""
        for source in self.sources:
            if kind_of(source) in ("text", "texts"):
                raise ValueError(f"{source}: texts in .txt files have no labels; give a table with a column of them")
            if _is_table(source) and self.columns.label is None:
                raise ValueError(f"{source}: data.label is not given; name the column that holds the labels")
            if kind_of(source) == "images" and not self.folder_labels and not _has_labels(source):
                raise ValueError(
                    f"{source}: no picture has a .cls beside it; set data.folder_labels to true if the folders' names "
                    "are the labels"
                )

    def _paths(self, source: str) -> list[str]:
        if not os.path.isdir(source):
            kind_of(source)  # refuses what is missing
            paths = [source]
        else:
            paths = [os.path.join(here, name) for here, names in walk(source) for name in names]
        if _is_table(source) and self.columns.image is not None:  # the pictures that the rows name
            rows = self._plain(source)
            paths += [row.image for row in rows if isinstance(row.image, str) and os.path.exists(row.image)]
        return paths

    def _plain(self, source: str) -> Iterator[Record]:
        return records_of([source], self.columns if _is_table(source) else Columns(), False, False)


def pack(
    files: Files, folder: Path, preparation: Preparation, said: Counter[str], numbering: Numbering, val_part: float
) -> None:
    """Pack into ``folder``, which is whole or absent: shards, and the classes' names or the labels' range.

    Args:
        said: the words of all labels.
        val_part: the part of the samples that is held out, in shards of their own.

    Raises:
        ValueError: if there is no place, and for samples that cannot be used or parted.
    """
    home = folder.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".packing-", dir=home))
    except OSError as error:
        raise ValueError(f"packed_dir {home} cannot be written ({error.strerror}); give another") from None
    try:
        left_out = _write_shards(files, temporary, preparation, numbering, val_part)
        if numbering.names is not None:
            write(temporary / CLASSES, numbering.names)
        elif (found := span(said)) is not None:
            write(temporary / RANGE, found)
        with contextlib.suppress(OSError):  # another process packed the same, and was quicker
            temporary.rename(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} cannot be made; give another packed_dir")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"mmssl: packed {left_out}{numbering.note(said)}", flush=True)


def read(path: Path) -> Any:
    """What a JSON file holds; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shards(files: Files, out: Path, preparation: Preparation, numbering: Numbering, val_part: float) -> str:
    """Returns what was packed and left out, for a person."""
    counts: Counter[str] = Counter()
    try:
        records = _numbered(files, numbering, counts)
        written = write_shards(records, str(out), preparation, val_part=val_part, jobs=check_jobs(None))
    except OSError as error:
        raise ValueError(
            f"cannot pack into {out.parent} ({error.strerror or error}); give another packed_dir"
        ) from None
    samples, skipped = sum(written.samples.values()), written.skipped.total()
    if not samples or skipped > _MOST_SKIPPED * (samples + skipped):
        raise ValueError(f"{files}: {skipped} of {samples + skipped} samples cannot be used ({_example(out, written)})")
    if val_part and "val" not in written.shards:
        raise ValueError(f"{files}: val_part {val_part} of {samples} samples holds none out; give a larger part")
    # Numbers may be no classes, so only names are looked at.
    if val_part and (lost := _held_out(written.shards["val"], counts, numbering.names or [])):
        name, count = lost
        raise ValueError(
            f"{files}: of class {name!r} there {'is' if count == 1 else 'are'} {count} sample{'s'[: count > 1]}, "
            f"and val_part {val_part} holds out all of it; add samples, leave the class out, or give val"
        )
    note = f"; {skipped} left out ({_example(out, written)})" if skipped else ""
    return f"{samples} samples of {files} into {out.parent}{note}"


def _numbered(files: Files, numbering: Numbering, counts: Counter[str]) -> Iterator[Record]:
    """The records with their labels as they are packed, while these are counted."""
    for record, words in files.records(numbering.kind):
        label = record.label if words is None else numbering.text(words)
        counts.update((label or "").split())
        yield replace(record, label=label)


def _held_out(shards: list[str], counts: Counter[str], names: list[str]) -> tuple[str, int] | None:
    """(name, samples) of a class of which all is in ``shards``; None without one."""
    if not names:
        return None
    samples = ShardSet(shards)
    labels = (samples.read(i).members.get("cls", b"").decode() for i in range(len(samples)))
    found = Counter(number for label in labels for number in label.split())
    lost = (n for n in range(len(names)) if 0 < counts[str(n)] <= found[str(n)])
    return next(((names[n], counts[str(n)]) for n in lost), None)


def _example(out: Path, written: Written) -> str:
    """The reasons, and the first of what was left out."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in written.skipped.most_common())
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open(out / "skipped.jsonl", encoding="utf-8", errors="surrogateescape") as file:
            first = json.loads(next(file))
        return f"{reasons}; the first: {json.dumps(first, ensure_ascii=False)}"
    return reasons or "there is none"


def _is_table(source: str) -> bool:
    return kind_of(source) in ("table", "tables")


def _has_labels(folder: str) -> bool:
    return any(extension_of(name) == "cls" for _, names in walk(folder) for name in names)
