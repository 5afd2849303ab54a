"""Importance scores for a reader: a table, a figure, plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megashear.checkpoint.scores import ImportanceScores
from megashear.masks.importance import rows_of
from megashear.masks.kinds import HEAD, HIDDEN, INTERMEDIATE, KINDS, LAYER
from megashear.monitor.drawing import INK, KEPT, new_figure, style
from megashear.report.tables import LISTED, measured_text
from megashear.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "importance scores"
"""What `inspect` calls a file of scores."""


def summary(scores: ImportanceScores) -> dict[str, dict[str, float]]:
    """Return least, median and largest score by kind, and the share of the upper half.

    The upper half are the units above the middle of each row of a mask. They have 0.5 of the sum of
    scores where all units matter alike, and near 1 where half of them do nothing.
    """
    found = {}
    for kind, values in scores.values.items():
        ordered = rows_of(kind, values, scores.shape).sort(dim=1, descending=True).values
        upper, whole = ordered[:, : -(-ordered.size(1) // 2)].sum(), ordered.sum()
        found[kind] = {
            "units": values.numel(),
            "least": float(values.min()),
            "median": float(values.median()),
            "most": float(values.max()),
            "upper half": float(upper / whole) if whole else 0.5,
        }
    return found


def describe_scores(scores: ImportanceScores) -> str:
    """Describe scores in a table of the kinds of unit and a list of layers."""
    rows = [["scores of", "number", "least", "median", "most", "share of the upper half"]]
    for kind, one in summary(scores).items():
        numbers = [f"{one[name]:.4g}" for name in ("least", "median", "most")]
        rows.append([KINDS[kind].units, f"{one['units']:,}", *numbers, f"{one['upper half']:.3f}"])
    of_layers = scores.values[LAYER][0]
    order = torch.argsort(of_layers, stable=True).tolist()
    named = [f"{layer} ({of_layers[layer]:.4g})" for layer in order[:LISTED]]
    more = f" and {len(order) - LISTED} more" if len(order) > LISTED else ""
    return "\n\n".join(
        [
            f"{scores.measured['file']}: {KIND}{measured_text(scores.measured)}",
            text_table(rows),
            f"layers, least important first: {', '.join(named)}{more}",
        ]
    )


def as_values(scores: ImportanceScores) -> dict[str, Any]:
    """Return all that is known of scores as plain values."""
    return {
        "path": scores.measured["file"],
        "kind": KIND,
        "shape": scores.shape.to_dict(),
        "fingerprint": scores.fingerprint,
        "measured": dict(scores.measured),
        "summary": summary(scores),
        "scores": {kind: values.tolist() for kind, values in scores.values.items()},
    }


def draw_scores(scores: ImportanceScores, *, title: str = "") -> Figure:
    """Draw scores of layers, heads, neurons and hidden dimensions.

    Layers are bars and heads are cells. Neurons and hidden dimensions are curves from the highest
    score to the lowest, relative to the mean of their row, a curve for each layer: the steeper, the
    more a choice by score is worth.

    Args:
        scores: to draw.
        title: above.
    """
    figure = new_figure(5.2)
    panels = figure.subplot_mosaic([[LAYER, HEAD], [INTERMEDIATE, HIDDEN]])
    of_layers = scores.values[LAYER][0].tolist()
    panels[LAYER].bar(range(len(of_layers)), of_layers, color=KEPT)
    style(panels[LAYER], xlabel=KINDS[LAYER].unit, ylabel="1 - cos(input, output)")
    heads = scores.values[HEAD].numpy()
    image = panels[HEAD].imshow(heads, aspect="auto", interpolation="none", cmap="Blues", vmin=0)
    style(panels[HEAD], xlabel=KINDS[HEAD].unit, ylabel=KINDS[LAYER].unit, grid=False)
    bar = figure.colorbar(image, ax=panels[HEAD])
    bar.ax.tick_params(colors=INK, labelsize=8)
    for kind in (INTERMEDIATE, HIDDEN):
        rows = scores.values[kind].sort(dim=1, descending=True).values
        for row in (rows / rows.mean(dim=1, keepdim=True).clamp(min=1e-30)).tolist():
            places = [(place + 0.5) / len(row) for place in range(len(row))]
            panels[kind].plot(places, row, color=KEPT, alpha=0.6, linewidth=1)
        style(
            panels[kind],
            xlabel=f"share of {KINDS[kind].units}, highest first",
            ylabel="score / mean",
        )
        panels[kind].set_ylim(bottom=0)
    if title:
        figure.suptitle(title, color=INK, fontsize=10)
    return figure
