"""Compare two models: their descriptions, masks and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint.details import PASSING
from megashear.models import weight_table
from megashear.report.kept import MaskReading, Mode
from megashear.report.open_model import OpenModel
from megashear.shape import ModelShape

COMPARED_AT_ONCE = 2**22
"""Values of two weights that are compared in float64 at a time, 64 MiB for both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A field that two models say differently."""

    field: str
    """With dots: ``shape.hidden_size``."""
    first: Any
    """None where the first does not have it."""
    second: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class GateDifference:
    """Gates of one row of a mask that two pruning runs, or two times of one, see differently."""

    kind: str
    row: int
    """Row of the whole mask, from 0: a layer; 0 of hidden and layer; of head with grouped queries
    the layer times G plus the group."""
    only_first: list[int]
    """Units, from 0, that the first keeps and the second does not."""
    only_second: list[int]
    """Units that the second keeps and the first does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDistance:
    """How far apart two weights of one name are."""

    name: str
    """In Hugging Face's layout."""
    norm: float
    """Of the first, ||a||."""
    distance: float
    """||a - b||"""
    largest: float
    """Largest difference of two values."""

    @property
    def relative(self) -> float:
        """||a - b|| / ||a||; infinite where the first is zero and the second is not."""
        if self.distance == 0:
            return 0.0
        return self.distance / self.norm if self.norm else math.inf


def differing_fields(first: OpenModel, second: OpenModel) -> list[Difference]:
    """Return the fields in which the descriptions of two models differ.

    States that change with every step (those of schedule, loader and guard) are left out.
    """
    return list(_differences(_fields(first), _fields(second)))


def check_comparable(first: MaskReading, second: MaskReading) -> str | None:
    """Return why masks cannot be compared gate by gate; None where they can."""
    for kind in first.kinds.keys() | second.kinds.keys():
        sizes = [
            None
            if kind not in reading.kinds
            else (reading.kinds[kind].num_rows, reading.kinds[kind].num_units)
            for reading in (first, second)
        ]
        if sizes[0] != sizes[1]:
            shown = " and ".join(
                "no such mask" if size is None else f"{size[0]} x {size[1]} gates" for size in sizes
            )
            return f"their {kind} masks differ: {shown}"
    return None


def differing_gates(
    first: MaskReading, second: MaskReading, mode: Mode = "exact"
) -> list[GateDifference]:
    """Return the rows of masks in which different units are kept, by kind and row.

    Args:
        first: masks.
        second: masks of the same kinds and sizes, see `check_comparable`.
        mode: which gates to compare.
    """
    found = []
    for kind, rows in _open_gates(first, mode).items():
        for row, (a, b) in enumerate(zip(rows, _open_gates(second, mode)[kind])):
            if not torch.equal(a, b):
                found.append(
                    GateDifference(
                        kind=kind,
                        row=row,
                        only_first=(a & ~b).nonzero().flatten().tolist(),
                        only_second=(b & ~a).nonzero().flatten().tolist(),
                    )
                )
    return found


def same_shapes(first: ModelShape, second: ModelShape) -> bool:
    """Return whether two models have the same weights, of the same sizes."""
    return weight_table.hf_shapes(first) == weight_table.hf_shapes(second)


def weight_distances(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    shape: ModelShape,
    *,
    progress: Callable[[], object] = lambda: None,
) -> list[WeightDistance]:
    """Return the distance of every weight of two models of the same shape.

    In memory is one parameter of each, not the model.

    Args:
        first: weights by Hugging Face name, read when they are asked for.
        second: of the same names.
        shape: of both.
        progress: called after each weight.
    """
    found = []
    for name, _, _ in weight_table.weights(shape):  # what is fused is asked for one after the other
        found.append(_distance(name, first[name], second[name]))
        progress()
    return found


def _distance(name: str, a: Tensor, b: Tensor) -> WeightDistance:
    a, b = a.flatten(), b.flatten()
    norm = distance = largest = 0.0
    for begin in range(0, len(a), COMPARED_AT_ONCE):
        part = slice(begin, begin + COMPARED_AT_ONCE)
        one = a[part].double()
        apart = one - b[part].double()
        norm += float(one.square().sum())
        distance += float(apart.square().sum())
        # not max(), which passes over what is not a number
        largest = float(torch.stack([apart.abs().amax(), torch.tensor(largest).double()]).amax())
    return WeightDistance(
        name=name, norm=math.sqrt(norm), distance=math.sqrt(distance), largest=largest
    )


def _open_gates(reading: MaskReading, mode: Mode) -> dict[str, Tensor]:
    """Return each kind's own open gates, [num_rows, num_units], whatever other kinds close."""
    return {kind: gates != 0 for kind, gates in reading.gates(mode).items()}


def _fields(opened: OpenModel) -> dict[str, Any]:
    values: dict[str, Any] = {"shape": opened.shape.to_dict()}
    if opened.description is not None:
        values |= asdict(opened.description)
        values["details"] = {k: v for k, v in values["details"].items() if k not in PASSING}
    return values


def _differences(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> Iterator[Difference]:
    """Fields that differ, by name; what only one has is one field, however much there is in it."""
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield Difference(field=prefix + name, first=a, second=b)
