"""Figures of a run, drawn from its TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear.monitor import tensorboard as tags

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Mapping[str, Mapping[int, float]]
"""Values by tag and step."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#F0E442")
"""Colours that people with any colour vision tell apart. Source: Okabe and Ito 2008, "Color
Universal Design", with grey for black."""
DASHES = ("-", "--", ":")
"""One more for every time the colours come round."""
SIZE, DPI = (9.0, 8.0), 100
"""Inches, and pixels an inch."""


def read_points(directories: Sequence[str | Path]) -> dict[str, dict[int, float]]:
    """Points of every tag in directories of event files; where two have a step, the later counts.

    Raises:
        ValueError: a directory does not exist or holds no event file.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[str, dict[int, float]] = {}
    for directory in directories:
        if not any(Path(directory).glob("events.out.tfevents.*")):
            raise ValueError(
                f"--tensorboard-dir {directory} holds no event files; give the directory that the "
                f"run wrote"
            )
        # 0 keeps all points; by default it thins them out
        reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            events = reader.Scalars(tag)
            points.setdefault(tag, {}).update({event.step: event.value for event in events})
    return {tag: dict(sorted(of_tag.items())) for tag, of_tag in points.items()}


def plot_mixture(directories: Sequence[str | Path], output: str | Path, *, title: str = "") -> None:
    """Draw weights, held-out losses and their distance from the references, by domain and step.

    Losses come with their standard errors as bands; the distance is left out where the run had no
    references.

    Args:
        directories: of event files; those of runs that follow each other are joined.
        output: figure to write, of the kind its ending names.
        title: above the figure.

    Raises:
        ValueError: no event files, or without a mixture; the output exists, or is of an unknown
            kind; matplotlib is not installed.
    """
    path = Path(output)
    if path.exists():
        raise ValueError(f"--output {path} exists; choose another or remove it first")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output {path} ends in {path.suffix!r}; wanted .png, .pdf or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "matplotlib is not installed, which figures are drawn with; "
            'pip install "megashear[report]"'
        ) from None
    points = read_points(directories)
    prefix = tags.mixture_weight("")
    domains = [tag.removeprefix(prefix) for tag in points if tag.startswith(prefix)]
    if not domains:
        raise ValueError(
            f"{', '.join(map(str, directories))}: no {prefix}<domain> among the {len(points)} tags "
            f"of the event files; give the directory of a prune or pretrain run"
        )
    # the heaviest first, so that the legend reads from the top of the first panel
    domains.sort(key=lambda name: -list(points[prefix + name].values())[-1])
    has_excess = any(tags.eval_excess(name) in points for name in domains)
    size = SIZE if has_excess else (SIZE[0], SIZE[1] * 2 / 3)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels: list[Any] = list(figure.subplots(3 if has_excess else 2, 1, sharex=True))
    for number, name in enumerate(domains):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        }
        # a weight holds for the steps of its log window and jumps between two
        jumps = style | {"drawstyle": "steps-pre", "label": name}
        _draw(panels[0], points.get(tags.mixture_weight(name), {}), {}, jumps)
        errors = points.get(tags.eval_error(name), {})
        _draw(panels[1], points.get(tags.eval_loss(name), {}), errors, style)
        if has_excess:
            _draw(panels[2], points.get(tags.eval_excess(name), {}), {}, style)  # bands as above
    labels = [
        "weight in the mixture",
        "held-out loss\nnats per token",
        "loss - reference\nnats per token",
    ]
    for panel, label in zip(panels, labels):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    if has_excess:
        panels[2].axhline(0, color="black", linewidth=0.8)
    panels[-1].set_xlabel("step")
    figure.align_ylabels(panels)
    figure.legend(loc="outside right upper", frameon=False)
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(
    panel: Axes,
    values: Mapping[int, float],
    errors: Mapping[int, float],
    style: Mapping[str, Any],
) -> None:
    steps = list(values)
    panel.plot(steps, list(values.values()), linewidth=1.5, **style)
    known = [step for step in steps if step in errors]
    if not known:
        return
    panel.fill_between(
        known,
        [values[step] - errors[step] for step in known],
        [values[step] + errors[step] for step in known],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
