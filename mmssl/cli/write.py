"""``mmssl shards write``."""

import os
import shlex
import sys
from typing import Literal

from mmssl.cli.keys import UsageError
from mmssl.cli.progress import Progress, number, printable, size
from mmssl.curation.parallel import check_jobs
from mmssl.curation.records import Preparation
from mmssl.curation.sources import records_of
from mmssl.curation.tables import Columns
from mmssl.curation.writer import Written, write_shards
from mmssl.data.members import IMAGE_EXTENSIONS

_NOTES = {
    "made_smaller": "images were made smaller",
    "without_text": "images have no text",
    "cut": "documents were cut into pieces",
}


_MOST = 0.01  # of the records may be skipped without an exit code


def write(
    sources: list[str],
    out: str,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
    key: str | None = None,
    labels: Literal["folder"] | None = None,
    per_line: bool = False,
    max_words: int | None = None,
    short_side: int | None = None,
    quality: int = 92,
    samples_per_shard: int = 10_000,
    shard_mb: float | None = None,
    val_part: float = 0.0,
    shuffle: int | None = None,
    jobs: int | None = None,
) -> None:
    """Make shards from folders of images or texts and from CSV, TSV, JSONL or Parquet tables.

    Captions of a folder's images lie beside them in .txt or .json, classes in .cls.  Of a table, columns that are not
    named go to the sample's .json.  Links are followed, wherever they lead.  The
    exit code is 1 if more than 1 % had to be skipped.  The same input gives the same bytes, whatever --jobs.

    Args:
        sources: Folders, tables, .txt files.
        out: The folder to write to, without shards yet.
        image: The column with the picture: a path (relative to the table), bytes or base64.
        text: The column with the text.
        label: The column with the class; it goes to .cls as it stands.
        key: The column with the sample's name; by default samples of tables are numbered.
        labels: "folder": the name of the folder that an image lies in is its class; .cls gets its number.
        per_line: Every line of a .txt is a document of its own.
        max_words: Cut texts without an image into pieces of at most so many words, at the ends of sentences.
        short_side: Make images with a longer short side that small, in pixels, as JPEG; all others stay untouched.
        quality: JPEG quality of the images that are made smaller, 1 to 95.
        samples_per_shard: The most samples in a shard.
        shard_mb: The most megabytes in a shard.
        val_part: The part of the samples that goes to validation shards, by the hash of the key; such as 0.01.
        shuffle: Shuffle the samples with this seed (keeps tables in memory).
        jobs: Number of processes; by default one for every core.
    """
    preparation = Preparation(short_side, quality, max_words)
    records = records_of(sources, Columns(image, text, label, key), labels == "folder", per_line)
    announced: dict[str, int] = {}  # by part, how many of its shards
    with Progress(None, "writing", "records") as progress:

        def tell(written: Written, records: int) -> None:
            paths = [path for part, shards in written.shards.items() for path in shards[announced.get(part, 0) :]]
            if paths:
                announced.update({part: len(shards) for part, shards in written.shards.items()})
            progress.step("\n".join(f"{path}: {size(os.path.getsize(path))}" for path in paths), records)

        written = write_shards(
            records,
            out,
            preparation,
            samples_per_shard=samples_per_shard,
            shard_bytes=None if shard_mb is None else int(shard_mb * 1e6),
            val_part=val_part,
            shuffle=shuffle,
            jobs=check_jobs(jobs),
            progress=tell,
        )
    for part, paths in written.shards.items():
        print(
            f"{part}: {number(written.samples[part])} samples in {number(len(paths))} shards, "
            f"{size(written.bytes[part])}"
        )
    for note, count in written.notes.items():
        print(f"{number(count)} {_NOTES[note]}")
    if written.skipped:
        reasons = ", ".join(f"{number(n)} x {reason}" for reason, n in written.skipped.most_common())
        hint = "; URLs are not fetched: use img2dataset" if written.skipped["url"] else ""
        total = number(sum(written.skipped.values()))
        if written.skipped["duplicate_key"]:
            hint += "; --key must name a column with another value in every row"
        print(f"skipped {total}: {reasons} (named in {os.path.join(out, 'skipped.jsonl')}{hint})", file=sys.stderr)
    if not written.shards:
        raise UsageError(
            "nothing was written: there is no sample that can be used"
            + (f"; {os.path.join(out, 'skipped.jsonl')} says why" if written.skipped else "")
        )
    print("\n" + printable(_next(out, written)))
    skipped, used = written.skipped.total(), sum(written.samples.values())
    if skipped > _MOST * (skipped + used):
        print(f"mmssl: warning: {number(skipped)} of {number(skipped + used)} were skipped, see above", file=sys.stderr)
        sys.exit(1)


def _next(out: str, written: Written) -> str:
    """The commands that train on what was written."""
    extensions = set(written.extensions)
    images, texts = bool(extensions.intersection(IMAGE_EXTENSIONS)), "txt" in extensions
    config = "mmm" if images and texts else "mae" if images else "mlm"
    train = shlex.quote(os.path.join(out, "train-*.tar"))
    val = shlex.quote(os.path.join(out, "val-*.tar")) if "val" in written.shards else "null"
    tokenizer = shlex.quote(os.path.join(out, "tokenizer.json"))
    lines = ["to train on them (more options: docs, configs/):"]
    if texts:
        lines.append(f"  mmssl tokenizer train {train} --out {tokenizer}")
    lines.append(
        f"  mmssl fit --config configs/{config}.yaml --run runs/{config} --data.train {train} --data.val {val}"
        + (f" --model.init_args.tokenizer {tokenizer}" if texts else "")
    )
    return "\n".join(lines)
