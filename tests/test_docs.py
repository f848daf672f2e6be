"""The pages name tests, files and commands: those must be there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert {name for name in named if f"def {name}(" not in TESTS} == set()
    paths = set(re.findall(r"`((?:tests|tools|configs|docs|mmssl)/[\w/.-]*)`", text))
    paths |= set(re.findall(r"(?:python|--config) ((?:tools|configs)/[\w/.-]+)", text))
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")}
    assert {link for link in links if link and not (page.parent / link).exists()} == set()
