"""Cut a model in memory: weights, float32 masters and Adam's moments, at any layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megashear.checkpoint.cut import cut
from megashear.checkpoint.optimizer_state import (
    OptimizerShard,
    count_steps,
    optimizer_shards,
    start_state,
)
from megashear.models import weight_table
from megashear.models.llama import names_in_whole, unwrap
from megashear.parallel.agree import (
    broadcast_tensor,
    flat_all_reduce,
    gather_objects,
    gather_tensors,
)
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape

WEIGHT = "weight"
POWERS = {WEIGHT: 1, "exp_avg": -1, "exp_avg_sq": -2}
"""Quantities that are cut, and the power of the folded gates that each is multiplied by.

The masked model computes with W * g, the cut one with one tensor V = W * g. By the chain rule
dL/dW = g dL/dV: the mean of V's gradients is that of W's over g, and the mean of their squares is
that of W's over g squared. Adam's step, the first mean over the root of the second, is then equal
for V and W.
"""


class ModelAndOptimizer(NamedTuple):
    """A model, its optimizer, and where this rank stands."""

    chunks: Sequence[torch.nn.Module]
    """This rank's chunks of the model."""
    optimizer: MegatronOptimizer
    """Optimizer of the weights of ``chunks``."""
    shape: ModelShape
    """Extents of the whole model."""
    groups: ParallelGroups
    """Where this rank stands."""


def cut_in_flight(
    old: ModelAndOptimizer, new: ModelAndOptimizer, gates: Mapping[str, Tensor]
) -> None:
    """Fill a smaller model and its optimizer with what the gates leave open of a larger one.

    Each tensor is made whole in every replica, cut by `checkpoint.cut.cut`, and sliced for the new
    model's stages and shards, at any layout. Memory beside the two models is that of one layer's
    largest tensor. Collective over the world.

    Args:
        old: the larger model; its optimizer has stepped at least once.
        new: the smaller model, of the target's shape; its optimizer has not stepped.
        gates: whole deterministic gates by kind, equal on every rank; see `cut`.

    Raises:
        ValueError: on every rank, if a row of gates keeps more or fewer units than the target.
    """
    had = _parameters(old)
    _start_state(new.optimizer, old)
    gets = _parameters(new)
    for quantity, power in POWERS.items():
        whole = _WholeWeights(_Quantity(had, quantity, old.groups), old.shape, old.groups)
        smaller = cut(whole, gates, old.shape, new.shape, power=power)
        _fill(gets, quantity, smaller, new.shape, new.groups)


class _Parameter(NamedTuple):
    """What this rank holds of a parameter."""

    live: Tensor
    """The parameter, which the model computes with."""
    steps: OptimizerShard | None
    """Elements that this rank's optimizer steps, and their state; None where only other replicas
    step the parameter."""

    def quantity(self, name: str) -> Tensor | None:
        """Return a quantity of `POWERS` for the elements that this rank steps."""
        if self.steps is None:
            return None
        return (self.steps.main if name == WEIGHT else self.steps.state[name]).detach()


_Parameters = dict[str, _Parameter]
"""Parameters by Megatron name, with global layer numbers."""


def _parameters(model: ModelAndOptimizer) -> _Parameters:
    steps = optimizer_shards(model.optimizer)
    found: _Parameters = {}
    for gpt in map(unwrap, model.chunks):
        parameters = dict(gpt.named_parameters())
        for own_name, name in names_in_whole(gpt, model.shape).items():
            parameter = parameters[own_name]
            found[name] = _Parameter(parameter, steps.get(id(parameter)))
    return found


def _start_state(optimizer: MegatronOptimizer, old: ModelAndOptimizer) -> None:
    """Give every new parameter an optimizer state, at the step of the old optimizer."""
    shards = optimizer_shards(optimizer).values()
    assert not any(shard.state for shard in shards), "it has stepped already"
    # a rank of a sharded optimizer may step nothing of a small model
    num_steps = max(gather_objects(count_steps(old.optimizer), old.groups.data))
    assert num_steps > 0, "the optimizer has not stepped yet"
    start_state(optimizer, num_steps)


