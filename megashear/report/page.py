"""The report: one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megashear import __version__
from megashear.monitor.drawing import as_svg, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """A figure of a page."""

    name: str
    """Unique on the page; also the name of its file."""
    figure: Figure
    caption: str
    """One sentence that says what one sees."""

    def html(self) -> str:
        """The figure with its sentence."""
        svg = as_svg(self.figure, self.name, self.caption)
        return (
            f'<figure id="{text(self.name)}"><div class="scroll"><div class="drawing">{svg}</div>'
            f"</div><figcaption>{text(self.caption)}</figcaption></figure>"
        )


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under a heading."""

    name: str
    """Where links lead to."""
    title: str
    parts: Sequence[str | PageFigure]
    """HTML, or figures."""
    level: int = 2

    def html(self) -> str:
        """The section."""
        body = "\n".join(
            part.html() if isinstance(part, PageFigure) else part for part in self.parts
        )
        heading = f"<h{self.level}>{text(self.title)}</h{self.level}>"
        return f'<section id="{text(self.name)}">{heading}\n{body}\n</section>'


def text(value: object) -> str:
    """A value as text that a page may hold, whatever is in it."""
    return html.escape(str(value))


def paragraph(words: str, *, kind: str = "") -> str:
    """A paragraph of plain words."""
    return f"<p{_class(kind)}>{text(words)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """A table of plain values.

    Args:
        head: names of the columns.
        rows: as long as the head.
        left: how many columns, from the first, are words; the others are numbers.
    """

    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{_class('' if n < left else 'number')}>{text(value)}</{tag}>"
            for n, value in enumerate(values)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def cards(values: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers: what it is, the number, what is to be said of it."""
    return (
        '<dl class="cards">'
        + "".join(
            f'<div><dt>{text(name)}</dt><dd><span class="value">{text(value)}</span>'
            f'<span class="note">{text(note)}</span></dd></div>'
            for name, value, note in values
        )
        + "</dl>"
    )


def bars(rows: Sequence[tuple[str, int, int]]) -> str:
    """What is left of each extent, as a bar on a track as long as it was.

    Args:
        rows: name, before, after.
    """
    return (
        '<div class="scroll"><table class="bars"><thead><tr><th></th>'
        '<th class="number">before</th><th class="number">after</th><th></th>'
        '<th class="number">kept</th></tr></thead><tbody>'
        + "".join(
            f'<tr><td>{text(name)}</td><td class="number">{before:,}</td>'
            f'<td class="number">{after:,}</td>'
            f'<td class="bar"><div><div style="width:{100 * after / before:.2f}%"></div></div></td>'
            f'<td class="number">{100 * after / before:.1f} %</td></tr>'
            for name, before, after in rows
        )
        + "</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """HTML that a reader opens."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def preformatted(words: str) -> str:
    """Text as it is."""
    return f'<div class="scroll"><pre>{text(words)}</pre></div>'


def definitions(words: Mapping[str, str]) -> str:
    """Words and what they mean."""
    items = "".join(f"<dt>{text(word)}</dt><dd>{text(means)}</dd>" for word, means in words.items())
    return f'<dl class="words">{items}</dl>'


def page(title: str, lead: Sequence[str], sections: Sequence[Section], *, now: float) -> str:
    """A whole page.

    Args:
        title: of the page.
        lead: HTML between the title and the first section.
        sections: in order; those of level 2 are linked above.
        now: when the page is made, seconds since 1970.
    """
    links = "".join(
        f'<a href="#{text(section.name)}">{text(section.title)}</a>'
        for section in sections
        if section.level == 2
    )
    made = moment(now)
    body = "\n".join([*lead, f"<nav>{links}</nav>", *(section.html() for section in sections)])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text(title)}</h1>\n{body}\n"
        f"<footer>Written by megashear {text(__version__)} on {text(made)}. This page needs no "
        f"other file and no network.</footer>\n</main>\n</body>\n</html>\n"
    )


