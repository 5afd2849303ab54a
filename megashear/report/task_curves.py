"""The scores of a run in downstream tasks as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megashear.monitor import tags
from megashear.monitor.drawing import legend, new_figure, style
from megashear.monitor.figures import COLOURS, DASHES, Points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEGIN = tags.task_score("")


def tasks_of(points: Points) -> list[str]:
    """Return the tasks and metrics that a run logged, as ``task/metric``."""
    return sorted(tag.removeprefix(_BEGIN) for tag in points if tag.startswith(_BEGIN))


def tasks_figure(points: Points) -> Figure:
    """Return scores over steps, a panel for those up to 1 and one for others, perplexities say."""
    names = tasks_of(points)
    curves = {name: points[tags.task_score(name)] for name in names}
    shares = [name for name in names if max(curves[name].values()) <= 1]
    panels_of = [part for part in (shares, [n for n in names if n not in shares]) if part]
    figure = new_figure(0.6 + 2.4 * len(panels_of))
    panels = figure.subplots(len(panels_of), 1, sharex=True, squeeze=False)[:, 0]
    for panel, part in zip(panels, panels_of):
        for name in part:
            number = names.index(name)
            panel.plot(
                list(curves[name]),
                list(curves[name].values()),
                color=COLOURS[number % len(COLOURS)],
                linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
                marker="o",
                markersize=3.5,
                label=name,
            )
        style(panel, ylabel="score")
    style(panels[-1], xlabel="step", ylabel="score")
    legend(figure, loc="outside lower center", ncols=3)
    return figure


def tasks_caption(points: Points) -> str:
    """Return the sentence under the scores."""
    ends = []
    for name in tasks_of(points):
        values = list(points[tags.task_score(name)].values())
        ends.append(f"{name} from {values[0]:.3g} to {values[-1]:.3g}")
    return (
        f"Scores in downstream tasks; while masks are learned, of the model that would be cut: "
        f"{', '.join(ends[:6])}{' and more' if len(ends) > 6 else ''}."
    )