class _Quantity(Mapping[str, Tensor]):
    """One quantity of this rank's parameters, gathered where replicas share the state.

    Ranks of a data-parallel group must ask for the same names in the same order.
    """

    def __init__(self, own: _Parameters, quantity: str, groups: ParallelGroups) -> None:
        self._own, self._quantity, self._groups = own, quantity, groups
        everywhere = all(
            parameter.steps is not None and parameter.steps.main.shape == parameter.live.shape
            for parameter in own.values()
        )
        self._shared = not all(gather_objects(everywhere, groups.data))

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._own[name]
        held = parameter.quantity(self._quantity)
        if not self._shared:
            assert held is not None, "without sharing every rank steps all it has"
            return held
        whole = torch.zeros_like(parameter.live, dtype=torch.float32)
        if held is not None and parameter.steps is not None:
            start = parameter.steps.start
            whole.view(-1)[start : start + held.numel()] = held.reshape(-1)
        (whole,) = flat_all_reduce([whole], self._groups.data)  # one has it, the others zeros
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class _WholeWeights(Mapping[str, Tensor]):
    """Whole weights by Hugging Face name, on the host, from the shards of a replica's ranks.

    Every rank of the model group must ask for the same names in the same order. Weights that
    Megatron fuses are made whole together: ask for q, k, v one after the other.
    """

    def __init__(
        self, own: Mapping[str, Tensor], shape: ModelShape, groups: ParallelGroups
    ) -> None:
        self._own, self._shape, self._groups = own, shape, groups
        self._owners = weight_table.owners(shape)
        self._stages: dict[str, int] = {}
        for stage, names in enumerate(gather_objects(sorted(own), groups.pipeline)):
            for name in names:
                self._stages.setdefault(name, stage)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        row, layer = self._owners[name]
        fused = row.name.format(layer=layer)
        if self._last[0] != fused:
            parts = self._whole_parts(row, fused)
            names = [part.hf_name.format(layer=layer) for part in row.parts]
            self._last = (fused, dict(zip(names, parts)))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def _whole_parts(self, row: weight_table.MegatronTensor, fused: str) -> list[Tensor]:
        groups, stage = self._groups, self._stages[fused]
        parts: list[Tensor | None] = [None] * len(row.parts)
        if groups.pipeline_rank == stage:
            shards = gather_tensors(self._own[fused], groups.tensor)
            local = weight_table.shape_of_shard(self._shape, groups.tensor_size)
            by_rank = [weight_table.split(row, shard, local) for shard in shards]
            parts = [
                _join(part, [of_rank[number] for of_rank in by_rank], self._shape)
                for number, part in enumerate(row.parts)
            ]
        return [
            broadcast_tensor(whole, part.extents(self._shape), stage, groups.pipeline).cpu()
            for part, whole in zip(row.parts, parts)
        ]


@torch.no_grad()
def _fill(
    own: _Parameters,
    quantity: str,
    wholes: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    groups: ParallelGroups,
) -> None:
    """Copy this rank's slices of whole weights, by Hugging Face name, into its shards."""
    owners = weight_table.owners(shape)
    local = weight_table.shape_of_shard(shape, groups.tensor_size)
    pending: dict[str, list[Tensor]] = {}
    filled = set()
    for name, whole in wholes:  # every rank takes all of them: ranks make each one together
        row, layer = owners[name]
        fused = row.name.format(layer=layer)
        if fused not in own:
            continue
        # slice a part
        parts = pending.setdefault(fused, [])
        part = row.parts[len(parts)]
        assert part.hf_name.format(layer=layer) == name, "parts come in the table's order"
        live = own[fused].live
        parts.append(_slice(part, whole, live, groups))
        # fill the fused tensor
        if len(parts) == len(row.parts):
            value = weight_table.fuse(row, pending.pop(fused), local).to(live.device)
            held, steps = own[fused].quantity(quantity), own[fused].steps
            if held is not None and steps is not None:
                stretch = value.reshape(-1)[steps.start : steps.start + held.numel()]
                held.copy_(stretch.view_as(held))
            if quantity == WEIGHT:
                live.copy_(value)  # rounds to bfloat16
            filled.add(fused)
    assert filled == set(own), sorted(set(own) - filled)


def _split_axis(part: weight_table.Weight) -> int | None:
    for axis, name in enumerate(part.axes):
        if name in weight_table.SPLIT_AXES:
            return axis
    return None


def _join(part: weight_table.Weight, shards: Sequence[Tensor], shape: ModelShape) -> Tensor:
    axis = _split_axis(part)
    if axis is None:
        return shards[0]
    # a vocabulary padded to divide ends in rows that no token reads
    return torch.cat(list(shards), dim=axis).narrow(axis, 0, part.extents(shape)[axis])


def _slice(part: weight_table.Weight, whole: Tensor, own: Tensor, groups: ParallelGroups) -> Tensor:
    axis = _split_axis(part)
    if axis is None:
        return whole
    if part.axes[axis] == "vocab":
        padding = len(own) * groups.tensor_size - len(whole)
        whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
    return whole.chunk(groups.tensor_size, dim=axis)[groups.tensor_rank]
