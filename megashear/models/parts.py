"""Which rows and units of the masks a rank holds: those whose gates act on its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megashear.masks.kinds import KINDS
from megashear.masks.targets import MaskPart
from megashear.parallel.groups import ParallelGroups


def own_parts(
    whole: Mapping[str, MaskPart], layers: Sequence[int], groups: ParallelGroups
) -> dict[str, MaskPart]:
    """Return the parts of whole masks that this rank holds, by kind.

    Args:
        whole: whole parts of all kinds of mask.
        layers: this rank's layers, global numbers from 0, rising.
        groups: ranks and groups of this process.
    """
    return {kind: _own_part(part, layers, groups) for kind, part in whole.items()}


def _own_part(part: MaskPart, layers: Sequence[int], groups: ParallelGroups) -> MaskPart:
    kind, each = KINDS[part.kind], part.rows_per_layer
    rows, units = range(each), part.units
    if kind.split_over_tensor and each > 1:
        rows = _slice(each, groups)
    elif kind.split_over_tensor:
        units = _slice(part.num_units, groups)
    if kind.per_layer:
        of_layers = tuple(layer * each + row for layer in layers for row in rows)
        return replace(part, rows=of_layers, units=units)
    return replace(part, units=tuple(layers) if kind.split_over_pipeline else units)


def _slice(whole: int, groups: ParallelGroups) -> range:
    width = whole // groups.tensor_size
    return range(groups.tensor_rank * width, (groups.tensor_rank + 1) * width)
