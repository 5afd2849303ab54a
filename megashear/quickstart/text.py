"""Domains of real text that every Python installation with torch has."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

logger = logging.getLogger(__name__)

NUM_DOMAINS = 4
"""Domains that the quickstart wants."""
MOST_BYTES = 4_000_000
"""Most bytes of one domain: about 1.5 M tokens, more than the quickstart reads of any domain."""
LEAST_BYTES = 300_000
"""Least bytes of one domain: held-out losses of less text would be noise, so a spare source
replaces it."""
_LARGEST_DOCUMENT = 48_000
"""Most bytes of a document: a longer text, usually generated code or a table, could be half of a
held-out set."""
_CHUNK_LINES = 120
"""Lines of a document from a source that is one long text."""


def write_domains(directory: Path) -> dict[str, int]:
    """Write one jsonl file per domain, with a document per line.

    A source that this installation lacks is replaced by a spare one, with a note in the log.

    Args:
        directory: directory to make, for ``<domain>.jsonl``.

    Returns:
        Bytes of text by domain.

    Raises:
        ValueError: fewer than `NUM_DOMAINS` sources have text here.
    """
    directory.mkdir(parents=True)
    written: dict[str, int] = {}
    for name, documents in SOURCES.items():
        if len(written) == NUM_DOMAINS:
            break
        chosen = list(_up_to(documents(), MOST_BYTES))
        size = sum(len(text.encode()) for text in chosen)
        if size < LEAST_BYTES:
            logger.warning(
                "this installation has %d bytes of %s text, wanted %d; taking another source",
                size,
                name,
                LEAST_BYTES,
            )
            continue
        lines = [json.dumps({"text": text}) + "\n" for text in chosen]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        written[name] = size
    if len(written) < NUM_DOMAINS:
        raise ValueError(
            f"this Python installation carries text for {', '.join(written) or 'no domain'} only; "
            f"give your own with --data DIR, a jsonl file per domain"
        )
    return written


def python_code() -> Iterator[str]:
    """Yield the code of the standard library without docstrings, a document per file."""
    for path in _files(Path(sysconfig.get_path("stdlib")), "*.py"):
        if (parsed := _parse(path)) is not None:
            yield _without_docstrings(*parsed)


def prose() -> Iterator[str]:
    """Yield English about software: topics of the manual, docstrings of the standard library."""
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data import topics

        yield from topics.topics.values()
    for path in _files(Path(sysconfig.get_path("stdlib")), "*.py"):
        if (parsed := _parse(path)) is not None and (text := _docstrings(parsed[1])):
            yield text


def c_headers() -> Iterator[str]:
    """Yield C and C++ headers of torch, then of Python, a document per file."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        include = Path(spec.origin).parent / "include"
        for part in ("c10", "ATen/core", "ATen/native", "torch/csrc/api"):
            yield from _texts(include / part, "*.h")
    yield from _texts(Path(sysconfig.get_path("include")), "*.h")


def unicode_tables() -> Iterator[str]:
    """Yield the Unicode character database as lines of code point, category and name."""

    def lines() -> Iterator[str]:
        for point in range(sys.maxunicode + 1):
            if name := unicodedata.name(chr(point), ""):
                # 97,680 names only count up, from which a model learns nothing
                if "IDEOGRAPH-" in name or name.startswith("HANGUL SYLLABLE"):
                    continue
                yield f"{point:04X};{unicodedata.category(chr(point))};{name}"

    yield from _chunks(lines())


def package_code() -> Iterator[str]:
    """Yield code of installed packages, a document per file: a spare source."""
    yield from _texts(Path(sysconfig.get_path("purelib")), "*.py")


def package_descriptions() -> Iterator[str]:
    """Yield metadata and licences of installed packages: a spare source."""
    for pattern in ("METADATA", "LICENSE*", "*.rst", "*.md"):
        yield from _texts(Path(sysconfig.get_path("purelib")), pattern)


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "python": python_code,
    "prose": prose,
    "c": c_headers,
    "unicode": unicode_tables,
    "packages": package_code,
    "metadata": package_descriptions,
}
"""Sources by domain, in the order in which they are used; the last two are spares."""


def _up_to(documents: Iterator[str], most_bytes: int) -> Iterator[str]:
    taken = 0
    for text in documents:
        size = len(text.encode())
        if not text.strip() or size > _LARGEST_DOCUMENT:
            continue
        taken += size
        if taken > most_bytes:
            return
        yield text


def _files(root: Path, pattern: str) -> list[Path]:
    """Return files below ``root``, without tests and packages, in an order that mixes folders."""
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    found = [
        path
        for path in sorted(root.rglob(pattern))
        if path.is_file() and not skipped & set(path.relative_to(root).parts)
    ]
    # sorted by length of name first, so that a limit of bytes takes files of all folders
    return sorted(found, key=lambda path: (len(path.name), path.name, str(path)))


def _texts(root: Path, pattern: str) -> Iterator[str]:
    for path in _files(root, pattern) if root.is_dir() else []:
        if (text := _read(path)) is not None:
            yield text


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None  # the file has another encoding or may not be read


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    text = _read(path)
    try:
        return None if text is None else (text, ast.parse(text))
    except SyntaxError:
        return None


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Expr]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first


def _without_docstrings(text: str, tree: ast.Module) -> str:
    gone: set[int] = set()
    for node in _docstring_nodes(tree):
        gone.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = text.splitlines(keepends=True)
    return "".join(line for number, line in enumerate(lines, start=1) if number not in gone)


def _docstrings(tree: ast.Module) -> str:
    found = [
        text
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if (text := ast.get_docstring(node))
    ]
    return "\n\n".join(found)


def _chunks(lines: Iterator[str]) -> Iterator[str]:
    while chunk := list(islice(lines, _CHUNK_LINES)):
        yield "\n".join(chunk) + "\n"
