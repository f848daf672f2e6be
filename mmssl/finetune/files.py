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

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from mmssl.curation.parallel import check_jobs
from mmssl.curation.records import Preparation, Record
from mmssl.curation.sources import classes_of, image_records, kind_of, records_of, walk
from mmssl.curation.tables import Columns
from mmssl.curation.writer import Written, write_shards
from mmssl.data.datamodule import DataModule
from mmssl.data.shards import ShardSet

_FORMAT = 2  # raised when the same files would be packed otherwise
_MOST_SKIPPED = 0.01
_CLASSES = "classes.json"
_EVALUATES = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)
_RANGE = "range.json"  # the smallest and the largest label, where labels are whole numbers


class FilesData(DataModule):
    """Pictures, texts or pairs with labels from plain files; used like :class:`mmssl.DataModule`.

    Labels that are words are numbered in sorted order, or in that of ``classes``; the run's folder then holds
    ``classes.json``, the names by number.

    Args:
        train: a folder of images (captions beside them in .txt, labels in .cls or the folders' names), a CSV, TSV,
            JSONL or Parquet table, a folder of a data set that Hugging Face's ``datasets`` saved; or several of these.
        val: the same for validation, test and predictions.  Predictions need no labels; neither they nor a test need
            ``train``'s files any more, if the run's folder has ``classes.json``.
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
        self._found = False  # the shards, by this process
        self._names: list[str] | None = None  # of the classes
        self._ranges: dict[str, tuple[int, int]] = {}  # source: smallest and largest label, where they are numbers

    def prepare_data(self) -> None:
        """Pack, once per node; what is packed already is found again by the files' names, sizes and times."""
        self._find(pack=True)
        self._found = True
        super().prepare_data()

    def setup(self, stage: str) -> None:
        if not self._found:  # the files are looked at once by every process, not twice
            self._find(pack=False)
        if stage != "predict":
            self._check_count()
        super().setup(stage)
        if stage == "fit":
            self._tell_classes()

    def _find(self, pack: bool) -> None:
        """Find the shards of both parts, or pack them.

        Test and predictions of ``val`` do without ``train`` where that is gone; predictions need no labels.
        """
        doing = self.trainer.state.fn if self.trainer else None
        evaluates = doing in _EVALUATES
        val = self.sources["val"]
        if val and self.val_part and not evaluates:
            raise ValueError(f"val and val_part {self.val_part} are both given; choose one")
        self._ranges = {}
        if val and evaluates and not all(map(os.path.exists, self.sources["train"])):
            self._names = self._names_of_the_run()
        else:
            folder = self._packed("train", [self.classes, self.val_part], pack)
            self._names = _read(folder / _CLASSES)
            self.train = {"train": {"shards": str(folder / "train-*.tar")}}
            if (folder / "val-000000.tar").exists():
                self.val = str(folder / "val-*.tar")
        if val:
            folder = self._packed("val", [self._names], pack, labelled=doing != TrainerFn.PREDICTING)
            self.val = str(folder / "train-*.tar")

    def _names_of_the_run(self) -> list[str] | None:
        """The classes by number, from the options or from what the training left; None where neither has them."""
        return self.classes or _read(Path(self._folder()) / _CLASSES)

    def _check_count(self) -> None:
        """Raises ValueError if the files have other classes than the model."""
        module = self.trainer and self.trainer.lightning_module
        count, target = getattr(module, "num_classes", None), getattr(module, "target", None)
        if count is None or target is None or target.kind == "regression":
            return
        if self._names is not None and len(self._names) != count:
            found = len(self._names)
            shown = ", ".join([*map(repr, self._names[:5]), *["..."][: found > 5]])
            more = f", or name all {count} in data.classes" if found < count else ""
            raise ValueError(
                f"{', '.join(self.sources['train'])}: has {found} classes ({shown}), but num_classes is {count}; "
                f"set model.num_classes to {found}{more}"
            )
        for what, (least, most) in self._ranges.items():
            if least < 0 or most >= count:
                remedy = "classes begin at 0" if least < 0 else f"set model.num_classes to {most + 1}"
                raise ValueError(
                    f"{what}: labels go from {least} to {most}, but num_classes is {count}; {remedy}, or correct them"
                )

    @rank_zero_only
    def _tell_classes(self) -> None:
        if self._names is not None:
            with contextlib.suppress(OSError):
                _write(Path(self._folder()) / _CLASSES, self._names)

    # ---- packing

    def _packed(self, part: str, options: list[Any], pack: bool, labelled: bool = True) -> Path:
        """The folder of a part's shards, named by all that decides what is packed."""
        digest = hashlib.blake2b(digest_size=12)
        said = [_FORMAT, vars(self.columns), self.folder_labels, vars(self.preparation), self.sources[part], options]
        digest.update(json.dumps(said, sort_keys=True).encode())
        for source in self.sources[part]:
            for path, stat in self._files(source):
                digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        folder = self.packed_dir / digest.hexdigest()
        if not labelled and not folder.is_dir():
            folder = folder.with_name(f"{folder.name}-unlabelled")
        if not folder.is_dir() and not pack:
            raise ValueError(f"{folder} is gone, or the files changed while the run began; start again")
        if not folder.is_dir():
            self._pack(part, folder, labelled)
        if (found := _read(folder / _RANGE)) is not None:
            self._ranges[", ".join(self.sources[part])] = found
        return folder

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
        """The records of a part, with their labels as numbers; of a label that has none, without."""
        for source in self.sources[part]:
            if self.folder_labels and kind_of(source) == "images":
                known = names if names is not None and names.keys() >= classes_of([source]).keys() else None
                yield from image_records(source, known)
                continue
            for record in self._records([source]):
                if names is not None and record.label is not None:
                    number = names.get(record.label)
                    record = replace(record, label=None if number is None else str(number))
                yield record

    def _said(self, part: str) -> set[str]:
        """The labels of a part as they stand: the folders' names, or a column's."""
        found: set[str] = set()
        for source in self.sources[part]:
            if self.folder_labels and kind_of(source) == "images":
                found |= set(classes_of([source]))
            elif self.columns.label is not None:
                found |= {record.label for record in self._records([source]) if record.label}
        return found

    def _numbered(self, train: set[str]) -> dict[str, int] | None:
        """The number of every class by its name; None where labels are numbers, or none are known."""
        if self.classes is None and (not train or (not self.folder_labels and all(map(_is_number, train)))):
            return None
        return {name: number for number, name in enumerate(self.classes or sorted(train))}

    def _refuse_unknown(self, part: str, said: set[str], names: dict[str, int] | None) -> None:
        """Raises ValueError for labels that have no number."""
        if names is None:
            unknown, known = {label for label in said if not _is_number(label)}, "the numbers of train"
        else:
            whose = "classes" if self.classes is not None else "the training data"
            shown = ", ".join(map(repr, [*names][:5]))
            unknown, known = said - names.keys(), f"the {len(names)} of {whose} ({shown}, ...)"
        if unknown:
            shown = ", ".join(map(repr, sorted(unknown)[:5]))
            raise ValueError(f"{', '.join(self.sources[part])}: the labels {shown} are not among {known}; correct them")

    def _pack(self, part: str, folder: Path, labelled: bool) -> None:
        said = self._said(part)
        names = self._numbered(said) if part == "train" else _numbers_of(self._names)
        if labelled:
            self._refuse_unknown(part, said, names)
        try:
            self.packed_dir.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".packing-", dir=self.packed_dir))
        except OSError as error:
            raise ValueError(
                f"packed_dir {self.packed_dir} cannot be written ({error.strerror}); give another"
            ) from None
        try:
            self._write(part, temporary, names)
            if names is not None:
                _write(temporary / _CLASSES, list(names))
            elif numbers := _integers(said):
                _write(temporary / _RANGE, [min(numbers), max(numbers)])
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


def _numbers_of(names: list[str] | None) -> dict[str, int] | None:
    return None if names is None else {name: number for number, name in enumerate(names)}


def _read(path: Path) -> Any:
    """What a JSON file holds; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
