"""Figures of a run, drawn from its TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megashear.files.output import check_writable, writing
from megashear.files.regular import check_regular
from megashear.monitor import tags
from megashear.monitor.drawing import INK, check_image, legend, new_figure, save, style
from megashear.monitor.notes import READING

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
EVENT_FILES = "*tfevents*"
"""Names of event files, as TensorBoard finds them."""


class Point(NamedTuple):
    """One value of a tag."""

    value: float
    wall_time: float
    """When it was written, seconds since 1970."""


def event_files(directory: Path) -> list[Path]:
    """Return the event files of a directory by name, all of which may be opened.

    Raises:
        ValueError: one is a pipe, a device or a directory: TensorBoard would wait for ever.
    """
    found = sorted(directory.glob(EVENT_FILES))
    for path in found:
        check_regular(path, f"the event file {path}")
    return found


def read_events(directories: Sequence[str | Path]) -> dict[str, dict[int, Point]]:
    """Read every point of one run, by tag and step; of two at a step the later directory's counts.

    Args:
        directories: of event files, of one run and in its order: each begins after the one before.

    Raises:
        ValueError: a directory does not exist, holds no event file or is of another run; an event
            file is no regular file.
    """
    first, *others = runs_in(directories)
    if others:
        again = next(d for d in directories if d not in first.directories)
        raise ValueError(
            f"--tensorboard-dir {first.directories[0]} and {again} both begin at step "
            f"{first.first_step}, so they are two runs, and one is wanted here; leave one out"
        )
    return first.events


@dataclass(frozen=True)
class RunEvents:
    """What the event files of one run hold."""

    directories: tuple[str | Path, ...]
    """In the order of their steps."""
    events: dict[str, dict[int, Point]]
    """Points by tag and step."""

    @property
    def points(self) -> dict[str, dict[int, float]]:
        """Values by tag and step, without their times."""
        return {tag: {step: p.value for step, p in of.items()} for tag, of in self.events.items()}

    @property
    def first_step(self) -> int:
        """Step of the first point."""
        return min((step for of_tag in self.events.values() for step in of_tag), default=0)

    @property
    def last_step(self) -> int:
        """Step of the last point."""
        return max((step for of_tag in self.events.values() for step in of_tag), default=0)


def runs_in(directories: Sequence[str | Path]) -> list[RunEvents]:
    """Read event files, and tell runs apart.

    A directory that begins after the first step of the one before continues its run: the job was
    started again and wrote elsewhere. One that begins there or earlier is another run.

    Args:
        directories: of event files, in their order.

    Raises:
        ValueError: a directory does not exist, holds no event file or is given twice; an event
            file is no regular file.
    """
    runs: list[RunEvents] = []
    seen: set[Path] = set()
    for directory in directories:
        if Path(directory).resolve() in seen:
            raise ValueError(f"--tensorboard-dir {directory} is given twice; leave one out")
        seen.add(Path(directory).resolve())
        found = RunEvents((directory,), _read_directory(directory))
        if not runs or found.first_step <= runs[-1].first_step:
            runs.append(found)
            continue
        before = runs.pop()
        joined = {
            tag: dict(sorted((before.events.get(tag, {}) | found.events.get(tag, {})).items()))
            for tag in before.events | found.events
        }
        runs.append(RunEvents((*before.directories, directory), joined))
    return runs


def _read_directory(directory: str | Path) -> dict[str, dict[int, Point]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not event_files(Path(directory)):
        raise ValueError(
            f"--tensorboard-dir {directory} holds no event files; give the directory that the "
            f"run wrote"
        )
    # 0 keeps all points; by default it thins them out
    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    found = {
        tag: dict(sorted((e.step, Point(e.value, e.wall_time)) for e in reader.Scalars(tag)))
        for tag in reader.Tags()["scalars"]
    }
    # without points: a text says by being there that the run logs a weight from its step on
    if f"{READING}/text_summary" in reader.Tags()["tensors"]:
        found[READING] = {}
    return found


def plot_mixture(directories: Sequence[str | Path], output: str | Path, *, title: str = "") -> None:
    """Draw weights, held-out losses and their distance from the references, by domain and step.

    Losses come with their standard errors as bands; the distance is left out where the run had no
    references.

    Args:
        directories: of event files. Those of one run are joined; runs (`runs_in`) are drawn one
            after the other, each from where the one before ended.
        output: figure to write, of the kind its ending names.
        title: above the figure.

    Raises:
        ValueError: no event files, or without a mixture; the output exists, or is of an unknown
            kind; matplotlib is not installed.
    """
    path = Path(output)
    check_image(path, "--output", formats=(".png", ".pdf", ".svg"))
    check_writable("--output", path)
    runs = runs_in(directories)
    for run in runs:
        if not domains_of(run.points):
            raise ValueError(
                f"--tensorboard-dir {', '.join(map(str, run.directories))}: no "
                f"{tags.mixture_weight('')}<domain> among the {len(run.events)} tags of the event "
                f"files; give the directory of a prune or pretrain run"
            )
    names = [Path(run.directories[0]).name for run in runs] if len(runs) > 1 else []
    figure = mixture_figure([run.points for run in runs], names=names, title=title)
    with writing("--output", path):
        save(figure, path)


def domains_of(points: Points) -> list[str]:
    """Return the domains of a mixture, the heaviest at the end first; none where none is logged."""
    prefix = tags.mixture_weight("")
    domains = [tag.removeprefix(prefix) for tag in points if tag.startswith(prefix)]
    return sorted(domains, key=lambda name: -list(points[prefix + name].values())[-1])


def mixture_figure(runs: Sequence[Points], *, names: Sequence[str] = (), title: str = "") -> Figure:
    """Return the figure of `plot_mixture`, of points that are read already and have a mixture.

    Args:
        runs: points of each run, in their order.
        names: of the runs, written where each begins; none for one run alone.
        title: above the figure.
    """
    # the heaviest first, so that the legend reads from the top of the first panel
    domains = list(dict.fromkeys(name for points in reversed(runs) for name in domains_of(points)))
    has_excess = any(tags.eval_excess(name) in points for points in runs for name in domains)
    has_losses = has_excess or any(
        tags.eval_loss(name) in points for points in runs for name in domains
    )
    num_panels = 1 + has_losses + has_excess
    figure = new_figure(HEIGHTS.get(num_panels, 3.0))
    panels: list[Any] = list(figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])
    begins = run_begins(runs)
    for begin, points in zip(begins, runs):
        for number, name in enumerate(domains):
            line = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
            }
            weights = points.get(tags.mixture_weight(name), {})
            # a weight holds from its step on; runs of before wrote no texts, and have the weight
            # of the steps up to it. A resumed run has none at step 0
            holds_on = READING in points or 0 in weights
            jumps = {"drawstyle": "steps-post" if holds_on else "steps-pre", "label": name}
            _draw(panels[0], _from(begin, weights), {}, line | jumps)
            errors = _from(begin, points.get(tags.eval_error(name), {}))
            if has_losses:
                losses = _from(begin, points.get(tags.eval_loss(name), {}))
                _draw(panels[1], losses, errors, line)
            if has_excess:  # bands as above
                _draw(panels[2], _from(begin, points.get(tags.eval_excess(name), {})), {}, line)
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
    panels[-1].set_xlabel("step" if len(runs) == 1 else "step, of all runs together")
    figure.align_ylabels(panels)
    mark_runs(panels, begins, names)
    _legend_once(figure, panels[0])
    if title:
        figure.suptitle(title, color=INK)
    return figure


def run_begins(runs: Sequence[Points]) -> list[int]:
    """Return the step, on an axis of all runs together, from which each run is drawn."""
    begins = [0]
    for points in runs:
        begins.append(begins[-1] + max((max(of, default=0) for of in points.values()), default=0))
    return begins[:-1]


def mark_runs(panels: Sequence[Axes], begins: Sequence[float], names: Sequence[str]) -> None:
    """Draw a line where each run but the first begins, and its name beside it.

    Args:
        panels: of a figure, top to bottom; the first gets the names.
        begins: on their x axis.
        names: of the runs; none where there is nothing to tell apart.
    """
    for begin, name in zip(begins, names):
        for panel in panels:
            if begin != begins[0]:
                panel.axvline(begin, color=INK, linestyle=":", linewidth=1.2)
        panels[0].annotate(
            name,
            (begin, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            color=INK,
            fontsize=9,
        )


def _from(begin: int, values: Mapping[int, float]) -> dict[int, float]:
    return {begin + step: value for step, value in values.items()}


def _legend_once(figure: Figure, panel: Axes) -> None:
    """Name every line once, however many runs have it."""
    lines = {line.get_label(): line for line in reversed(panel.get_lines())}
    shown = {name: lines[name] for name in dict.fromkeys(x.get_label() for x in panel.get_lines())}
    legend(
        figure,
        handles=[line for name, line in shown.items() if not str(name).startswith("_")],
        loc="outside right upper",
    )


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
