"""Find numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LOOKED_AT_ONCE = 2**24
"""Values that are searched at a time, in a tensor with a number that is not finite."""


class NonFiniteNumber(NamedTuple):
    """A number that is not finite, and its place."""

    name: str
    """Name of the tensor."""
    place: tuple[int, ...]
    """Index of the number in the whole tensor, from 0."""
    value: float
    """NaN or an infinity."""

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.place))}] is {self.value}"


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> NonFiniteNumber | None:
    """Find the first number that is NaN or infinite; None where all are finite.

    Each tensor is read where it lies, and no copy as large as a tensor is made.

    Args:
        named: tensors and the names to report, on any device, in any number format; integers are
            finite.
    """
    for name, tensor in named:
        tensor = tensor.detach()
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # NaN and infinities show in the smallest or the largest number
        if all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
            continue
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), _LOOKED_AT_ONCE):
            found = torch.isfinite(flat[start : start + _LOOKED_AT_ONCE]).logical_not_().nonzero()
            if len(found):
                at = start + int(found[0])
                return NonFiniteNumber(name, _unravel(at, tensor.shape), float(flat[at]))
    return None


def _unravel(at: int, extents: Sequence[int]) -> tuple[int, ...]:
    """Return the index in a tensor of a place in its flattened form."""
    place: list[int] = []
    for extent in reversed(extents):
        at, index = divmod(at, extent)
        place.insert(0, index)
    return tuple(place)
