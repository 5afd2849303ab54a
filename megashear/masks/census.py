"""Where the gates of a run stand: how many stay, how many are undecided, how many changed side."""

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
"""Chances to be open between which a gate counts as undecided, neither bound included. The lower
clamp of log_alpha gives 0.047, so that .05 would leave out hardly more than the gates on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Census:
    """Where the gates of one kind stand, and how far from a shape that can be cut.

    Two modes are compared. Expected mode opens as many gates of a row as it is expected to open:
    what the masks ask for, which training evaluates. Exact mode opens the target's number in every
    row: what is cut.
    """

    kind: str
    num_rows: int
    """Rows of the whole mask."""
    num_units: int
    """Units in a row."""
    target: int
    """Units to keep in each row."""
    fewest_open: int
    """Open gates of the row that keeps fewest, expected mode."""
    most_open: int
    """Open gates of the row that keeps most, expected mode."""
    actual_open: float
    """Open gates of a row, expected mode, mean over rows."""
    num_changed: int
    """Gates open in one of the two modes and closed in the other."""
    num_undecided: int
    """Gates whose chance to be open lies between the bounds of ``UNDECIDED``."""
    expected_open: float
    """Sum of a row's chances to be open, mean over rows."""

    @property
    def num_gates(self) -> int:
        """Return the gates of the kind, in all rows."""
        return self.num_rows * self.num_units


def take_census(
    whole_log_alpha: Mapping[str, Tensor], targets: Mapping[str, int]
) -> dict[str, Census]:
    """Count the gates of every kind.

    Args:
        whole_log_alpha: **whole** masks by kind, [num_rows, num_units].
        targets: units to leave open in each row, by the same kinds.
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
    """Units that a row shall leave open at a step, by kind; no whole numbers in the warm-up.

    Args:
        constraint: of the run.
        step: training step, from 0.
    """
    return {
        kind: (1.0 - sparsity) * constraint.parts[kind].num_units
        for kind, sparsity in constraint.target_at(step).items()
    }


class GateSides:
    """On which side each gate of this process stood when it was last looked at.

    Before the first look all are open, as a run begins.

    Args:
        parts: what this process holds, by kind.
    """

    def __init__(self, parts: Mapping[str, MaskPart]) -> None:
        self._is_open = {
            kind: torch.ones(len(part.rows), len(part.units), dtype=torch.uint8)
            for kind, part in parts.items()
        }  # [own rows, own units]

    def changed(self, own_gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gates that changed side since the last look, and remember the new sides.

        Args:
            own_gates: deterministic gates of this process by kind, [own rows, own units].

        Returns:
            Number in each row by kind, float64 [own rows]; summed over the shards of a row they
            give the whole row's.
        """
        counts = {}
        for kind, before in self._is_open.items():
            now = (own_gates[kind] != 0).to(torch.uint8)
            counts[kind] = (now != before).sum(dim=1).double()
            before.copy_(now)
        return counts

    def state_dict(self) -> dict[str, Tensor]:
        """1 for open and 0 for closed by kind, uint8 [own rows, own units]: the live tensors."""
        return dict(self._is_open)
