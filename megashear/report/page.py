"""Render the report: one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megashear import __version__
from megashear.checkpoint.text_sample import TextSample
from megashear.monitor.drawing import as_svg, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# With autoescape, only what templates and `as_svg` wrote is HTML; every other text is escaped.
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """A figure of a page."""

    name: str
    """Unique on the page; also the name of its file."""
    figure: Figure
    caption: str
    """One sentence that says what the figure shows."""

    def svg(self) -> Markup:
        """Return the figure as an element of a page."""
        return Markup(as_svg(self.figure, self.name, self.caption))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under a heading."""

    name: str
    """Where links lead to."""
    title: str
    parts: Sequence[Markup | PageFigure]
    level: int = 2


def heading(words: str) -> Markup:
    """Return a heading inside a section."""
    return _part("heading", words)


def paragraph(words: str, *, kind: str = "") -> Markup:
    """Return a paragraph of plain words."""
    return _part("paragraph", words, kind)


def state(name: str, words: str) -> Markup:
    """Return the state of a run as a badge, and words after it."""
    return _part("state", name, words)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Markup:
    """Return a table of plain values.

    Args:
        head: names of the columns.
        rows: rows as long as the head.
        left: how many columns, from the first, are words; the others are numbers.
    """
    return _part("table", head, rows, left)


def cards(values: Sequence[tuple[str, str, str]]) -> Markup:
    """Return large numbers on cards, each with its name before it and a note after it."""
    return _part("cards", values)


def bars(rows: Sequence[tuple[str, int, int]]) -> Markup:
    """Return a table that shows the kept share of each extent as a bar.

    Args:
        rows: name, before, after.
    """
    return _part("bars", rows)


def folded(summary: str, body: Markup) -> Markup:
    """Return HTML that a reader unfolds."""
    return _part("folded", summary, body)


def preformatted(words: str) -> Markup:
    """Return text with its spaces and line ends."""
    return _part("preformatted", words)


def samples(texts: Sequence[TextSample]) -> Markup:
    """Return texts with what a model made of their beginnings."""
    return _part("samples", texts)


def definitions(words: Mapping[str, str]) -> Markup:
    """Return words and their meanings."""
    return _part("definitions", words)


def page(title: str, lead: Sequence[Markup], sections: Sequence[Section], *, now: float) -> str:
    """Return a whole page.

    Args:
        title: title of the page.
        lead: HTML between the title and the first section.
        sections: sections in order; those of level 2 are linked above.
        now: when the page is made, seconds since 1970.
    """
    return _TEMPLATES.get_template("page.html").render(
        title=title, lead=lead, sections=sections, version=__version__, made=moment(now)
    )


def save_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write every figure of a page as a PNG and return the paths of the files."""
    written = []
    for section in sections:
        for part in section.parts:
            if isinstance(part, PageFigure):
                written.append(folder / f"{part.name}.png")
                save(part.figure, written[-1])
    return written


def moment(time: float) -> str:
    """Return a time as a person writes it, in UTC."""
    return datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def large(number: float) -> str:
    """Return a count in three digits: 6.74 B, 3.44 M, 950."""
    number = float(f"{number:.3g}")  # first, or 999,999 would be 1000 k
    for scale, sign in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= scale:
            shown = number / scale
            return f"{shown:.{2 - int(math.log10(abs(shown)))}f}{sign}"
    return f"{number:.0f}"


def _part(macro: str, *values: object) -> Markup:
    return Markup(getattr(_TEMPLATES.get_template("parts.html").module, macro)(*values))
