"""Which units of a model the masks keep, and how many parameters that leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megashear.masks.census import take_census
from megashear.masks.mask_set import exact_gates, expected_gates, target_units
from megashear.masks.targets import EXTENTS, KINDS
from megashear.models import layout
from megashear.shape import ModelShape

Mode = Literal["expected", "exact"]
"""expected: as many gates of a row as it is expected to keep, which training evaluates.
exact: the target's number in every row, which is cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptUnits:
    """What stays of a model, unit by unit; True is kept.

    A layer that goes takes its heads and neurons along: its rows still say which of its own gates
    are open, and counts that matter leave it out.
    """

    source: ModelShape
    """The model as it is now."""
    hidden: Tensor
    """[h]"""
    layers: Tensor
    """[L]"""
    heads: Tensor
    """[L, H]; a query head whose own gate and whose group's are open."""
    groups: Tensor
    """[L, G]"""
    neurons: Tensor
    """[L, I]"""

    @classmethod
    def of(cls, gates: Mapping[str, Tensor], source: ModelShape) -> KeptUnits:
        """What deterministic gates keep.

        Args:
            gates: whole gates by kind, [num_rows, num_units], 0 where closed; an absent kind keeps
                all. With grouped queries head comes as [L * G, H/G].
            source: the model they are of.
        """
        opened = {}
        for kind in KINDS:
            extent = getattr(source, EXTENTS[kind])
            rows = 1 if kind in ("hidden", "layer") else source.num_layers
            given = gates.get(kind)
            opened[kind] = (
                torch.ones(rows, extent, dtype=torch.bool)
                if given is None
                else (given.reshape(rows, extent) != 0)
            )
        if source.heads_per_group == 1:  # a head and its key/value head are one unit
            groups = heads = opened["head"] & opened["group"]
        else:
            groups = opened["group"]
            heads = opened["head"] & groups.repeat_interleave(source.heads_per_group, dim=1)
        return cls(
            source=source,
            hidden=opened["hidden"][0],
            layers=opened["layer"][0],
            heads=heads,
            groups=groups,
            neurons=opened["intermediate"],
        )

    @property
    def kept_layers(self) -> list[int]:
        """Numbers of the layers that stay, from 0."""
        found: list[int] = self.layers.nonzero().flatten().tolist()
        return found

    @property
    def removed_layers(self) -> list[int]:
        """Numbers of the layers that go, from 0."""
        found: list[int] = (~self.layers).nonzero().flatten().tolist()
        return found

    def num_params(self) -> int:
        """Parameters of what stays, rows of all layers as they are, equal or not."""
        total = 0
        for _, weight, layer in layout.weights(self.source):
            if layer is None or self.layers[layer]:
                total += math.prod(self._length(axis, layer) for axis in weight.axes)
        return total

    def _length(self, axis: str, layer: int | None) -> int:
        if axis in ("vocab", "head_dim"):
            return layout.AXES[axis](self.source)
        if axis == "hidden":
            return int(self.hidden.sum())
        assert layer is not None, f"{axis} outside the layers"
        if axis == "intermediate":
            return int(self.neurons[layer].sum())
        units = self.heads if axis == "query" else self.groups
        return int(units[layer].sum()) * self.source.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Numbers of the kept units, from 0, for JSON; of layers that go nothing is listed."""

        def numbers(row: Tensor) -> list[int]:
            found: list[int] = row.nonzero().flatten().tolist()
            return found

        return {
            "parameters": self.num_params(),
            "hidden": numbers(self.hidden),
            "layers": self.kept_layers,
            "query heads by layer": {n: numbers(self.heads[n]) for n in self.kept_layers},
            "key/value heads by layer": {n: numbers(self.groups[n]) for n in self.kept_layers},
            "neurons by layer": {n: numbers(self.neurons[n]) for n in self.kept_layers},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class KindSummary:
    """One kind of mask: how far it is from a shape that can be cut."""

    kind: str
    num_rows: int
    num_units: int
    """In a row."""
    target: int
    """Units to keep in each row."""
    fewest_open: int
    """In the row that keeps fewest, expected mode."""
    most_open: int
    """In the row that keeps most, expected mode."""
    num_changed: int
    """Gates that rounding to the target changes."""
    num_undecided: int
    """Gates whose chance to be open lies between the bounds of `census.UNDECIDED`."""
    expected_open: float
    """Units of a row that the masks expect to keep, mean over rows."""

    @property
    def num_gates(self) -> int:
        """Gates of the kind."""
        return self.num_rows * self.num_units


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskReading:
    """Everything that is to be said of a pruning run's masks."""

    source: ModelShape
    target: ModelShape
    log_alpha: Mapping[str, Tensor]
    """Whole masks by kind, [num_rows, num_units]."""
    expected: KeptUnits
    exact: KeptUnits
    kinds: Mapping[str, KindSummary]

    @classmethod
    def of(
        cls, log_alpha: Mapping[str, Tensor], source: ModelShape, target: ModelShape
    ) -> MaskReading:
        """Read whole masks, [num_rows, num_units] by kind, of the way from source to target."""
        targets = target_units(source, target)
        expected = expected_gates(log_alpha)
        kinds = {
            kind: KindSummary(
                kind=kind,
                num_rows=log_alpha[kind].shape[0],
                num_units=log_alpha[kind].shape[1],
                target=targets[kind],
                fewest_open=census.fewest_open,
                most_open=census.most_open,
                num_changed=census.rounded,
                num_undecided=census.undecided,
                expected_open=census.expected_size,
            )
            for kind, census in take_census(log_alpha, expected, targets).items()
        }
        return cls(
            source=source,
            target=target,
            log_alpha=dict(log_alpha),
            expected=KeptUnits.of(expected, source),
            exact=KeptUnits.of(exact_gates(log_alpha, targets), source),
            kinds=kinds,
        )

    def kept(self, mode: Mode) -> KeptUnits:
        """What stays in one mode."""
        return self.exact if mode == "exact" else self.expected

    def gates(self, mode: Mode) -> dict[str, Tensor]:
        """Deterministic gates by kind, [num_rows, num_units], 0 where closed."""
        if mode == "expected":
            return expected_gates(self.log_alpha)
        return exact_gates(self.log_alpha, target_units(self.source, self.target))
