"""The quickstart's text: real domains, replaced where an installation lacks them."""

from __future__ import annotations

import ast
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from megashear.quickstart import text


def documents(word: str, count: int) -> Iterator[str]:
    return (f"{word} {number} " * 100 for number in range(count))


def sources(**counts: int) -> dict:
    return {
        name: (lambda name=name, count=count: documents(name, count))
        for name, count in counts.items()
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LEAST_BYTES", 1000)


@pytest.mark.usefixtures("small")
def test_a_missing_source_is_replaced_by_a_spare_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text, "SOURCES", sources(a=9, b=0, c=9, d=9, spare=9, unused=9))
    with caplog.at_level(logging.WARNING, "megashear"):
        written = text.write_domains(tmp_path / "text")
    assert list(written) == ["a", "c", "d", "spare"]
    assert sorted(path.stem for path in (tmp_path / "text").iterdir()) == sorted(written)
    assert "0 bytes of b text, wanted 1000; taking another source" in caplog.text
    lines = (tmp_path / "text" / "spare.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == list(documents("spare", 9))


@pytest.mark.usefixtures("small")
def test_too_few_sources_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SOURCES", sources(a=9, b=0, c=9))
    with pytest.raises(ValueError, match=r"text for a, c only; give your own with --data DIR"):
        text.write_domains(tmp_path / "text")


def test_a_domain_takes_so_much_and_no_giants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_LARGEST_DOCUMENT", 10)
    found = list(text._up_to(iter(["abcd", " ", "x" * 11, "efgh", "ijkl", "mnop"]), 12))
    assert found == ["abcd", "efgh", "ijkl"]


def test_code_loses_its_docstrings_and_nothing_else() -> None:
    source = (
        '"""Module."""\nimport os\n\n\ndef f():\n    """Says\n    what."""\n    return "kept"\n'
        '\n\nclass C:\n    """Class."""\n\n    x = """kept too"""\n'
    )
    rest = text._without_docstrings(source, ast.parse(source))
    assert rest == (
        'import os\n\n\ndef f():\n    return "kept"\n\n\nclass C:\n\n    x = """kept too"""\n'
    )
    assert text._docstrings(ast.parse(source)) == "Module.\n\nSays\nwhat.\n\nClass."


@pytest.mark.parametrize("name", ["python", "prose", "c", "unicode", "packages", "metadata"])
def test_every_source_has_real_text_here(name: str) -> None:
    first = list(itertools.islice(text.SOURCES[name](), 3))
    assert len(first) == 3
    assert all(document.strip() for document in first)
