"""A run's curves as figures, each from points by tag and step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megashear.masks.targets import KINDS
from megashear.monitor import tensorboard as tags
from megashear.monitor.drawing import FAINT, INK, KEPT, legend, new_figure, style
from megashear.monitor.figures import COLOURS, Points
from megashear.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT, MARK = "#D55E00", "#009E73"
"""Source: Okabe and Ito 2008, "Color Universal Design"."""
KIND_TITLES = {
    "hidden": "hidden dimensions",
    "head": "query heads",
    "group": "key/value heads",
    "intermediate": "MLP neurons",
    "layer": "layers",
}

UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
"""Units of a time axis, seconds each; it is at least three of its own long."""


def kinds_of(points: Points) -> list[str]:
    """Kinds of mask that a run logged, in the order of ``KINDS``."""
    return [kind for kind in KINDS if tags.expected_sparsity(kind) in points]


def loss_figure(points: Points) -> Figure:
    """Training loss and held-out loss over steps."""
    figure = new_figure(3.4)
    panel = figure.subplots()
    _line(panel, points.get(tags.LM_LOSS, {}), color=KEPT, label="training text")
    held_out, errors = points.get(tags.EVAL_MEAN_LOSS, {}), points.get(tags.EVAL_MEAN_ERROR, {})
    _line(panel, held_out, color=HELD_OUT, label="held-out text", marker="o", markersize=3.5)
    known = [step for step in held_out if step in errors]
    if known:
        panel.fill_between(
            known,
            [held_out[step] - errors[step] for step in known],
            [held_out[step] + errors[step] for step in known],
            color=HELD_OUT,
            alpha=0.15,
            linewidth=0,
        )
    whole = points.get(tags.FULL_MEAN_LOSS, {})
    if whole:
        panel.plot(
            list(whole),
            list(whole.values()),
            marker="D",
            linestyle="none",
            color=HELD_OUT,
            markerfacecolor="none",
            label="all held-out text, at the end",
        )
    style(panel, xlabel="step", ylabel="loss, nats per token")
    legend(panel, loc="upper right")
    return figure


def sparsity_figure(points: Points, row_lengths: Mapping[str, int]) -> Figure:
    """Expected against target sparsity, a panel for each kind of mask.

    Args:
        points: of the run.
        row_lengths: units in a row of each kind, for what evaluations left open; empty where
            they are not known.
    """
    kinds = kinds_of(points)
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = new_figure(0.5 + 2.1 * rows)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for number, kind in enumerate(kinds):
        panel = panels[number // columns][number % columns]
        target = points.get(tags.target_sparsity(kind), {})
        _line(panel, target, color=INK, linestyle="--", label="asked for")
        expected = points.get(tags.expected_sparsity(kind), {})
        _line(panel, expected, color=KEPT, label="expected")
        if kind in row_lengths:
            sizes = points.get(tags.actual_size(kind), {})
            _line(
                panel,
                {step: 1 - size / row_lengths[kind] for step, size in sizes.items()},
                color=HELD_OUT,
                linestyle="none",
                marker="o",
                markersize=4,
                label="closed in evaluations",
            )
        style(panel, ylabel="share that goes" if number % columns == 0 else "")
        panel.set_title(KIND_TITLES[kind], color=INK, fontsize=10)
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
        if number == 0:
            legend(panel, loc="lower right")
    for number in range(len(kinds), rows * columns):
        panels[number // columns][number % columns].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("step", color=INK, fontsize=9.5)
    return figure


def has_settling(points: Points) -> bool:
    """Whether a run logged how many of its gates are undecided."""
    return any(tags.undecided(kind) in points for kind in kinds_of(points))


def settling_figure(points: Points) -> Figure:
    """How many gates are undecided, and how many changed side, by kind."""
    figure = new_figure(2.9)
    panels = figure.subplots(1, 2)
    for panel, tag, words in (
        (panels[0], tags.undecided, "undecided"),
        (panels[1], tags.churn, "changed side since the last evaluation"),
    ):
        for number, kind in enumerate(kinds_of(points)):
            _line(
                panel,
                {step: 100 * share for step, share in points.get(tag(kind), {}).items()},
                color=COLOURS[number],
                label=KIND_TITLES[kind] if tag is tags.undecided else None,
                marker="o",
                markersize=3.5,
            )
        style(panel, xlabel="step", ylabel="% of gates" if tag is tags.undecided else "")
        panel.set_title(words, color=INK, fontsize=10)
        panel.set_ylim(bottom=0)
    legend(panels[0], loc="upper right")
    return figure


def parts_of(points: Points) -> list[str]:
    """Parts of a step whose time a run logged."""
    return [part for part in tags.STEP_PARTS if tags.part_seconds(part) in points]


def speed_figure(points: Points) -> Figure:
    """Tokens per second over steps, and what the time of a step goes to where that is known."""
    parts = parts_of(points)
    figure = new_figure(2.4 + 2.2 * bool(parts))
    panels = figure.subplots(1 + bool(parts), 1, sharex=True, squeeze=False)[:, 0]
    _line(panels[0], points.get(tags.TOKENS_PER_SECOND, {}), color=KEPT)
    style(panels[0], ylabel="tokens/s, all processes")
    if parts:
        of_part = {part: points[tags.part_seconds(part)] for part in parts}
        steps = sorted(set.intersection(*(set(values) for values in of_part.values())))
        panels[1].stackplot(
            steps,
            [[of_part[part][step] for step in steps] for part in parts],
            colors=COLOURS,
            alpha=0.75,
            labels=parts,
        )
        style(panels[1], ylabel="seconds a step")
        legend(panels[1], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for panel in panels:
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("step", color=INK, fontsize=9.5)
    figure.align_ylabels(panels)
    return figure


def timeline_figure(record: RunRecord) -> Figure:
    """Steps over wall time, with starts, evaluations and checkpoints on the line."""
    begin = record.sessions[0].began
    saved = [(one.saved_at, one.step) for one in record.iterations if one.saved_at is not None]
    # seconds of the whole axis
    length = max(record.sessions[-1].ended, *(time for time, _ in saved), begin) - begin
    scale, unit = next((s, name) for s, name in UNITS if length >= 3 * s or s == 1.0)
    figure = new_figure(3.2)
    panel = figure.subplots()

    def at(time: float) -> float:
        return (time - begin) / scale

    steps = record.events.get(tags.LM_LOSS, {})
    for number, session in enumerate(record.sessions):
        inside = {
            step: point.wall_time
            for step, point in steps.items()
            if session.began <= point.wall_time <= session.ended
        }
        panel.axvspan(at(session.began), at(session.ended), color=FAINT, alpha=0.25, linewidth=0)
        panel.plot(
            [at(time) for time in inside.values()],
            list(inside),
            color=KEPT,
            linewidth=1.6,
            label="training" if number == 0 else None,
        )
        if number:
            panel.axvline(
                at(session.began),
                color=INK,
                linestyle=":",
                linewidth=1.2,
                label="started again" if number == 1 else None,
            )
    evaluations = record.events.get(tags.EVAL_MEAN_LOSS, {})
    panel.plot(
        [at(point.wall_time) for point in evaluations.values()],
        list(evaluations),
        linestyle="none",
        marker="o",
        markersize=4.5,
        color=HELD_OUT,
        label=f"evaluation ({len(evaluations)})",
    )
    panel.plot(
        [at(time) for time, _ in saved],
        [step for _, step in saved],
        linestyle="none",
        marker="^",
        markersize=7,
        color=MARK,
        label=f"checkpoint ({len(saved)})",
    )
    style(panel, xlabel=f"{unit} since the start", ylabel="step")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    legend(panel, loc="upper left")
    return figure


def _line(panel: Axes, values: Mapping[int, float], **look: Any) -> None:
    if values:
        panel.plot(list(values), list(values.values()), **{"linewidth": 1.6, **look})
