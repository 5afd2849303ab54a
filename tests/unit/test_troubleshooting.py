"""Every message that docs/troubleshooting.md quotes is one that the code can say."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
FIXED = 12
"""Letters that a quotation must fix, at least, to be of one message and not of any."""


def quotations(text: str) -> list[str]:
    """What entries begin with, in backticks, on one line."""
    found = re.findall(r"^- `([^`]+)`", text, flags=re.MULTILINE)
    return [" ".join(quoted.split()) for quoted in found]


@functools.cache
def messages() -> tuple[str, ...]:
    """Texts of the sources; a NUL stands for what a message fills in."""
    found: list[str] = []
    for path in (ROOT / "megashear").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value
                        if isinstance(part, ast.Constant) and isinstance(part.value, str)
                        else "\0"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\d]*[sdgf]", "\0", node.value).replace("%%", "%"))
    return tuple(found)


def is_said(quoted: str) -> bool:
    """Whether a message has the quoted words in their order, with something else where `...` is."""
    pattern = re.compile(r"[^\0]*\0.*?".join(map(re.escape, quoted.split("..."))), re.DOTALL)
    return any(pattern.search(message) for message in messages())


QUOTED = quotations(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_exists(quoted: str) -> None:
    assert len(re.sub(r"\W|\.\.\.", "", quoted)) >= FIXED or quoted in SHORT
    assert is_said(quoted)


SHORT = {"... ...; wanted ...", "...: ... is ...; wanted ...", "skipping ...: ..."}
"""Messages that fix less; there are such."""


def test_entries_are_found() -> None:
    assert len(QUOTED) > 50
    assert len(set(QUOTED)) == len(QUOTED)


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert is_said("world size ... is not a multiple of")
    assert not is_said("world size ... is no multiple of")
    assert not is_said("is not a multiple of ... world size")
    assert not is_said("world ... size")  # nothing is filled in there
