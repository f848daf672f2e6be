"""``mmssl shards index``, ``check`` and ``stats``; ``write`` is in write.py."""

import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from typing import IO, Any

from mmssl.cli.keys import UsageError
from mmssl.cli.progress import Progress, number, percent, printable, size, table
from mmssl.curation.parallel import check_jobs, ordered_map
from mmssl.data.cache import Cache
from mmssl.data.index import ShardIndex, index_shard, index_shards
from mmssl.data.patterns import expand
from mmssl.data.remote import shown
from mmssl.data.shards import ShardSet, fingerprint
from mmssl.data.tar import ShardError


def index(shards: list[str], jobs: int | None = None) -> None:
    """Write the index of every shard, so that training starts at once.  Shards whose index fits are left alone.

    Args:
        shards: Paths, globs or brace patterns of tar shards, or URLs.
        jobs: How many shards are worked on at once; by default one for every core.
    """
    paths = expand(shards)
    found: dict[str, ShardIndex] = {}
    new: set[str] = set()
    errors: list[str] = []
    with tempfile.NamedTemporaryFile() as clock, Progress(len(paths), "indexing", "shards") as progress:
        began = _tick(clock.name)  # of the file system's clock, to which indexes are compared

        def tell(shard: ShardIndex) -> None:
            if shard.path in found:
                return
            found[shard.path] = shard
            if _is_new(shard, began):
                new.add(shard.path)
            progress.step(f"{shown(shard.path)}: {number(shard.samples)} samples")

        try:
            index_shards(paths, jobs if jobs is None else check_jobs(jobs), tell)
        except ShardError:  # names one: go on with the others, to name all
            rest = [path for path in paths if path not in found]
            for shard in ordered_map(_try_index, None, rest, min(check_jobs(jobs), len(rest))):
                if isinstance(shard, str):
                    errors.append(shard)
                    progress.step()
                    progress.trouble(shard)
                else:
                    tell(shard)
    if found:
        beside = sum(shard.file == path + ".idx" for path, shard in found.items())
        nowhere = sum(shard.file is None for shard in found.values())
        print(
            f"{len(found)} indexes: {len(found) - len(new)} were up to date, {len(new)} made anew; "
            f"{beside} lie beside their shard, {len(found) - beside - nowhere} in the cache folder"
            + (f", {nowhere} could not be stored and will be made again at every start" if nowhere else "")
        )
    if errors:
        raise UsageError(f"{len(errors)} of {len(paths)} shards cannot be used; they are named above")
    samples = sum(shard.samples for shard in found.values())
    mark = fingerprint([found[path] for path in paths]).split()[0]
    print(f"{number(samples)} samples in {number(len(paths))} shards, fingerprint {mark}")


def _tick(path: str) -> int:
    """A time of change that no file has yet: that clock moves in steps of some milliseconds, so the next one."""
    first = os.stat(path).st_mtime_ns
    while (now := os.stat(path).st_mtime_ns) == first:
        time.sleep(0.001)
        os.utime(path)
    return now


def _is_new(shard: ShardIndex, began: int) -> bool:
    try:
        return shard.file is None or os.stat(shard.file).st_mtime_ns >= began
    except OSError:
        return False


def _try_index(_: None, path: str) -> ShardIndex | str:
    try:
        return index_shard(path)
    except (ShardError, OSError) as error:
        return str(error)


def check(
    shards: list[str], jobs: int | None = None, images: bool = True, duplicates: bool = False, out: str | None = None
) -> None:
    """Read everything and report damage, unreadable images and texts, duplicates, missing partners, odd sizes.

    The exit code is 0 if all is well, 1 if samples are bad, 2 if shards cannot be used at all.

    Args:
        shards: Paths, globs or brace patterns of tar shards, or URLs.
        jobs: Number of processes; by default one for every core.
        images: Decode every image; without, only texts and structure are checked.
        duplicates: Compare contents, too: images, or texts where there are no images, with the same bytes.
        out: A file for every finding as a JSON line.
    """
    from mmssl.curation.compare import check_shards
    from mmssl.curation.inspect import BAD, NOTES, Depth, Finding, ShardReport

    paths = expand(shards)
    counts: Counter[str] = Counter()
    examples: defaultdict[str, list[Finding]] = defaultdict(list)
    file = _open(out)

    def found(finding: Finding) -> None:
        counts[finding.problem] += 1
        if len(examples[finding.problem]) < 3:
            examples[finding.problem].append(finding)
        if finding.problem == "unusable_shard":
            progress.trouble(finding.detail)
        if file is not None:
            file.write(finding.line() + "\n")

    def tell(report: ShardReport) -> None:
        bad = Counter(finding.problem for finding in report.findings if finding.problem not in NOTES)
        state = ", ".join(f"{n} x {problem}" for problem, n in bad.most_common()) or "nothing bad"
        progress.step(f"{report.path}: {number(report.samples)} samples, {state}")

    try:
        with Progress(len(paths), "checking", "shards") as progress:
            reports = check_shards(
                paths, Depth(images, duplicates), min(check_jobs(jobs), len(paths)), found=found, progress=tell
            )
    finally:
        if file is not None:
            file.close()
    unusable = sum(not report.usable for report in reports)
    samples, members = sum(report.samples for report in reports), sum(report.members for report in reports)
    print(
        f"read {number(len(reports))} shards, {number(samples)} samples, {number(members)} members, "
        f"{size(sum(report.bytes for report in reports))}" + ("" if images else "; images were not decoded")
    )
    if whole := [report for report in reports if report.usable]:
        samples_of, bytes_of = sorted(report.samples for report in whole), sorted(report.bytes for report in whole)
        print(
            f"a shard has {number(samples_of[0])} to {number(samples_of[-1])} samples, "
            f"{size(bytes_of[0])} to {size(bytes_of[-1])}"
        )
    known = [*BAD, *NOTES]
    told_bad = sorted((problem for problem in counts if problem not in NOTES), key=[*known, *counts].index)
    for title, told in (("bad", told_bad), ("notes", [problem for problem in NOTES if counts[problem]])):
        if told:
            print(f"\n{title}")
            words = BAD | NOTES
            print(table([[f"  {number(counts[name])}", name, words.get(name, "")] for name in told], "r"))
            for problem in told:
                for finding in examples[problem]:
                    key = f" {finding.key}" if finding.key else ""
                    print(printable(f"    {problem}: {finding.shard}{key}: {finding.detail[:200]}"))
    bad_samples = sum(counts[problem] for problem in told_bad)
    if out is not None:
        print(f"\nall findings: {out}" if counts else f"\n{out} is empty: nothing was found")
    if unusable:
        raise UsageError(f"{unusable} of {len(paths)} shards cannot be used; they are named above")
    print("\n" + (f"{number(bad_samples)} findings are bad" if bad_samples else "all is well"))
    if bad_samples:
        sys.exit(1)


