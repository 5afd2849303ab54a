"""Which units of a model the gates keep, and the number of parameters that this leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.masks.kinds import HIDDEN, KINDS, LAYER, ON_AXIS
from megashear.models import weight_table
from megashear.models.fold import unit_values
from megashear.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptUnits:
    """The units of a model that gates keep: True or False for each unit, or the chance to be kept.

    A unit is pruned with the unit that it is part of: a query head with its key/value head, and
    heads and neurons with their layer, however open their own gates are.
    """

    source: ModelShape
    """Shape of the model that is pruned."""
    units: Mapping[str, Tensor]
    """A value for each unit by kind of mask: [L, units of a layer], or [1, units] for kinds whose
    units belong to no layer. Heads are in the row of their layer, grouped or not."""

    @classmethod
    def of(cls, gates: Mapping[str, Tensor], source: ModelShape) -> KeptUnits:
        """Return the units that deterministic gates keep, as booleans.

        Args:
            gates: whole gates by kind, [num_rows, num_units], 0 where closed; an absent kind keeps
                all its units. With grouped queries head is [L * G, H/G].
            source: shape of the masked model.
        """
        found = cls.expected({kind: (gate != 0).double() for kind, gate in gates.items()}, source)
        return cls(source=source, units={kind: kept != 0 for kind, kept in found.units.items()})

    @classmethod
    def expected(cls, chances: Mapping[str, Tensor], source: ModelShape) -> KeptUnits:
        """Return the chance of every unit to be kept, float64, where gates open independently.

        Args:
            chances: the chance of each gate to be open, shaped like the gates of `of`.
            source: shape of the masked model.
        """
        given = {kind: chance.double() for kind, chance in chances.items()}
        values = unit_values(given, source, source.num_layers)
        units = {}
        for name, kind in KINDS.items():
            everything = torch.ones(kind.extents(source), dtype=torch.float64)
            units[name] = values.get(kind.pruned_by(source).name, everything)
            if kind.per_layer and LAYER in values:
                units[name] = units[name] * values[LAYER].T
        return cls(source=source, units=units)

    @property
    def kept_layers(self) -> list[int]:
        """Return the numbers of the layers that are kept, from 0."""
        found: list[int] = self.units[LAYER][0].nonzero().flatten().tolist()
        return found

    @property
    def removed_layers(self) -> list[int]:
        """Return the numbers of the layers that are pruned, from 0."""
        found: list[int] = (self.units[LAYER][0] == 0).nonzero().flatten().tolist()
        return found

    def of_kind(self, kind: str) -> Tensor:
        """Return the units of a kind of mask in the rows of its gates, [num_rows, num_units]."""
        return self.units[kind].reshape(-1, KINDS[kind].row_length(self.source, self.source))

    def num_params(self) -> int:
        """Return the number of parameters kept; layers may keep different numbers of units."""
        return round(self.expected_params())

    def expected_params(self, wanted: str = ".*") -> float:
        """Return the number of parameters kept, or its expectation where units are chances.

        It is a sum of products of sums: outer products of chances would take gigabytes at 7B.

        Args:
            wanted: pattern of the Hugging Face names of the weights to count.
        """
        lengths = {kind: kept.double().sum(-1).tolist() for kind, kept in self.units.items()}
        layers = self.units[LAYER][0].double().tolist()
        total = 0.0
        for name, weight, layer in weight_table.weights(self.source):
            if not re.fullmatch(wanted, name):
                continue
            size, has_units = 1.0, False
            for axis in weight.axes:
                kind = ON_AXIS.get(axis)
                if kind is None:
                    size *= weight_table.AXES[axis](self.source)
                    continue
                assert layer is not None or not kind.per_layer, f"{axis} outside the layers"
                row = layer if layer is not None and kind.per_layer else 0
                size *= lengths[kind.name][row] * kind.unit_width(self.source)
                has_units |= kind.per_layer
            if layer is not None and not has_units:  # units of a layer have its value in them
                size *= layers[layer]
            total += size
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, from 0, of the kept units by kept layer, for JSON."""

        def numbers(row: Tensor) -> list[int]:
            found: list[int] = row.nonzero().flatten().tolist()
            return found

        found: dict[str, Any] = {
            "parameters": self.num_params(),
            HIDDEN: numbers(self.units[HIDDEN][0]),
            "layers": self.kept_layers,
        }
        for name, kind in KINDS.items():
            if kind.per_layer:
                rows = {layer: numbers(self.units[name][layer]) for layer in self.kept_layers}
                found[f"{kind.units} by layer"] = rows
        return found
