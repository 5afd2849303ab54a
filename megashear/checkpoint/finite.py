"""Find numbers that are not finite in a checkpoint's tensors, before saving and after loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megashear.models.finite import NonFiniteNumber, first_not_finite
from megashear.parallel.agree import gather_objects


def not_finite_anywhere(state: dict[str, Any]) -> NonFiniteNumber | None:
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
    """Return an index in the whole tensor; of a factory, in its own part."""
    if not isinstance(entry, ShardedTensor):
        return place
    ahead = len(entry.global_offset) - len(place)
    own = zip(entry.global_offset[ahead:], place)
    return (*entry.global_offset[:ahead], *(start + index for start, index in own))
