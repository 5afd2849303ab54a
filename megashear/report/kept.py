"""Read a pruning run's masks: what they keep, and how far they are from the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megashear.masks.census import Census, take_census
from megashear.masks.mask_set import exact_gates, expected_gates
from megashear.masks.targets import target_units
from megashear.models.kept import KeptUnits
from megashear.shape import ModelShape

Mode = Literal["expected", "exact"]
"""expected: as many gates of a row as it is expected to keep, which training evaluates.
exact: the target's number in every row, which is cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskReading:
    """What a report says of a pruning run's masks."""

    source: ModelShape
    target: ModelShape
    log_alpha: Mapping[str, Tensor]
    """Whole masks by kind, [num_rows, num_units]."""
    expected: KeptUnits
    exact: KeptUnits
    kinds: Mapping[str, Census]

    @classmethod
    def of(
        cls, log_alpha: Mapping[str, Tensor], source: ModelShape, target: ModelShape
    ) -> MaskReading:
        """Read whole masks, [num_rows, num_units] by kind, of the way from source to target."""
        targets = target_units(source, target)
        return cls(
            source=source,
            target=target,
            log_alpha=dict(log_alpha),
            expected=KeptUnits.of(expected_gates(log_alpha), source),
            exact=KeptUnits.of(exact_gates(log_alpha, targets), source),
            kinds=take_census(log_alpha, targets),
        )

    def kept(self, mode: Mode) -> KeptUnits:
        """Return what is kept in one mode."""
        return self.exact if mode == "exact" else self.expected

    def gates(self, mode: Mode) -> dict[str, Tensor]:
        """Return deterministic gates by kind, [num_rows, num_units], 0 where closed."""
        if mode == "expected":
            return expected_gates(self.log_alpha)
        return exact_gates(self.log_alpha, target_units(self.source, self.target))
