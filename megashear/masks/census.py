"""Where the gates of a run stand: how many stay, how many are undecided, how many changed side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.gates import scores
from megashear.masks.mask_set import MaskPart, exact_gates

UNDECIDED = (0.1, 0.9)
"""Chances to be open between which a gate counts as undecided, neither bound included. The lower
clamp of log_alpha gives 0.047, so that .05 would leave out hardly more than the gates on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Census:
    """Where the gates of one kind stand. Sizes are open units of a row, mean over rows."""

    num_gates: int
    """Gates of the kind, in all rows."""
    expected_size: float
    """Sum of the chances to be open."""
    actual_size: float
    """Gates that evaluation leaves open, which are whole ones."""
    fewest_open: int
    """The same of the row with the fewest."""
    most_open: int
    """The same of the row with the most."""
    undecided: int
    """Gates whose chance to be open lies between the bounds of ``UNDECIDED``."""
    rounded: int
    """Gates on another side in exact mode, which is cut, than in expected mode."""


def take_census(
    whole_log_alpha: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    targets: Mapping[str, int],
) -> dict[str, Census]:
    """Count the gates of every kind.

    Args:
        whole_log_alpha: **whole** masks by kind, [num_rows, num_units].
        expected: their deterministic gates in expected mode (`mask_set.expected_gates`).
        targets: units to leave open in each row, by kind.
    """
    exact = exact_gates(whole_log_alpha, targets)
    counted = {}
    for kind, log_alpha in whole_log_alpha.items():
        chance = scores(log_alpha.detach())  # float64
        is_open = expected[kind] != 0
        per_row = is_open.sum(dim=1)  # [num_rows]
        least, most = UNDECIDED
        counted[kind] = Census(
            num_gates=log_alpha.numel(),
            expected_size=float(chance.sum()) / log_alpha.shape[0],
            actual_size=int(per_row.sum()) / log_alpha.shape[0],
            fewest_open=int(per_row.min()),
            most_open=int(per_row.max()),
            undecided=int(((chance > least) & (chance < most)).sum()),
            rounded=int((is_open != (exact[kind] != 0)).sum()),
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


class Sides:
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
