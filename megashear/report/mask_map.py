"""One picture of what is kept of a model: layers, heads, neurons, hidden dimensions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megashear.masks.kinds import HEAD, HIDDEN, INTERMEDIATE, KINDS, LAYER
from megashear.models.kept import KeptUnits
from megashear.monitor.drawing import FAINT, INK, KEPT, PAPER, new_figure, style
from megashear.monitor.mask_pictures import shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 160
"""Cells in a row of neurons; where there are more neurons, neighbours share a cell."""
HIDDEN_COLUMNS = 256
"""Cells of the strip of hidden dimensions."""

Cells = npt.NDArray[np.floating]


def mask_map(kept: KeptUnits, *, title: str = "") -> Figure:
    """Draw a row for each layer, its heads and its neurons, and below the hidden dimensions.

    What is kept is blue; what is pruned is blank; where a cell stands for several neighbours it is
    the fainter the fewer of them are kept. A pruned layer takes its heads and neurons along.

    Args:
        kept: what is kept.
        title: above; with what the colours mean, for a picture that stands alone.
    """
    source = kept.source
    heads, neurons, hidden = cells(kept)
    num_layers = source.num_layers
    figure = new_figure(1.9 + max(1.6, min(0.3 * num_layers, 7.0)))
    wide = max(0.9, min(2.6, 0.14 * source.num_attention_heads))
    panels = figure.subplot_mosaic(
        [[HEAD, INTERMEDIATE], [HIDDEN, HIDDEN]],
        width_ratios=[wide, 6.0],
        height_ratios=[max(1.6, min(0.3 * num_layers, 7.0)), 0.3],
    )
    _cells(panels[HEAD], heads, grid=source.num_attention_heads <= 48)
    _cells(panels[INTERMEDIATE], neurons)
    _cells(panels[HIDDEN], hidden)
    if source.heads_per_group > 1:  # key/value groups apart
        for group in range(1, source.num_query_groups):
            panels[HEAD].axvline(group * source.heads_per_group - 0.5, color=FAINT, linewidth=1)
    panels[HEAD].set_xlabel(KINDS[HEAD].unit, color=INK, fontsize=9.5)
    panels[HEAD].set_ylabel(KINDS[LAYER].unit, color=INK, fontsize=9.5)
    for kind, painted in ((KINDS[INTERMEDIATE], neurons), (KINDS[HIDDEN], hidden)):
        each = kind.size(source) / painted.shape[1]
        shared = "" if each == 1 else f", {each:.3g} to a cell"
        panels[kind.name].set_xlabel(kind.unit + shared, color=INK, fontsize=9.5)
    panels[HIDDEN].set_yticks([])
    for name in (HEAD, INTERMEDIATE):
        every = max(1, num_layers // 16)
        panels[name].set_yticks(range(0, num_layers, every))
        for layer in kept.removed_layers:
            panels[name].axhline(layer, color=FAINT, linewidth=1)
    if num_layers <= 40:
        for layer in kept.removed_layers:
            panels[INTERMEDIATE].text(
                (neurons.shape[1] - 1) / 2,
                layer,
                f" layer {layer} is pruned ",
                color=INK,
                fontsize=8,
                ha="center",
                va="center",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            )
    panels[INTERMEDIATE].set_yticklabels([])
    _units(panels[HEAD], source.num_attention_heads, heads.shape[1], most=8)
    _units(panels[INTERMEDIATE], source.ffn_hidden_size, neurons.shape[1])
    _units(panels[HIDDEN], source.hidden_size, hidden.shape[1])
    if title:
        figure.suptitle(
            f"{title}\nblue is kept, blank pruned; fainter: some neighbours of a cell are kept",
            color=INK,
            fontsize=10,
        )
    return figure


def cells(kept: KeptUnits) -> tuple[Cells, Cells, Cells]:
    """Return the share of kept units in every cell of the three fields.

    Returns:
        Heads [L, H], neurons [L, at most ``MAX_COLUMNS``], hidden [1, at most
        ``HIDDEN_COLUMNS``]; rows of pruned layers are 0.
    """
    heads = kept.units[HEAD].numpy().astype(float)
    neurons, hidden = (
        shares(kept.units[kind].numpy(), columns_for(KINDS[kind].size(kept.source), most))
        for kind, most in ((INTERMEDIATE, MAX_COLUMNS), (HIDDEN, HIDDEN_COLUMNS))
    )
    return heads, neurons, hidden


def columns_for(num_units: int, most: int) -> int:
    """Return how many cells a row has, at most about ``most``.

    Each stands for a whole number of units where one divides them.
    """
    return round(num_units / math.ceil(num_units / most))


def _cells(panel: Axes, values: Cells, *, grid: bool = False) -> None:
    """Paint cells: opaque where all is kept, nothing where nothing is."""
    from matplotlib.colors import to_rgb

    painted = np.empty((*values.shape, 4))
    painted[..., :3] = to_rgb(KEPT)
    painted[..., 3] = values
    # none: cells as they are, one pixel each, for a browser to enlarge
    panel.imshow(painted, aspect="auto", interpolation="none")
    style(panel, grid=False)
    panel.spines[["top", "right"]].set_visible(True)
    if grid:
        panel.set_xticks(np.arange(values.shape[1] - 1) + 0.5, minor=True)
        panel.set_yticks(np.arange(values.shape[0] - 1) + 0.5, minor=True)
        panel.grid(which="minor", color=FAINT, linewidth=0.5)
        panel.tick_params(which="minor", length=0)


def _units(panel: Axes, num_units: int, num_columns: int, *, most: int = 12) -> None:
    """Label columns by the units they stand for, at round numbers."""
    steps: list[Any] = [m * 10**e for e in range(7) for m in (1, 2, 5)]
    every = next(step for step in steps if num_units / step <= most)
    numbers = list(range(0, num_units, every))
    panel.set_xticks(
        [
            unit * num_columns / num_units - (0.5 if num_columns < num_units else 0)
            for unit in numbers
        ],
        [f"{unit:,}" for unit in numbers],
    )
