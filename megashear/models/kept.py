"""Which units of a model the gates keep, and how many parameters that leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.masks.targets import EXTENTS, KINDS
from megashear.models import layout
from megashear.shape import ModelShape

UNITS = {"query": "heads", "key_value": "groups", "intermediate": "neurons"}
"""Units of a layer by the axis of its weights that they are on."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptUnits:
    """What is kept of a model, unit by unit: True, or the chance that it is.

    A unit is kept with all that it stands in: a head goes with its key/value head, and heads and
    neurons go with their layer, however open their own gates are.
    """

    source: ModelShape
    """The model as it is now."""
    hidden: Tensor
    """[h]"""
    layers: Tensor
    """[L]"""
    heads: Tensor
    """[L, H]"""
    groups: Tensor
    """[L, G]"""
    neurons: Tensor
    """[L, I]"""

    @classmethod
    def of(cls, gates: Mapping[str, Tensor], source: ModelShape) -> KeptUnits:
        """Return what deterministic gates keep, as booleans.

        Args:
            gates: whole gates by kind, [num_rows, num_units], 0 where closed; an absent kind keeps
                all. With grouped queries head comes as [L * G, H/G].
            source: the model they are of.
        """
        found = cls.expected({kind: (gate != 0).double() for kind, gate in gates.items()}, source)
        return cls(
            source=source,
            hidden=found.hidden != 0,
            layers=found.layers != 0,
            heads=found.heads != 0,
            groups=found.groups != 0,
            neurons=found.neurons != 0,
        )

    @classmethod
    def expected(cls, chances: Mapping[str, Tensor], source: ModelShape) -> KeptUnits:
        """Return the chance of every unit to be kept, float64, where gates open independently.

        Args:
            chances: of each gate to be open, shaped like the gates of `of`.
            source: the model they are of.
        """
        opened = {}
        for kind in KINDS:
            extent = getattr(source, EXTENTS[kind])
            rows = 1 if kind in ("hidden", "layer") else source.num_layers
            given = chances.get(kind)
            opened[kind] = (
                torch.ones(rows, extent, dtype=torch.float64)
                if given is None
                else given.double().reshape(rows, extent)
            )
        layers = opened["layer"][0]
        groups = opened["group"] * layers[:, None]
        if source.heads_per_group == 1:  # a head and its key/value head are one unit
            groups = heads = opened["head"] * groups
        else:
            heads = opened["head"] * groups.repeat_interleave(source.heads_per_group, dim=1)
        return cls(
            source=source,
            hidden=opened["hidden"][0],
            layers=layers,
            heads=heads,
            groups=groups,
            neurons=opened["intermediate"] * layers[:, None],
        )

    @property
    def kept_layers(self) -> list[int]:
        """Numbers of the layers that are kept, from 0."""
        found: list[int] = self.layers.nonzero().flatten().tolist()
        return found

    @property
    def removed_layers(self) -> list[int]:
        """Numbers of the layers that are pruned, from 0."""
        found: list[int] = (self.layers == 0).nonzero().flatten().tolist()
        return found

    def of_kind(self, kind: str) -> Tensor:
        """Return the units of a kind of mask in the rows of its gates, [num_rows, num_units]."""
        units = {
            "hidden": self.hidden[None],
            "layer": self.layers[None],
            "head": self.heads,
            "group": self.groups,
            "intermediate": self.neurons,
        }[kind]
        if kind == "head" and self.source.heads_per_group > 1:
            return units.reshape(-1, self.source.heads_per_group)  # [L * G, H/G]
        return units

    def num_params(self) -> int:
        """Return the parameters of what is kept, rows of all layers as they are, equal or not."""
        return round(self.expected_params())

    def expected_params(self, wanted: str = ".*") -> float:
        """Return the parameters of what is kept, where that is a chance the expected number.

        A product of sums: outer products of the chances would take gigabytes at 7B.

        Args:
            wanted: pattern of the Hugging Face names of the weights to count.
        """
        lengths = {name: getattr(self, name).double().sum(-1).tolist() for name in UNITS.values()}
        layers, hidden = self.layers.double().tolist(), float(self.hidden.double().sum())
        total = 0.0
        for name, weight, layer in layout.weights(self.source):
            if not re.fullmatch(wanted, name):
                continue
            size = 1.0
            for axis in weight.axes:
                if axis == "hidden":
                    size *= hidden
                elif axis in UNITS:
                    assert layer is not None, f"{axis} outside the layers"
                    width = 1 if axis == "intermediate" else self.source.head_dim
                    size *= lengths[UNITS[axis]][layer] * width
                else:
                    size *= layout.AXES[axis](self.source)
            if layer is not None and not UNITS.keys() & {*weight.axes}:
                size *= layers[layer]  # units have it already
            total += size
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of the kept units, from 0, for JSON, by layer that is kept."""

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
