"""Figures of a run, drawn from its TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megashear.monitor import tensorboard as tags
from megashear.monitor.drawing import INK, check_image, legend, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Mapping[str, Mapping[int, float]]
"""Values by tag and step."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#F0E442")
"""Colours that people with any colour vision tell apart. Source: Okabe and Ito 2008, "Color
Universal Design", with grey for black."""
DASHES = ("-", "--", ":")
"""One more for every time the colours come round."""
HEIGHTS = {2: 5.4, 3: 8.0}
"""Of a figure by its number of panels, inches."""
EVENT_FILES = "events.out.tfevents.*"
"""Names of event files."""


class Point(NamedTuple):
    """One value of a tag."""

    value: float
    wall_time: float
    """When it was written, seconds since 1970."""


def read_events(directories: Sequence[str | Path]) -> dict[str, dict[int, Point]]:
    """Every tag's points by step in directories of event files; of two at a step the later counts.

    Raises:
        ValueError: a directory does not exist or holds no event file.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[str, dict[int, Point]] = {}
    for directory in directories:
        if not any(Path(directory).glob(EVENT_FILES)):
            raise ValueError(
                f"--tensorboard-dir {directory} holds no event files; give the directory that the "
                f"run wrote"
            )
        # 0 keeps all points; by default it thins them out
        reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found = {e.step: Point(e.value, e.wall_time) for e in reader.Scalars(tag)}
            points.setdefault(tag, {}).update(found)
    return {tag: dict(sorted(of_tag.items())) for tag, of_tag in points.items()}


def read_points(directories: Sequence[str | Path]) -> dict[str, dict[int, float]]:
    """Values of `read_events`, without their times."""
    return {
        tag: {step: point.value for step, point in of_tag.items()}
        for tag, of_tag in read_events(directories).items()
    }


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
    check_image(path, "--output", formats=(".png", ".pdf", ".svg"))
    points = read_points(directories)
    if not domains_of(points):
        raise ValueError(
            f"{', '.join(map(str, directories))}: no {tags.mixture_weight('')}<domain> among the "
            f"{len(points)} tags of the event files; give the directory of a prune or pretrain run"
        )
    save(mixture_figure(points, title=title), path)


def domains_of(points: Points) -> list[str]:
    """Domains of a mixture, the heaviest at the end first; none where a run logged no mixture."""
    prefix = tags.mixture_weight("")
    domains = [tag.removeprefix(prefix) for tag in points if tag.startswith(prefix)]
    return sorted(domains, key=lambda name: -list(points[prefix + name].values())[-1])


def mixture_figure(points: Points, *, title: str = "") -> Figure:
    """The figure of `plot_mixture`, of points that are read already and have a mixture."""
    # the heaviest first, so that the legend reads from the top of the first panel
    domains = domains_of(points)
    has_excess = any(tags.eval_excess(name) in points for name in domains)
    has_losses = has_excess or any(tags.eval_loss(name) in points for name in domains)
    num_panels = 1 + has_losses + has_excess
    figure = new_figure(HEIGHTS.get(num_panels, 3.0))
    panels: list[Any] = list(figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])
    for number, name in enumerate(domains):
        line = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        }
        # a weight holds for the steps of its log window and jumps between two
        jumps = line | {"drawstyle": "steps-pre", "label": name}
        _draw(panels[0], points.get(tags.mixture_weight(name), {}), {}, jumps)
        errors = points.get(tags.eval_error(name), {})
        if has_losses:
            _draw(panels[1], points.get(tags.eval_loss(name), {}), errors, line)
        if has_excess:
            _draw(panels[2], points.get(tags.eval_excess(name), {}), {}, line)  # bands as above
    labels = [
        "weight in the mixture",
        "held-out loss\nnats per token",
        "loss - reference\nnats per token",
    ]
    for panel, label in zip(panels, labels):
        style(panel, ylabel=label)
    panels[0].set_ylim(bottom=0)
    if has_excess:
        panels[2].axhline(0, color=INK, linewidth=0.8)
    panels[-1].set_xlabel("step")
    figure.align_ylabels(panels)
    legend(figure, loc="outside right upper")
    if title:
        figure.suptitle(title, color=INK)
    return figure


def _draw(
    panel: Axes,
    values: Mapping[int, float],
    errors: Mapping[int, float],
    line: Mapping[str, Any],
) -> None:
    steps = list(values)
    panel.plot(steps, list(values.values()), linewidth=1.5, **line)
    known = [step for step in steps if step in errors]
    if not known:
        return
    panel.fill_between(
        known,
        [values[step] - errors[step] for step in known],
        [values[step] + errors[step] for step in known],
        color=line["color"],
        alpha=0.15,
        linewidth=0,
    )