def save_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write every figure of a page as a PNG; where they lie."""
    written = []
    for section in sections:
        for part in section.parts:
            if isinstance(part, PageFigure):
                written.append(folder / f"{part.name}.png")
                save(part.figure, written[-1])
    return written


def moment(time: float) -> str:
    """A time as a person writes it, in UTC."""
    return datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def large(number: float) -> str:
    """A count in three digits: 6.74 B, 3.44 M, 950."""
    number = float(f"{number:.3g}")  # first, or 999,999 were 1000 k
    for scale, sign in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= scale:
            shown = number / scale
            return f"{shown:.{2 - int(math.log10(abs(shown)))}f}{sign}"
    return f"{number:.0f}"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


STYLE = """
:root { color-scheme: light dark; --back: #f5f6f8; --card: #ffffff; --ink: #22262c;
  --muted: #59626e; --faint: #d3d8df; --track: #e6eaef; --kept: #0072b2; --good: #00704f;
  --warn: #a34700; }
@media (prefers-color-scheme: dark) { :root { --back: #131619; --card: #1c2025; --ink: #e4e7eb;
  --muted: #9fa9b5; --faint: #3b434d; --track: #2c333b; --kept: #56a8dc; --good: #4cc79b;
  --warn: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 1.35rem; margin: 0 0 10px; }
h3 { font-size: 1.08rem; margin: 22px 0 8px; }
section { background: var(--card); border: 1px solid var(--faint); border-radius: 10px;
  padding: 20px 24px; margin: 18px 0; }
section section { border: 0; padding: 0; margin: 26px 0 0; }
p { margin: 8px 0; max-width: 75ch; }
p.lead { font-size: 1.1rem; }
p.state { max-width: none; }
p.muted, figcaption, footer, .note { color: var(--muted); }
p.warn { border-left: 4px solid var(--warn); padding: 4px 0 4px 12px; }
nav { display: flex; flex-wrap: wrap; gap: 8px 18px; margin: 14px 0; }
a { color: var(--kept); }
figure { margin: 14px 0 22px; }
figcaption { font-size: .93rem; max-width: 85ch; margin-top: 4px; }
.drawing { max-width: 880px; }
.drawing svg { display: block; width: 100%; height: auto; color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; margin: 8px 0; }
th { text-align: left; font-weight: 600; color: var(--muted); }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars td.bar { width: 42%; min-width: 160px; vertical-align: middle; }
.bars td.bar > div { background: var(--track); border-radius: 3px; height: 14px; }
.bars td.bar > div > div { background: var(--kept); border-radius: 3px; height: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px;
  margin: 18px 0; }
.cards > div { background: var(--card); border: 1px solid var(--faint); border-radius: 10px;
  padding: 12px 16px; }
.cards dt { font-size: .85rem; color: var(--muted); }
.cards dd { margin: 0; }
.cards .value { display: block; font-size: 1.5rem; font-weight: 650; line-height: 1.3; }
.cards .note { display: block; font-size: .85rem; }
.words dt { font-weight: 600; margin-top: 10px; }
.words dd { margin: 0; max-width: 80ch; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--kept); }
pre { font-size: .85rem; line-height: 1.4; margin: 8px 0; }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: 99px;
  padding: 0 10px; font-size: .85rem; font-weight: 600; color: var(--good); }
.badge.stopped, .badge.unknown, .badge.ended-early { color: var(--warn); }
.badge.running { color: var(--kept); }
footer { margin-top: 30px; font-size: .85rem; }
td:not(.number) { overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 14px 8px 40px; } section { padding: 12px 10px; }
  h1 { font-size: 1.5rem; } table { font-size: .78rem; } th, td { padding-right: 6px; }
  .number { white-space: normal; } .bars td.bar { width: 25%; min-width: 40px; }
  .bars td:first-child { max-width: 30vw; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 8px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
"""Colours follow the reader's theme. `as_svg` refers to ink, faint, card and kept."""
