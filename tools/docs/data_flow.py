"""Draw docs/images/data_flow.svg, the picture of the README.

Usage: python tools/docs/data_flow.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "data_flow.svg"
WIDTH, HEIGHT = 1048, 424

# Files are boxes, commands the arrows between them. Colours come in two sets, for pages that are
# light and dark; where the page's is not known, lines and boxes of the light set read on both.
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2933 }
  .small { font-size: 12.5px }
  .loose { fill: #5b6773 }
  .command { font: bold 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
    fill: #b4480f }
  .file { fill: #e6f0fb; stroke: #5b8fc7; stroke-width: 1.5 }
  .mix { fill: #eaf5e8; stroke: #5c9c55; stroke-width: 1.5 }
  .line { stroke: #76828e; stroke-width: 1.8; fill: none }
  .back { stroke: #5c9c55; stroke-dasharray: 5 4 }
  .head { fill: #76828e }
  .headback { fill: #5c9c55 }
  .open { fill: #3b7dc4 }
  .shut { fill: none; stroke: #9aa5b1; stroke-width: 1 }
  @media (prefers-color-scheme: dark) {
    .loose { fill: #a9b4c0 }
    .command { fill: #f59a63 }
    .file { fill: #1d3048; stroke: #6fa3dc }
    .mix { fill: #1d3524; stroke: #77b870 }
    .file ~ text.inside, text.inside { fill: #e8edf2 }
    .line { stroke: #97a3af }
    .head { fill: #97a3af }
    .back { stroke: #77b870 }
    .headback { fill: #77b870 }
    .open { fill: #6fa3dc }
    .shut { stroke: #66727e }
  }
"""
ROW, BOX = 238, 62
"""Top and height of the boxes of models, pixels."""
MODELS = (
    (16, "Hugging Face", "Llama-2-7B"),
    (200, "checkpoint", "6.7 B"),
    (378, "checkpoint", "+ masks"),
    (542, "checkpoint", "2.7 B"),
    (736, "checkpoint", "2.7 B, trained"),
    (920, "Hugging Face", "a LLaMA again"),
)
COMMANDS = ("convert", "prune", "cut", "pretrain", "convert")
STRIPS = (
    ("hidden dimensions", "1111011101100110"),
    ("heads, key/value groups", "10110110"),
    ("neurons", "0110111011110110"),
    ("layers", "11011101"),
)
"""Kinds of mask, and an example of what stays open."""


def picture() -> str:
    """Return the picture, as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="t">',
        '<title id="t">Text is tokenised domain by domain and mixed; a Hugging Face model is '
        "converted, pruned, cut, trained on and converted back; held-out losses move the "
        "mixture.</title>",
        f"<style>{STYLE}</style>",
        *text_row(),
        *model_row(),
        *mixture_arrows(),
        *masks(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text_row() -> Iterator[str]:
    """From text to the mixture, along the top."""
    yield from box(16, 16, 144, 58, ("text per domain", "jsonl, parquet, MDS"))
    yield from arrow((160, 45), (266, 45), "preprocess")
    yield from box(268, 16, 204, 58, ("tokens, domain by domain", "training and held-out sets"))
    yield from arrow((472, 45), (526, 45), "")
    yield from box(528, 16, 230, 58, ("mixture", "next sample: domain owed most"), kind="mix")


def model_row() -> Iterator[str]:
    """From Hugging Face to Hugging Face."""
    for x, *words in MODELS:
        yield from box(x, ROW, 112, BOX, words)
    middle = ROW + BOX // 2
    for (left, *_), (right, *_), command in zip(MODELS, MODELS[1:], COMMANDS):
        yield from arrow((left + 112, middle), (right - 2, middle), command)


def mixture_arrows() -> Iterator[str]:
    """Draw samples down to the two training commands, losses back up."""
    top, bottom, bend = 74, ROW + 4, 128
    yield line(f"M580 {top} V{bend} H332 V{bottom}")
    yield line(f"M356 {bottom + 4} V{bend + 26} H606 V{top + 4}", "back")
    yield line(f"M683 {top} V{bottom}")
    yield line(f"M707 {bottom + 4} V{top + 4}", "back")
    for x, end in ((332, 606), (683, 707)):
        yield tip(x, bottom + 2, "down")
        yield tip(end, top + 2, "up", "headback")
    yield label(320, 190, "samples", "small loose", anchor="end")
    yield label(671, 190, "samples", "small loose", anchor="end")
    yield label(368, 182, "held-out loss per domain", "small loose")
    yield label(368, 199, "moves the weights", "small loose")
    yield label(719, 190, "held-out loss per domain", "small loose")


def masks() -> Iterator[str]:
    """Draw what is learned, under the pruned checkpoint."""
    yield line(f"M434 {ROW + BOX} V{ROW + BOX + 20}")
    side, left, y = 11, 436, 330
    for name, units in STRIPS:
        yield label(left - 14, y + 10, name, "small loose", anchor="end")
        for place, unit in enumerate(units):
            kind, x = "open" if unit == "1" else "shut", left + place * 14
            yield f'<rect class="{kind}" x="{x}" y="{y}" width="{side}" height="{side}" rx="2"/>'
        y += 20
    yield label(690, 340, "every mask lives on the rank that holds", "small loose")
    yield label(690, 358, "the weights it gates: tensor, sequence,", "small loose")
    yield label(690, 376, "pipeline and data parallel; checkpoints", "small loose")
    yield label(690, 394, "know no layout", "small loose")


def box(
    x: int, y: int, width: int, height: int, words: Sequence[str], *, kind: str = "file"
) -> Iterator[str]:
    """Draw a file, or the mixture: a title and a line below."""
    yield f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>'
    title, detail = words
    middle = x + width // 2
    yield label(middle, y + height // 2 - 5, title, "inside", anchor="middle")
    yield label(middle, y + height // 2 + 15, detail, "inside small", anchor="middle")


def arrow(start: tuple[int, int], end: tuple[int, int], command: str) -> Iterator[str]:
    """Draw a command, from left to right."""
    yield line(f"M{start[0]} {start[1]} H{end[0] - 4}")
    yield tip(end[0], end[1], "right")
    if command:
        yield label((start[0] + end[0]) // 2, start[1] - 10, command, "command", anchor="middle")


def line(path: str, kind: str = "") -> str:
    """Draw a line that turns only by right angles."""
    return f'<path class="line {kind}" d="{path}"/>'.replace(" " + '"', '"')


def tip(x: int, y: int, way: str, kind: str = "head") -> str:
    """Draw the tip of an arrow that ends at (x, y)."""
    corners = {
        "right": [(x, y), (x - 9, y - 5), (x - 9, y + 5)],
        "down": [(x, y), (x - 5, y - 9), (x + 5, y - 9)],
        "up": [(x, y), (x - 5, y + 9), (x + 5, y + 9)],
    }[way]
    return f'<polygon class="{kind}" points="{" ".join(f"{a},{b}" for a, b in corners)}"/>'


def label(x: int, y: int, words: str, kind: str, *, anchor: str = "start") -> str:
    """Words at their baseline."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def main() -> int:
    """Write the picture."""
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
