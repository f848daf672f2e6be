"""Is mmssl installed here with all it needs?  Exit code 0 if so, else 1; `make` asks before it calls pip.

    python tools/installed.py [EXTRA]

Every requirement of mmssl[EXTRA], followed down, must be there, in the version of constraints.txt.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def main(extra: str = "") -> int:
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:  # it comes with mmssl's dependencies
        return 1
    root = Path(__file__).resolve().parent.parent
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    todo, seen = [Requirement(f"mmssl[{extra}]" if extra else "mmssl")], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            print(f"{name} is not installed")
            return 1
        version = found.version.split("+")[0]
        if not requirement.specifier.contains(version, prereleases=True) or pins.get(name, version) != version:
            print(f"{name} is {version}, needed is {pins.get(name, requirement.specifier)}")
            return 1
        for text in found.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(needed)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
