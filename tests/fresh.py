"""Environments that hold a few named packages and what these require, made in a second and without a network.

A real virtual environment, without pip, into which the installed distributions are linked.
"""

import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(roots: Iterable[str]) -> dict[str, Distribution]:
    """The named distributions and all that they require here, without extras but for those that are asked for."""
    found: dict[str, Distribution] = {}
    todo, seen = [Requirement(root) for root in roots], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        found[name] = distribution(name)
        for needed in map(Requirement, found[name].requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(needed)
    return found


class Environment:
    """A virtual environment in ``folder`` of the ``roots`` and their closure; ``source`` folders are linked beside."""

    def __init__(self, folder: Path, roots: Iterable[str], source: Iterable[Path] = ()) -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / "bin" / "python"
        site = next(folder.glob("lib/python*/site-packages"))
        assert not list(site.iterdir())
        for dist in closure(roots).values():
            for path in dist.files or []:
                if ".." not in path.parts and path.suffix != ".pth":
                    _link(Path(str(dist.locate_file(""))), site, path.parts)
        for path in source:
            (site / path.name).symlink_to(path)

    def run(self, code: str, folder: Path, forbidden: Iterable[str]) -> str:
        """What ``code`` prints, run in ``folder``; first it is made sure that ``forbidden`` cannot be imported."""
        head = (
            "import importlib.util, sys\n"
            f"there = [name for name in {sorted(forbidden)!r} if importlib.util.find_spec(name) is not None]\n"
            "assert not there, f'these should not be here: {there}'\n"
        )
        keep = {"PATH", "HOME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH"}
        done = subprocess.run(
            [self.python, "-I", "-c", head + code],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name in keep},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def _link(origin: Path, site: Path, parts: tuple[str, ...]) -> None:
    """Link a file, or the package around it; a folder without __init__.py may be of several distributions."""
    for depth in range(1, len(parts) + 1):
        here, there = origin.joinpath(*parts[:depth]), site.joinpath(*parts[:depth])
        if there.is_symlink():
            return
        if depth == len(parts) or (here / "__init__.py").is_file():
            if here.exists():
                there.symlink_to(here)
            return
        there.mkdir(exist_ok=True)


if __name__ == "__main__":  # to look at one: python tests/fresh.py FOLDER NAME [NAME ...]
    print(Environment(Path(sys.argv[1]), sys.argv[2:]).python)
