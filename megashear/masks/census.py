"""Counts of a run's gates: how many are open, how many are undecided, how many changed side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.gates import scores
from megashear.masks.mask_set import exact_gates, expected_gates
from megashear.masks.targets import MaskPart

UNDECIDED = (0.1, 0.9)
"""A gate is undecided if its chance to be open lies between these bounds. The lower clamp of
log_alpha gives a chance of 0.047, so 0.05 would leave out little more than gates at the clamp."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Census:
    """Counts of the gates of one kind, which say how far they are from a shape that can be cut.

    Two modes are compared. Expected mode opens as many gates of a row as the row is expected to
    open, and training evaluates it. Exact mode opens the target's number in every row, and the cut
    keeps these.
    """

    kind: str
    num_rows: int
    """Rows of the whole mask."""
    num_units: int
    """Units in a row."""
    target: int
    """Units to keep in each row."""
    fewest_open: int
    """Open gates of the row with the fewest, expected mode."""
    most_open: int
    """Open gates of the row with the most, expected mode."""
    actual_open: float
    """Mean over rows of the open gates of a row, expected mode."""
    num_changed: int
    """Gates that are open in one of the two modes and closed in the other."""
    num_undecided: int
    """Gates whose chance to be open lies between the bounds of ``UNDECIDED``."""
    expected_open: float
    """Mean over rows of the sum of a row's chances to be open."""

    @property
    def num_gates(self) -> int:
        """Return the number of gates of the kind, in all rows."""
        return self.num_rows * self.num_units


def take_census(
    whole_log_alpha: Mapping[str, Tensor], targets: Mapping[str, int]
) -> dict[str, Census]:
    """Return the counts of the gates of every kind.

    Args:
        whole_log_alpha: **whole** masks by kind, [num_rows, num_units].
        targets: units to leave open in each row, for the same kinds.
    """
    exact, expected = exact_gates(whole_log_alpha, targets), expected_gates(whole_log_alpha)
    counted = {}
    for kind, log_alpha in whole_log_alpha.items():
        num_rows, num_units = log_alpha.shape
        chance = scores(log_alpha.detach())  # float64
        is_open = expected[kind] != 0
        per_row = is_open.sum(dim=1)  # [num_rows]
        least, most = UNDECIDED
        counted[kind] = Census(
            kind=kind,
            num_rows=num_rows,
            num_units=num_units,
            target=targets[kind],
            fewest_open=int(per_row.min()),
            most_open=int(per_row.max()),
            actual_open=int(per_row.sum()) / num_rows,
            num_changed=int((is_open != (exact[kind] != 0)).sum()),
            num_undecided=int(((chance > least) & (chance < most)).sum()),
            expected_open=float(chance.sum()) / num_rows,
        )
    return counted


def target_sizes(constraint: SparsityConstraint, step: int) -> dict[str, float]:
    """Return the units that a row shall leave open at a step, by kind, fractions in the warm-up.

    Args:
        constraint: the run's constraint.
        step: training step, from 0.
    """
    return {
        kind: (1.0 - sparsity) * constraint.parts[kind].num_units
        for kind, sparsity in constraint.target_at(step).items()
    }


class GateSides:
    """The side, open or closed, of each gate of this process when it was last looked at.

    Before the first look all gates are open, as when a run begins.

    Args:
        parts: the parts that this process holds, by kind.
    """

    def __init__(self, parts: Mapping[str, MaskPart]) -> None:
        self._is_open = {
            kind: torch.ones(len(part.rows), len(part.units), dtype=torch.uint8)
            for kind, part in parts.items()
        }  # [own rows, own units]

    def changed(self, own_gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Count the gates that changed side since the last look, and remember the new sides.

        Args:
            own_gates: deterministic gates of this process by kind, [own rows, own units].

        Returns:
            Number of changes in each row by kind, float64 [own rows]. The sum over the shards of a
            row is the number of the whole row.
        """
        counts = {}
        for kind, before in self._is_open.items():
            now = (own_gates[kind] != 0).to(torch.uint8)
            counts[kind] = (now != before).sum(dim=1).double()
            before.copy_(now)
        return counts

    def state_dict(self) -> dict[str, Tensor]:
        """Return 1 for open and 0 for closed by kind, uint8 [own rows, own units]: live tensors."""
        return dict(self._is_open)
