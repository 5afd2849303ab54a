"""Importance scores of units: which units a one-shot cut keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megashear.masks.kinds import KINDS
from megashear.masks.targets import target_units
from megashear.shape import ModelShape


def gates_of_scores(
    scores: Mapping[str, Tensor], source: ModelShape, target: ModelShape
) -> dict[str, Tensor]:
    """Return gates that are 1 for the units of the highest scores, as many as the target has.

    Query heads are chosen within their key/value head, so that each key/value head keeps the same
    number.

    Args:
        scores: of every kind, [L, units], or [1, units] for kinds whose units belong to no layer.
        source: shape of the scored model.
        target: shape to cut to.

    Returns:
        Gates 0 and 1 by kind in the rows of masks, for the kinds that the target lowers. Among
        equal scores the first units are closed, as among equal gates of masks.

    Raises:
        ValueError: no cut leads from ``source`` to ``target``.

    Source: Muralidharan et al. 2024 (arXiv:2407.14679), section 2.
    """
    gates = {}
    for kind, wanted in target_units(source, target).items():
        rows = rows_of(kind, scores[kind], source)
        least = torch.argsort(rows, dim=1, stable=True)[:, : rows.size(1) - wanted]
        gates[kind] = torch.ones(rows.shape).scatter(1, least, 0.0)
    return gates


def rows_of(kind: str, values: Tensor, source: ModelShape) -> Tensor:
    """Return values of a kind's units, [L, units] or [1, units], in the rows of its mask."""
    return values.reshape(-1, KINDS[kind].row_length(source, source))
