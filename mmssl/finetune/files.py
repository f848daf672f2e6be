"""Fine-tuning on plain files: image folders, tables, saved Hugging Face data sets.

They are packed into shards once, on every node, and streamed from there like all data: exact resume, workers, bad
samples and their budget are the same.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from mmssl.curation.records import Preparation
from mmssl.curation.tables import Columns
from mmssl.data.datamodule import DataModule
from mmssl.data.loader import Loader
from mmssl.finetune.numbering import Numbering, named
from mmssl.finetune.packing import CLASSES, RANGE, Files, pack, read, write
from mmssl.finetune.targets import Kind

_FORMAT = 3  # raised when the same files would be packed otherwise
_EVALUATES = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)


class FilesData(DataModule):
    """Pictures, texts or pairs with labels from plain files; used like :class:`mmssl.DataModule`.

    Labels that are words are numbered in sorted order (integers by size), or in that of ``classes``; the run's folder
    then holds ``classes.json``, the names by number, which decides for test, predictions and a resumed run.

    Args:
        train: a folder of images (captions beside them in .txt, labels in .cls or the folders' names), a CSV, TSV,
            JSONL or Parquet table, a folder of a data set that Hugging Face's ``datasets`` saved; or several of these.
        val: the same for validation, test and predictions.  Predictions need no labels; neither they nor a test look
            at ``train``'s files any more, if the run's folder has ``classes.json``.
        val_part: without ``val``, the part of ``train`` that is held out, by the hash of the sample's key.
        image, text, label, key: names of a table's columns.  A picture is a path (relative to the table) or its bytes.
        folder_labels: the name of the folder that an image lies in is its class.
        classes: the classes' names in order; None for the sorted names of ``train``.
        short_side: pictures with a longer short side are packed that small, in pixels.
        packed_dir: where the shards go; None means ``~/.cache/mmssl/packed``.  A node's own disk is best.
        kwargs: see :class:`mmssl.DataModule`.

    Raises:
        ValueError: in the constructor, for options that make no sense; later, for files that cannot be used, labels
            that have no number, and if more than 1 % of the samples would have to be left out.
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
        columns = Columns(image, text, label, key)
        self.files = {
            part: Files([given] if isinstance(given, str) else list(given or []), columns, folder_labels)
            for part, given in {"train": train, "val": val}.items()
        }
        self.classes, self.val_part = classes, val_part
        self.preparation = Preparation(short_side)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.packed_dir = Path(packed_dir or os.path.join(cache, "mmssl", "packed")).expanduser()
        self._found = False  # the shards, by this process
        self._names: list[str] | None = None  # of the classes
        self._whose = ""  # names these are
        self._ranges: dict[str, tuple[int, int]] = {}  # source: smallest and largest label, where they are numbers

    def prepare_data(self) -> None:
        """Pack, once per node; what is packed already is found again by the files' names, sizes and times."""
        self._find(may_pack=True)
        self._found = True
        super().prepare_data()

    def setup(self, stage: str) -> None:
        if not self._found:  # the files are looked at once by every process, not twice
            self._find(may_pack=False)
        if stage != "predict":
            self._check_count()
        super().setup(stage)

    def train_dataloader(self) -> Loader:
        loader = super().train_dataloader()
        self._tell_classes()  # now, since all that could refuse the run or its checkpoint has passed
        return loader

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as saved.  Raises ValueError, too, if the files have other classes than the run."""
        if self._train is not None and (names := self._names_of_the_run()) is not None and names != self._names:
            new = [name for name in self._names or [] if name not in names]
            shown = f"has the labels {', '.join(map(repr, new[:5]))}" if new else "has other classes"
            raise ValueError(
                f"{self.files['train']}: {shown}, but this run was trained with the {len(names)} of "
                f"{self._run_classes()}; restore the files as they were, or start a new run"
            )
        super().load_state_dict(state_dict)

    @property
    def _kind(self) -> Kind | None:
        """What the module takes labels for; None if it takes none."""
        module = self.trainer and self.trainer.lightning_module
        return cast(Kind | None, getattr(getattr(module, "target", None), "kind", None))

    @property
    def _needs_labels(self) -> bool:
        """Whether the module takes the labels that are packed, rather than fields of the .json."""
        module = self.trainer and self.trainer.lightning_module
        return self._kind is not None and getattr(module, "label_key", None) is None

    def _find(self, may_pack: bool) -> None:
        """Find the shards of both parts, or pack them.

        Test and predictions of ``val`` do without ``train`` where the run has named its classes, or ``train`` is gone;
        predictions need no labels.
        """
        doing = self.trainer.state.fn if self.trainer else None
        evaluates, predicts = doing in _EVALUATES, doing == TrainerFn.PREDICTING
        val = self.files["val"].sources
        if val and self.val_part and not evaluates:
            raise ValueError(f"val and val_part {self.val_part} are both given; choose one")
        if self.classes is not None and self._kind == "regression":
            raise ValueError("data.classes names classes, but target is regression; leave them out")
        self._ranges = {}
        self._names = self._names_of_the_run() if evaluates else None
        self._whose = str(self._run_classes()) if self._names else "classes" if self.classes else "the training data"
        if not val or not evaluates or (self._names is None and all(map(os.path.exists, self.files["train"].sources))):
            folder = self._packed("train", may_pack)
            self._names = read(folder / CLASSES)
            self.train = {"train": {"shards": str(folder / "train-*.tar")}}
            if (folder / "val-000000.tar").exists():
                self.val = str(folder / "val-*.tar")
        if val:
            self._names = self._names or (None if self._kind == "regression" else self.classes)
            self.val = str(self._packed("val", may_pack, labelled=not predicts) / "train-*.tar")

    def _run_classes(self) -> Path:
        return Path(self._folder()) / CLASSES

    def _names_of_the_run(self) -> list[str] | None:
        """The classes by number, from what the training left; None if it left none."""
        names = None if self._kind == "regression" else read(self._run_classes())
        if names is None:
            return None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self._run_classes()} is no list of classes' names as mmssl writes it; move it away")
        if self.classes not in (None, names):
            raise ValueError(
                f"data.classes are other ones than those of {self._run_classes()}, which this run was trained with; "
                "leave them as they were"
            )
        return names

    def _check_count(self) -> None:
        """Raises ValueError if the files have other classes than the model."""
        module = self.trainer and self.trainer.lightning_module
        count = getattr(module, "num_classes", None)
        if count is None or self._kind in (None, "regression"):
            return
        if self._names is not None and len(self._names) != count:
            found = len(self._names)
            shown = ", ".join([*map(repr, self._names[:5]), *["..."][: found > 5]])
            more = f", or name all {count} in data.classes" if found < count else ""
            raise ValueError(
                f"{self.files['train']}: has {found} classes ({shown}), but num_classes is {count}; "
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
        with contextlib.suppress(OSError):
            if self._names is not None:
                write(self._run_classes(), self._names)
            elif self._kind not in (None, "regression"):  # an earlier run's would decide for this one's test
                self._run_classes().unlink(missing_ok=True)

    # ---- packing

    def _packed(self, part: str, may_pack: bool, labelled: bool = True) -> Path:
        """The folder of a part's shards, named by all that decides what is packed."""
        files = self.files[part]
        if labelled and self._needs_labels:
            files.check_labels()
        digest = hashlib.blake2b(digest_size=12)
        for path, size, time in files.stats():
            digest.update(f"{path}\0{size}\0{time}\n".encode("utf-8", "surrogateescape"))
        folder = self._named(digest.copy(), part, self.classes if part == "train" else self._names)
        if part == "train" and self._names is not None and read(folder / CLASSES) != self._names:
            folder = self._named(digest, part, self._names)  # today's files would be numbered otherwise
        if not labelled and not folder.is_dir():
            folder = folder.with_name(f"{folder.name}-unlabelled")
        if not folder.is_dir() and not may_pack:
            raise ValueError(f"{folder} is gone, or the files changed while the run began; start again")
        if not folder.is_dir():
            self._pack(part, folder, labelled)
        if (found := read(folder / RANGE)) is not None:
            self._ranges[str(files)] = found
        return folder

    def _named(self, digest: Any, part: str, names: list[str] | None) -> Path:
        files, share = self.files[part], self.val_part if part == "train" else 0.0
        said = [_FORMAT, vars(files.columns), files.folder_labels, vars(self.preparation), files.sources]
        digest.update(json.dumps([*said, names, share, self._kind], sort_keys=True).encode())
        return self.packed_dir / digest.hexdigest()

    def _pack(self, part: str, folder: Path, labelled: bool) -> None:
        """Number the labels, as ``train``'s say if not ``classes`` or the run, and pack."""
        files, kind, names = self.files[part], self._kind, self._names
        said = files.labels(kind)
        if part == "train":
            names = names or self.classes or named(str(files), said, kind, files.folder_labels)
        none_of_them = "[]" if kind == "multilabel" and labelled and (said or names) else None
        numbering = Numbering(kind, names, self._whose, none_of_them)
        if labelled and self._needs_labels and not said and not none_of_them and files.columns.label is not None:
            raise ValueError(
                f"{files}: no row has a label in the column {files.columns.label!r}; name another as data.label"
            )
        if labelled:
            numbering.check(str(files), said)
        pack(files, folder, self.preparation, said, numbering, self.val_part if part == "train" else 0.0)