def _open(out: str | None) -> IO[str] | None:
    try:
        return None if out is None else open(out, "w", encoding="ascii")  # check() closes it
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); give another --out") from error


def stats(
    shards: list[str], tokenizer: str | None = None, samples: int = 10_000, jobs: int | None = None, json: bool = False
) -> None:
    """Count and measure: members, sizes of images, lengths of texts, tokens.

    Args:
        shards: Paths, globs or brace patterns of tar shards, or URLs.
        tokenizer: A tokenizer.json, to count tokens with.
        samples: How many samples are looked at, spread evenly over the shards; 0 means all.
        jobs: Number of processes; by default one for every core.
        json: Print JSON in place of tables.
    """
    from mmssl.curation.statistics import statistics
    from mmssl.data.tokenizer import TextTokenizer

    if samples < 0:
        raise UsageError(f"samples is {samples}; give how many to look at, or 0 for all")
    loaded = None if tokenizer is None else TextTokenizer(tokenizer)
    with tempfile.TemporaryDirectory(prefix="mmssl-stats-") as folder:  # what training has cached stays where it is
        data = ShardSet(shards, cache=Cache(folder, limit_gb=1))
        wanted = min(samples or len(data), len(data))
        # Starting processes takes longer than reading a few thousand samples.
        processes = check_jobs(jobs) if jobs is not None or wanted > 20_000 else 1
        with Progress(wanted, "reading", "samples") as progress:
            figures = statistics(data, loaded, samples, processes, lambda n: progress.step(by=n))
    print(_as_json(figures) if json else printable(_as_text(figures)))


def _as_json(figures: dict[str, Any]) -> str:
    return json.dumps(figures, indent=2)


def _as_text(figures: dict[str, Any]) -> str:
    total = figures["samples"]
    lines = [
        f"{number(figures['shards'])} shards, {number(total)} samples, {size(figures['bytes'])}, "
        f"{size(figures['bytes_per_sample'])} a sample; fingerprint {figures['fingerprint'].split()[0]}",
        "",
        table(
            [
                ["member", "count", "bytes", "mean size", "samples"],
                *(
                    [
                        f".{extension}",
                        number(found["count"]),
                        size(found["bytes"]),
                        size(found["bytes"] / found["count"]),
                        percent(found["count"] / total),
                    ]
                    for extension, found in figures["members"].items()
                ),
            ],
            "lrrrr",
        ),
        *(f"in no sample: {number(n)} x {kind}" for kind, n in figures["members_in_no_sample"].items()),
        "",
        f"from {number(figures['samples_read'])} samples"
        + (", all there are" if figures["samples_read"] == total else ", spread evenly (--samples 0 reads all)"),
    ]
    rows = [["samples of a shard", figures["samples_per_shard"]]]
    notes = []
    if (images := figures.get("images")) is not None:
        rows += [[f"image {name.replace('_', ' ')}, px", images[name]] for name in ("width", "height", "short_side")]
        small = next(value for name, value in images.items() if name.startswith("share_below"))
        formats = ", ".join(f"{name} {percent(n / images['count'])}" for name, n in images["formats"].items())
        notes += [f"images: {formats}; {percent(small)} have a short side below 224 px"]
    if (texts := figures.get("texts")) is not None:
        rows += [["characters of a text", texts["characters"]], ["words of a text", texts["words"]]]
        notes += [f"texts: {percent(texts['share_duplicated'])} repeat another one of them"]
    if (tokens := figures.get("tokens")) is not None:
        rows += [["tokens of a text", tokens["per_text"]]]
        long = next(value for name, value in tokens.items() if name.startswith("share_of_texts_above"))
        notes += [
            f"tokens: {number(tokens['count'])} with a vocabulary of {number(tokens['vocabulary'])}; "
            f"{percent(long)} of texts have more than 512, {percent(tokens['share_unknown'])} of tokens are unknown"
        ]
    notes += [f"bad: {number(n)} x {reason}" for reason, n in figures["bad"].items()]
    names = list(rows[0][1])
    shown = [["", *names], *([title, *map(number, values.values())] for title, values in rows)]
    return "\n".join([*lines, table(shown, "l" + "r" * len(names)), *notes])
