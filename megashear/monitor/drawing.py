"""Figures that read well on light and dark pages and as files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER = "#31343a", "#c9ccd2", "#fefefd"
"""Letters and axes; grids and frames; what lies behind. No other part of a figure may have these
very colours, which a page replaces by those of the reader's theme."""
KEPT = "#0072B2"
"""What stays. Source: Okabe and Ito 2008, "Color Universal Design"."""
WIDTH = 7.0
"""Of a figure, inches; a page scales it down where there is less room."""
DPI = 120
FORMATS = (".png", ".svg", ".pdf")


def require_matplotlib() -> None:
    """Refuse to go on where figures cannot be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(
            "matplotlib is not installed, which figures are drawn with; "
            'pip install "megashear[report]"'
        ) from None


def new_figure(height: float, *, width: float = WIDTH) -> Figure:
    """Make an empty figure, inches, without a background."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def style(panel: Axes, *, ylabel: str = "", xlabel: str = "", grid: bool = True) -> None:
    """Make axes quiet: no frame on top and on the right, a faint grid behind."""
    panel.patch.set_alpha(0.0)
    panel.spines[["top", "right"]].set_visible(False)
    for spine in panel.spines.values():
        spine.set_color(FAINT)
    panel.tick_params(colors=INK, labelsize=9)
    panel.set_axisbelow(True)
    if grid:
        panel.grid(color=FAINT, alpha=0.6, linewidth=0.6)
    if xlabel == "step":
        panel.locator_params(axis="x", integer=True)  # there is no step 2.5
    panel.set_ylabel(ylabel, color=INK, fontsize=9.5)
    panel.set_xlabel(xlabel, color=INK, fontsize=9.5)


def legend(owner: Any, **where: Any) -> None:
    """Add a legend of a figure or of axes, without a frame."""
    owner.legend(frameon=False, labelcolor=INK, fontsize=9, **where)


def as_svg(figure: Figure, name: str, alt: str) -> str:
    """Return a figure as an element for a page, in the page's colours and letters.

    Args:
        figure: drawn with ``INK`` and ``FAINT``.
        name: makes ids unique on the page.
        alt: what it shows, for those who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    # letters stay letters; ids depend on the name alone, so that a page is repeated byte for byte
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # ids like axes_1 are in every figure
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    text = text.replace(KEPT.lower(), "var(--kept)")
    text = text.replace(PAPER, "var(--card)")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit-face", text)
    text = text.replace("inherit-face", "system-ui, sans-serif")
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda m: (
            f'<svg {m[1]} role="img" aria-label="{_attribute(alt)}" '
            f'xmlns:xlink="http://www.w3.org/1999/xlink">'
        ),
        text,
        count=1,
    )


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file of the kind its ending names, on white paper, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(aside, format=path.suffix[1:], facecolor="white")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def check_image(path: Path, flag: str, *, formats: Sequence[str] = FORMATS) -> None:
    """Refuse a figure's file before work is spent on it.

    Raises:
        ValueError: it exists, its ending is unknown, or matplotlib is not installed.
    """
    if path.exists():
        raise ValueError(f"{flag} {path} exists; choose another or remove it first")
    if path.suffix not in formats:
        wanted = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise ValueError(f"{flag} {path} ends in {path.suffix!r}; wanted {wanted}")
    require_matplotlib()


def _attribute(text: str) -> str:
    for sign, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(sign, name)
    return text
