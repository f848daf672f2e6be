"""Fine-tuning on plain files: image folders, tables, saved Hugging Face data sets.

They are packed into shards once, on every node, and streamed from there like all data: exact resume, workers, bad
samples and their budget are the same.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from mmssl.curation.parallel import check_jobs
from mmssl.curation.records import Preparation, Record
from mmssl.curation.sources import classes_of, image_records, kind_of, records_of, walk
from mmssl.curation.tables import Columns
from mmssl.curation.writer import Written, write_shards
from mmssl.data.datamodule import DataModule
from mmssl.data.shards import ShardSet

_FORMAT = 1  # raised when the same files would be packed otherwise
_MOST_SKIPPED = 0.01
_CLASSES = "classes.json"
_RANGE = "range.json"  # the smallest and the largest label, where labels are whole numbers


class FilesData(DataModule):
    """Pictures, texts or pairs with labels from plain files; used like :class:`mmssl.DataModule`.

    Labels that are words are numbered in sorted order, or in that of ``classes``; the run's folder then holds
    ``classes.json``, the names by number.

    Args:
        train: a folder of images (captions beside them in .txt, labels in .cls or the folders' names), a CSV, TSV,
            JSONL or Parquet table, a folder of a data set that Hugging Face's ``datasets`` saved; or several of these.
        val: the same for validation, test and predictions.
        val_part: without ``val``, the part of ``train`` that is held out, by the hash of the sample's key.
        image, text, label, key: names of a table's columns.  A picture is a path (relative to the table) or its bytes.
        folder_labels: the name of the folder that an image lies in is its class.
        classes: the classes' names in order; None for the sorted names of ``train``.
        short_side: pictures with a longer short side are packed that small, in pixels.
        packed_dir: where the shards go; None means ``~/.cache/mmssl/packed``.  A node's own disk is best.
        kwargs: see :class:`mmssl.DataModule`.

    Raises:
        ValueError: in the constructor, for options that make no sense; later, for files that cannot be used, labels
            that ``classes`` does not name, and if more than 1 % of the samples would have to be left out.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        val_part: float = 0.0,
        image: str | None = None,
        text: str | None = None,
        label: str | None = None,
        key: str | None = None,
        folder_labels: bool = False,
        classes: list[str] | None = None,
        short_side: int | None = None,
        packed_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train="", val=None, **kwargs)
        if val is not None and val_part:
            raise ValueError(f"val and val_part {val_part} are both given; choose one")
        if not 0 <= val_part < 1:
            raise ValueError(f"val_part is {val_part}; give a part of the samples from 0 to below 1, such as 0.1")
        if classes is not None and len(set(classes)) < len(classes):
            raise ValueError("classes names a class twice")
        self.sources = {"train": _listed(train), "val": _listed(val)}
        self.columns = Columns(image, text, label, key)
        self.folder_labels, self.classes, self.val_part = folder_labels, classes, val_part
        self.preparation = Preparation(short_side)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.packed_dir = Path(packed_dir or os.path.join(cache, "mmssl", "packed")).expanduser()
        self._folder_packed: Path | None = None  # by this process

    def prepare_data(self) -> None:
        """Pack, once per node; what is packed already is found again by the files' names, sizes and times."""
        self._folder_packed = folder = self._folder_of_shards()
        if not folder.is_dir():
            self._pack(folder)
        self._use(folder)
        super().prepare_data()

    def setup(self, stage: str) -> None:
        folder = self._folder_packed or self._folder_of_shards()  # the files are looked at once, not twice
        if not folder.is_dir():
            raise ValueError(f"{folder} is gone, or the files changed while the run began; start again")
        self._use(folder)
        if stage != "predict":
            self._check_count(folder)
        super().setup(stage)
        if stage == "fit":
            self._tell_classes(folder)

    def _check_count(self, folder: Path) -> None:
        """Raises ValueError if the files have other classes than the model."""
        module = self.trainer and self.trainer.lightning_module
        count, target = getattr(module, "num_classes", None), getattr(module, "target", None)
        if count is None or target is None or target.kind == "regression":
            return
        what = ", ".join(self.sources["train"])
        if (folder / _CLASSES).exists():
            names = json.loads((folder / _CLASSES).read_text())
            shown = ", ".join([*map(repr, names[:5]), *["..."][: len(names) > 5]])
            if len(names) != count:
                more = f", or name all {count} in data.classes" if len(names) < count else ""
                raise ValueError(
                    f"{what}: has {len(names)} classes ({shown}), but num_classes is {count}; "
                    f"set model.num_classes to {len(names)}{more}"
                )
        if (folder / _RANGE).exists():
            least, most = json.loads((folder / _RANGE).read_text())
            if least < 0 or most >= count:
                remedy = "classes begin at 0" if least < 0 else f"set model.num_classes to {most + 1}"
                raise ValueError(
                    f"{what}: labels go from {least} to {most}, but num_classes is {count}; {remedy}, or correct them"
                )

    def _use(self, folder: Path) -> None:
        self.train = {"train": {"shards": str(folder / "train" / "train-*.tar")}}
        held_out = folder / "train" / "val-000000.tar"
        if self.sources["val"]:
            self.val = str(folder / "val" / "train-*.tar")
        elif held_out.exists():
            self.val = str(folder / "train" / "val-*.tar")

    @rank_zero_only
    def _tell_classes(self, folder: Path) -> None:
        if (folder / _CLASSES).exists():
            with contextlib.suppress(OSError):  # a copy for a person
                shutil.copyfile(folder / _CLASSES, Path(self._folder()) / _CLASSES)

    # ---- packing

    def _folder_of_shards(self) -> Path:
        """Named by all that decides what is packed."""
        digest = hashlib.blake2b(digest_size=12)
        options = [_FORMAT, vars(self.columns), self.folder_labels, self.classes, self.val_part, vars(self.preparation)]
        digest.update(json.dumps([options, self.sources], sort_keys=True).encode())
        for source in [*self.sources["train"], *self.sources["val"]]:
            for path, stat in self._files(source):
                digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return self.packed_dir / digest.hexdigest()

    def _files(self, source: str) -> Iterator[tuple[str, os.stat_result]]:
        kind = kind_of(source)
        paths = [source] if not os.path.isdir(source) else []
        if os.path.isdir(source):
            paths = [os.path.join(here, name) for here, names in walk(source) for name in names]
        if kind in ("table", "tables") and self.columns.image is not None:  # the pictures that the rows name
            paths += [r.image for r in self._records([source]) if isinstance(r.image, str) and os.path.exists(r.image)]
        for path in paths:
            yield os.path.abspath(path), os.stat(path)

    def _records(self, sources: Sequence[str]) -> Iterator[Record]:
        columns = self.columns if any(kind_of(source) in ("table", "tables") for source in sources) else Columns()
        return records_of(sources, columns, False, False)

    def _labelled(self, part: str, names: dict[str, int] | None) -> Iterator[Record]:
        """The records of a part, with their labels as numbers."""
        for source in self.sources[part]:
            if self.folder_labels and kind_of(source) == "images":
                yield from image_records(source, names)
                continue
            for record in self._records([source]):
                known = names is not None and record.label is not None
                yield replace(record, label=str(names[record.label])) if known else record  # type: ignore[index]

    def _said(self, part: str) -> set[str]:
        """The labels of a part as they stand: the folders' names, or a column's."""
        found: set[str] = set()
        for source in self.sources[part]:
            if self.folder_labels and kind_of(source) == "images":
                found |= set(classes_of([source]))
            elif self.columns.label is not None:
                found |= {record.label for record in self._records([source]) if record.label}
        return found

    def _numbered(self, train: set[str], val: set[str]) -> dict[str, int] | None:
        """The number of every class by its name; None where labels are numbers, or none are known."""
        if self.classes is None and (not train or (not self.folder_labels and all(map(_is_number, train)))):
            self._refuse("val", {label for label in val if train and not _is_number(label)}, "the numbers of train")
            return None
        names = self.classes if self.classes is not None else sorted(train)
        known = "classes" if self.classes is not None else "the training data"
        for part, said in (("train", train), ("val", val)):
            self._refuse(
                part, said - set(names), f"the {len(names)} of {known} ({', '.join(map(repr, names[:5]))}, ...)"
            )
        return {name: number for number, name in enumerate(names)}

    def _refuse(self, part: str, unknown: set[str], known: str) -> None:
        if unknown:
            shown = ", ".join(map(repr, sorted(unknown)[:5]))
            raise ValueError(f"{', '.join(self.sources[part])}: the labels {shown} are not among {known}; correct them")

    def _pack(self, folder: Path) -> None:
        train, val = self._said("train"), self._said("val")
        names = self._numbered(train, val)
        try:
            self.packed_dir.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".packing-", dir=self.packed_dir))
        except OSError as error:
            raise ValueError(
                f"packed_dir {self.packed_dir} cannot be written ({error.strerror}); give another"
            ) from None
        try:
            for part in ("train", "val"):
                if self.sources[part]:
                    self._write(part, temporary / part, names)
            if names is not None:
                (temporary / _CLASSES).write_text(json.dumps(list(names), indent=1, ensure_ascii=False) + "\n")
            elif numbers := _integers(train | val):
                (temporary / _RANGE).write_text(json.dumps([min(numbers), max(numbers)]) + "\n")
            with contextlib.suppress(OSError):  # another process packed the same, and was quicker
                temporary.rename(folder)
            if not folder.is_dir():
                raise ValueError(f"{folder} cannot be made; give another packed_dir")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, part: str, out: Path, names: dict[str, int] | None) -> None:
        share = self.val_part if part == "train" else 0.0
        counts: Counter[str] = Counter()
        records = _counted(self._labelled(part, names), counts)
        try:
            written = write_shards(records, str(out), self.preparation, val_part=share, jobs=check_jobs(None))
        except OSError as error:
            raise ValueError(
                f"cannot pack into {out.parent} ({error.strerror or error}); give another packed_dir"
            ) from None
        what = ", ".join(self.sources[part])
        samples, skipped = sum(written.samples.values()), written.skipped.total()
        if not samples or skipped > _MOST_SKIPPED * (samples + skipped):
            raise ValueError(
                f"{what}: {skipped} of {samples + skipped} samples cannot be used ({_example(out, written)})"
            )
        if share and "val" not in written.shards:
            raise ValueError(f"{what}: val_part {share} of {samples} samples holds none out; give a larger part")
        if share:
            self._check_split(written.shards["val"], counts, names)
        note = f"; {skipped} left out ({_example(out, written)})" if skipped else ""
        print(f"mmssl: packed {samples} samples of {what} into {self.packed_dir}{note}", flush=True)

    def _check_split(self, held_out: list[str], counts: Counter[str], names: dict[str, int] | None) -> None:
        """Raises ValueError if all samples of a class are held out, so that none is trained on."""
        if names is None:  # numbers may be no classes
            return
        shards = ShardSet(held_out)
        found = Counter(shards.read(i).members.get("cls", b"").decode() for i in range(len(shards)))
        for name, number in names.items():
            count = counts[str(number)]
            if count and found[str(number)] >= count:
                raise ValueError(
                    f"{', '.join(self.sources['train'])}: of class {name!r} there {'is' if count == 1 else 'are'} "
                    f"{count} sample{'s'[: count > 1]}, and val_part {self.val_part} holds out all of it; add samples, "
                    "leave the class out, or give val"
                )


def _counted(records: Iterator[Record], counts: Counter[str]) -> Iterator[Record]:
    """The records, while their labels are counted."""
    for record in records:
        if record.label is not None:
            counts[record.label] += 1
        yield record


def _example(out: Path, written: Written) -> str:
    """The reasons, and the first of what was left out."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in written.skipped.most_common())
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open(out / "skipped.jsonl", encoding="utf-8", errors="surrogateescape") as file:
            first = json.loads(next(file))
        return f"{reasons}; the first: {json.dumps(first, ensure_ascii=False)}"
    return reasons or "there is none"


def _listed(sources: str | list[str] | None) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources or [])


def _integers(labels: set[str]) -> set[int]:
    """The numbers in all labels, or none if one of them is not whole."""
    parts = {part for label in labels for part in label.replace(",", " ").split()}
    return {int(part) for part in parts} if all(re.fullmatch(r"[+-]?[0-9]{1,18}", part) for part in parts) else set()


def _is_number(label: str) -> bool:
    try:
        return all(float(part) is not None for part in label.replace(",", " ").split())
    except ValueError:
        return False
