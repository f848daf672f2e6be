"""Checking many shards: each by itself, side by side, and then what only shows in all of them together.

Of every sample 17 bytes stay in memory (hash of its key, hash of its content, its kinds), and about 25 more while
duplicates are looked for, so 10^8 samples take 4.2 GB; keys are looked up again in the indexes where they must be
named.  Hashes have 8 bytes: one pair among 10^8 samples that only seems equal is to be expected in 3,700 runs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mmssl.curation.inspect import Depth, Finding, ShardReport, check_shard
from mmssl.curation.parallel import ordered_map
from mmssl.data.index import index_shard


def check_shards(
    paths: Sequence[str],
    depth: Depth,
    jobs: int,
    found: Callable[[Finding], None],
    progress: Callable[[ShardReport], None],
) -> list[ShardReport]:
    """Read every byte of every shard.

    Args:
        paths: of shards.
        depth: see there.
        jobs: processes.
        found: called with everything that is found, shard by shard; then with what only shows in all shards
            together (missing partners, duplicates).
        progress: called after every shard.
    """
    reports = []
    for report in ordered_map(check_shard, depth, paths, jobs):
        for finding in report.findings:
            found(finding)
        progress(report)
        report.findings = []  # written, and not kept
        reports.append(report)
    usable = [report for report in reports if report.usable]
    for finding in chain(
        _missing_partners(usable),
        _duplicates(usable, "keys", "duplicate_key"),
        _duplicates(usable, "contents", "duplicate_content") if depth.duplicates else (),
    ):
        found(finding)
    return reports


def _missing_partners(reports: list[ShardReport]) -> Iterator[Finding]:
    """Samples that lack what more than half of all samples have."""
    having: Counter[str] = Counter()
    for report in reports:
        for code, count in enumerate(np.bincount(report.kinds, minlength=len(report.patterns)).tolist()):
            having.update(dict.fromkeys(report.patterns[code], count))
    total = sum(report.samples for report in reports)
    usual = sorted(kind for kind, count in having.items() if total < 2 * count)
    for report in reports:
        for kind in usual:
            lacking = [code for code, has in enumerate(report.patterns) if kind not in has]
            for place, key in _named(report.path, np.flatnonzero(np.isin(report.kinds, lacking))):
                has = ", ".join(report.patterns[report.kinds[place]]) or "nothing that is read"
                share = f"{100 * having[kind] / total:.4g} % of all samples have {kind}"
                yield Finding(report.path, key, f"no_{kind}", f"has {has}; {share}")


def _duplicates(reports: list[ShardReport], name: str, problem: str) -> Iterator[Finding]:
    values = np.concatenate([getattr(report, name) for report in reports] or [np.empty(0, np.uint64)])
    order = np.argsort(values, kind="stable")  # stable: the first of equals is the earliest sample
    values = values[order]
    again = np.flatnonzero(values[1:] == values[:-1]) + 1
    if not len(again):
        return
    first = again.copy()
    for at in range(1, len(again)):  # runs of three and more go back to the same first
        if again[at] == again[at - 1] + 1:
            first[at] = first[at - 1]
    first = first - 1
    later, earlier = order[again], order[first]
    ends = np.cumsum([report.samples for report in reports])
    sequence = np.argsort(later)
    later, earlier = later[sequence], earlier[sequence]
    owners = np.searchsorted(ends, later, side="right")
    for here in np.split(np.arange(len(later)), np.flatnonzero(np.diff(owners)) + 1):  # shard by shard
        report, start = reports[owners[here[0]]], int(ends[owners[here[0]]]) - reports[owners[here[0]]].samples
        for (_, key), before in zip(_named(report.path, later[here] - start), earlier[here].tolist(), strict=True):
            owner = int(np.searchsorted(ends, before, side="right"))
            place = before - int(ends[owner]) + reports[owner].samples
            yield Finding(report.path, key, problem, f"as sample {place} of {reports[owner].path}")


def _named(path: str, places: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Samples' places in a shard with their keys, from its index."""
    if len(places):
        members = index_shard(path).members()
        for place in places.tolist():
            yield place, members.key(place)
