"""A run's curves as figures, each from points by tag and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megashear.masks.kinds import KINDS
from megashear.monitor import tags
from megashear.monitor.drawing import FAINT, INK, KEPT, legend, new_figure, style
from megashear.monitor.figures import COLOURS, DASHES, Points, mark_runs
from megashear.report.page import large
from megashear.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT, MARK = "#D55E00", "#009E73"
"""Source: Okabe and Ito 2008, "Color Universal Design"."""
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
"""Units of a time axis, seconds each; it is at least three of its own long."""


def kinds_of(points: Points) -> list[str]:
    """Return the kinds of mask that a run logged, in the order of ``KINDS``."""
    return [kind for kind in KINDS if tags.expected_sparsity(kind) in points]


def loss_figure(points: Points, levels: Mapping[str, float] | None = None) -> Figure:
    """Return training loss and held-out loss over steps.

    Args:
        points: of the run.
        levels: losses to compare with by name, drawn as lines across.
    """
    figure = new_figure(3.4)
    panel = figure.subplots()
    _levels(panel, levels or {})
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
    legend(figure, loc="outside lower center", ncols=3)  # beside the curves, which it would hide
    return figure


def recovery_figure(
    runs: Sequence[Points],
    steps_to_axis: Sequence[float],
    names: Sequence[str],
    levels: Mapping[str, float],
    *,
    xlabel: str,
) -> Figure:
    """Return the losses of runs that follow each other on one axis.

    Args:
        runs: points of each, in their order.
        steps_to_axis: tokens (or 1) that a step of each run is on the axis.
        names: of the runs.
        levels: losses to compare with by name, drawn as lines across.
        xlabel: what the axis counts.
    """
    figure = new_figure(3.8)
    panel = figure.subplots()
    _levels(panel, levels)
    begins, begin = [], 0.0
    for number, (points, scale) in enumerate(zip(runs, steps_to_axis)):
        begins.append(begin)

        def moved(tag: str) -> dict[float, float]:
            return {begin + scale * at: y for at, y in points.get(tag, {}).items()}  # noqa: B023

        def label(words: str) -> str | None:
            return words if number == 0 else None  # noqa: B023

        _line(panel, moved(tags.LM_LOSS), color=KEPT, label=label("training text"))
        held_out = {"color": HELD_OUT, "marker": "o", "markersize": 3.5}
        _line(panel, moved(tags.EVAL_MEAN_LOSS), label=label("held-out text"), **held_out)
        cut = moved(tags.EXACT_MEAN_LOSS)
        _line(panel, cut, color=HELD_OUT, linestyle="--", label="held-out text, if cut there")
        begin += scale * max((max(of, default=0) for of in points.values()), default=0)
    style(panel, xlabel=xlabel, ylabel="loss, nats per token")
    mark_runs([panel], begins, names)
    panel.xaxis.set_major_formatter(_large_numbers)
    legend(figure, loc="outside lower center", ncols=3)
    return figure


def training_figure(points: Points) -> Figure:
    """Return learning rates and gradient norms over steps, of weights and, if any, of masks."""
    figure = new_figure(2.6)
    panels = figure.subplots(1, 2)
    for panel, of_weights, of_masks, words in (
        (panels[0], tags.LEARNING_RATE, tags.MASK_LEARNING_RATE, "learning rate"),
        (panels[1], tags.GRAD_NORM, tags.MASK_GRAD_NORM, "gradient norm, before clipping"),
    ):
        _line(panel, points.get(of_weights, {}), color=KEPT, label="weights")
        _line(panel, points.get(of_masks, {}), color=HELD_OUT, label="masks")
        style(panel, xlabel="step")
        panel.set_title(words, color=INK, fontsize=10)
        values = [y for tag in (of_weights, of_masks) for y in points.get(tag, {}).values()]
        if values and min(values) > 0 and max(values) > 20 * min(values):
            panel.set_yscale("log")  # rates of masks are a thousand times those of weights
        else:
            panel.set_ylim(bottom=0)
    if tags.MASK_GRAD_NORM in points or tags.MASK_LEARNING_RATE in points:
        legend(panels[1], loc="best")
    return figure


def sparsity_figure(points: Points, row_lengths: Mapping[str, int]) -> Figure:
    """Draw expected against target sparsity, a panel for each kind of mask.

    Args:
        points: of the run.
        row_lengths: units in a row of each kind, for what evaluations left open; empty where
            they are not known.
    """
    kinds = kinds_of(points)
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = new_figure(0.8 + 2.1 * rows)
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
        style(panel, ylabel="share pruned" if number % columns == 0 else "")
        panel.set_title(KINDS[kind].units, color=INK, fontsize=10)
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    for number in range(len(kinds), rows * columns):
        panels[number // columns][number % columns].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("step", color=INK, fontsize=9.5)
    first = panels[0][0].get_lines()
    legend(figure, handles=first, loc="outside lower center", ncols=3)
    return figure


def has_settling(points: Points) -> bool:
    """Return whether a run logged how many of its gates are undecided."""
    return any(tags.undecided(kind) in points for kind in kinds_of(points))


def settling_figure(points: Points) -> Figure:
    """Draw how many gates are undecided, and how many changed side, by kind."""
    figure = new_figure(3.2)
    panels = figure.subplots(1, 2)
    for panel, tag, words in (
        (panels[0], tags.undecided, "undecided"),
        (panels[1], tags.churn, "changed side between evaluations"),
    ):
        for number, kind in enumerate(kinds_of(points)):
            _line(
                panel,
                {step: 100 * share for step, share in points.get(tag(kind), {}).items()},
                color=COLOURS[number],
                label=KINDS[kind].units if tag is tags.undecided else None,
                marker="o",
                markersize=3.5,
            )
        style(panel, xlabel="step", ylabel="% of gates" if tag is tags.undecided else "")
        panel.set_title(words, color=INK, fontsize=10)
        panel.set_ylim(bottom=0)
    legend(figure, loc="outside lower center", ncols=3)
    return figure


def parts_of(points: Points) -> list[str]:
    """Parts of a step whose time a run logged."""
    return [part for part in tags.STEP_PARTS if tags.part_seconds(part) in points]


MEMORY_NAMES = {
    tags.MEMORY_ALLOCATED: "tensors on the GPU",
    tags.MEMORY_RESERVED: "allocator on the GPU",
    tags.MEMORY_RESIDENT: "a process on its host",
}
"""What memory is of, by tag."""


def speed_figure(points: Points) -> Figure:
    """Return tokens per second over steps, and utilisation, parts of a step and memory if known."""
    parts = parts_of(points)
    memory = [tag for tag in MEMORY_NAMES if tag in points]
    utilisation = points.get(tags.MODEL_FLOPS_UTILISATION, {})
    num_panels = 1 + bool(utilisation) + bool(parts) + bool(memory)
    figure = new_figure(1.0 + 1.7 * num_panels)
    panels = list(figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])
    _line(panels[0], points.get(tags.TOKENS_PER_SECOND, {}), color=KEPT)
    style(panels[0], ylabel="tokens/s,\nall processes")
    panels[0].yaxis.set_major_formatter(_large_numbers)
    rest = panels[1:]
    if utilisation:
        panel = rest.pop(0)
        _line(panel, {step: 100 * share for step, share in utilisation.items()}, color=KEPT)
        style(panel, ylabel="% of the peak\n(MFU)")
    if parts:
        panel = rest.pop(0)
        of_part = {part: points[tags.part_seconds(part)] for part in parts}
        steps = sorted(set.intersection(*(set(values) for values in of_part.values())))
        panel.stackplot(
            steps,
            [[of_part[part][step] for step in steps] for part in parts],
            colors=COLOURS,
            alpha=0.75,
            labels=parts,
        )
        style(panel, ylabel="seconds\na step")
        legend(panel, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if memory:
        panel = rest.pop(0)
        for number, tag in enumerate(memory):
            _line(panel, points[tag], color=COLOURS[number], label=MEMORY_NAMES[tag])
        style(panel, ylabel="memory, GB")
        legend(panel, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for panel in panels:
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("step", color=INK, fontsize=9.5)
    figure.align_ylabels(panels)
    return figure


def timeline_figure(record: RunRecord) -> Figure:
    """Draw steps over wall time, with starts, evaluations and checkpoints on the line."""
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


def _levels(panel: Axes, levels: Mapping[str, float]) -> None:
    """Draw losses to compare with as lines across."""
    for number, (name, loss) in enumerate(levels.items()):
        panel.axhline(
            loss,
            label=f"{name}, {loss:.3f}",
            color=MARK,
            linestyle=DASHES[1 + number % 2],
            linewidth=1.3,
        )


def _large_numbers(value: float, _: float) -> str:
    return large(value)


def _line(panel: Axes, values: Mapping[Any, float], **look: Any) -> None:
    if values:
        panel.plot(list(values), list(values.values()), **{"linewidth": 1.6, **look})
