"""Find numbers that are not finite, in tensors and in what a checkpoint is about to hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megashear.parallel.agree import gather_objects


class NotFinite(NamedTuple):
    """Where a number is not finite, and what it is."""

    name: str
    """Of the tensor."""
    place: tuple[int, ...]
    """Index of the element in the tensor as a whole."""
    value: float
    """NaN or an infinity."""

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.place))}] is {self.value}"


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> NotFinite | None:
    """Find the first number that is NaN or infinite; None where all are finite.

    Each tensor is read once where it lies, and nothing as large as it is made.

    Args:
        named: tensors by the name to report, any device and dtype; integers are always finite.
    """
    for name, tensor in named:
        tensor = tensor.detach()
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # NaN and infinities both come through a largest magnitude
        if math.isfinite(float(torch.linalg.vector_norm(tensor, math.inf))):
            continue
        place = (~torch.isfinite(tensor)).nonzero()[0]
        return NotFinite(name, tuple(place.tolist()), float(tensor[tuple(place)]))
    return None


def not_finite_anywhere(state: dict[str, Any]) -> NotFinite | None:
    """Find a number that is not finite in any rank's share of a checkpoint.

    Collective over the world.

    Args:
        state: sharded state dict, as `Saver.save` takes it.

    Returns:
        The first one of the lowest rank that has one, equal on every rank.
    """
    own = None
    for entry in _entries(state):
        if (own := first_not_finite([(entry.key, entry.data)])) is not None:
            own = own._replace(place=_in_the_whole(entry, own.place))
            break
    return next((found for found in gather_objects(own) if found is not None), None)


def _entries(state: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        for each in state:
            yield from _entries(each)
    elif isinstance(state, ShardedTensor | ShardedTensorFactory):
        yield state


def _in_the_whole(
    entry: ShardedTensor | ShardedTensorFactory, place: tuple[int, ...]
) -> tuple[int, ...]:
    """Index in the whole tensor; a factory's is that of its own part."""
    if not isinstance(entry, ShardedTensor):
        return place
    ahead = len(entry.global_offset) - len(place)
    own = zip(entry.global_offset[ahead:], place)
    return (*entry.global_offset[:ahead], *(start + index for start, index in own))
