"""The text: English prose out of Python's documentation and the docstrings of installed packages.

Sources are read with ``ast``; nothing is imported or run.
"""

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mmssl.draws import mix

#: What mmssl itself depends on, and of torch what holds much prose.
PACKAGES = (
    *("numpy", "matplotlib", "lightning", "PIL", "torchvision", "torchmetrics", "networkx", "fsspec", "sympy"),
    *("torch/nn", "torch/optim", "torch/utils", "torch/distributed", "torch/distributions", "torch/autograd"),
    *("torch/fx", "torch/ao", "torch/export", "torch/cuda"),
)
_ALSO = ("torch/_torch_docs.py", "torch/_tensor_docs.py")  # docstrings handed over as strings
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "testing", "_vendor", "idlelib"}

MAX_WORDS = 200
_MIN_WORDS = 25  # of a piece
_MIN_PARAGRAPH = 8

_ROLE = re.compile(r":[a-zA-Z:]+:`~?\.?([^`<]*?)(?:\s*<[^`>]*>)?`")
_MARKUP = re.compile(r"``|`_?_?|\*\*?(?=\w)|(?<=[\w.,])\*\*?")
# Lines of code, markup, tables, lists and parameters ("size (int): ...", "Args:").
_CODE = re.compile(
    r"^\s*(>>>|\.\.\. |\.\. |:\w|@|[-=~^+|#*]{3,}|\||\+-|[-*] |\d+[.)] |[\w*.]+(?: \([^)\n]*\))? ?: |[\w ]{1,24}:$)",
    re.MULTILINE,
)
_ODD = re.compile(r"[_{}<>=\\|\[\]$@^~/]|\w\(|\w\.\w|::|--")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*[.,;:!?)\"]*$|^\(?[A-Za-z]+")


def source_files() -> list[tuple[str, str]]:
    """(document name, path) of every source file, in a fixed order; packages that are not installed are left out."""
    roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
    for package in (*PACKAGES, *_ALSO):
        top, _, rest = package.partition("/")
        spec = importlib.util.find_spec(top)  # finds, does not import
        for folder in list((spec.submodule_search_locations if spec else None) or [])[:1]:
            roots.append((package, Path(folder, rest)))
    found: dict[str, str] = {}
    for name, root in roots:
        for path in [root] if root.suffix == ".py" else _python_files(root):
            found.setdefault(f"{name}/{path.relative_to(root)}" if path != root else name, str(path))
    return sorted(found.items())


def pieces_of(path: str) -> list[str]:
    """The prose of one source file, in pieces of at most about MAX_WORDS words cut between paragraphs."""
    source = Path(path).read_bytes()
    if b'"""' not in source and b"'''" not in source and not path.endswith("topics.py"):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # files that hold templates or another version's syntax
        return []
    texts = _all_strings(tree) if path.endswith(("_docs.py", "topics.py")) else _docstrings(tree)
    return [piece for text in texts for piece in cut(text)]


def cut(text: str) -> Iterator[str]:
    """Pieces of one text: its paragraphs of prose, joined up to MAX_WORDS; too short ones are dropped."""
    piece: list[str] = []
    length = 0
    for paragraph in map(_prose, re.split(r"\n\s*\n", text)):
        words = len(paragraph.split())
        if words == 0:
            continue
        if length + words > MAX_WORDS and piece:
            if length >= _MIN_WORDS:
                yield "\n\n".join(piece)
            piece, length = [], 0
        if words <= MAX_WORDS:
            piece.append(paragraph)
            length += words
    if length >= _MIN_WORDS:
        yield "\n\n".join(piece)


def fingerprint(piece: str) -> bytes:
    """Equal for pieces that differ in case and spacing only."""
    return hashlib.blake2b(" ".join(piece.lower().split()).encode(), digest_size=12).digest()


def is_validation(document: str, seed: int, part: float) -> bool:
    """The split is by document, so that no validation piece has neighbours in training."""
    return mix(seed, int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")) < part * 2.0**64


def _python_files(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in _SKIPPED)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(module: ast.Module) -> Iterator[str]:
    blocks: list[ast.AST] = [module]
    for node in blocks:  # statements only: walking the expressions too takes four times as long
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        for branch in ("body", "orelse", "handlers", "finalbody"):
            blocks += [inner for inner in getattr(node, branch, []) if hasattr(inner, "body")]


def _all_strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
            yield node.value


def _prose(paragraph: str) -> str:
    """The paragraph as plain words in one line, or "" if it is no English prose (code, tables, lists, parameters)."""
    if _CODE.search(paragraph) or "\t" in paragraph:
        return ""
    text = " ".join(_MARKUP.sub("", _ROLE.sub(r"\1", paragraph)).split())
    words = text.split()
    if len(words) < _MIN_PARAGRAPH or not text[0].isupper() or text[-1] not in ".!?:" or not text.isascii():
        return ""
    odd = sum(1 for word in words if _ODD.search(word))
    plain = sum(1 for word in words if _WORD.match(word))
    if odd > 0.08 * len(words) or plain < 0.85 * len(words):
        return ""
    return text if text[-1] != ":" else ""
