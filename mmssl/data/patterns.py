"""Naming shards: paths and URLs from braces, globs and folders."""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product

from mmssl.data.remote import find, has_magic, is_remote, shown


def expand(patterns: str | Sequence[str], exact: bool = False) -> list[str]:
    """Paths and URLs of shards from paths, URLs, braces, globs and folders, in order.

    ``{000..127}`` counts (leading zeros are kept), ``{a,b}`` lists, ``* ? [ ]`` match files in sorted order, and a
    folder (of a remote store: a URL that ends in "/") stands for its ``*.tar``.  A missing file is not noticed here,
    an empty match is.  With ``exact`` every pattern is one path or URL, whatever signs it holds.

    Raises:
        ValueError: for a pattern that matches nothing, a shard named twice, a scheme that is not allowed (see
            :mod:`mmssl.data.remote`), or a glob of HTTP URLs, whose servers cannot list files.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        remote = is_remote(pattern)
        if exact:
            paths.append(pattern)
            continue
        for part in _expand_braces(pattern if remote else _local(pattern)):
            if remote and (part.endswith("/") or has_magic(part)):
                found = [
                    url for url in find(part + "*.tar" if part.endswith("/") else part) if not url.endswith(".idx")
                ]
            elif remote:
                found = [part]
            elif os.path.isdir(part):
                found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
            elif glob.has_magic(part):
                found = sorted(path for path in glob.glob(part) if not path.endswith(".idx"))
            else:
                found = [part]
            if not found and not remote and os.path.isdir(part):
                raise ValueError(
                    f"folder {part!r} holds no .tar; name a folder of shards (mmssl shards write makes them from "
                    "images, texts and tables)"
                )
            if not found:
                where = "" if remote else f" (working folder {os.getcwd()})"
                raise ValueError(f"no shard matches {shown(part)!r}{where}; check the path")
            paths += found
    if not paths:
        raise ValueError("no shards are named; give a path, a brace pattern, a glob or a list of them")
    folders: dict[str, str] = {}
    counts = Counter(path if is_remote(path) else _real(path, folders) for path in paths)
    twice = [path for path, times in counts.items() if times > 1]
    if twice:
        raise ValueError(f"shard {shown(twice[0])} is named twice ({len(twice)} such shards); name every shard once")
    return paths


def _real(path: str, folders: dict[str, str]) -> str:
    """As os.path.realpath, but quick for very many files of few folders."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def _local(pattern: str) -> str:
    return os.path.expanduser(re.sub("^file:(//)?", "", pattern, flags=re.IGNORECASE))


def _expand_braces(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise ValueError(f"shards {shown(pattern)!r}: braces do not match or are nested; list the patterns instead")
    choices = [[part] if i % 2 == 0 else _choices(part, pattern) for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if counted is None:
        return inside.split(",")
    first, last = int(counted[1]), int(counted[2])
    if not 0 <= last - first < 10_000_000:
        raise ValueError(f"shards {shown(pattern)!r}: {{{inside}}} does not count upwards; write {{first..last}}")
    return [str(n).zfill(len(counted[1])) for n in range(first, last + 1)]
