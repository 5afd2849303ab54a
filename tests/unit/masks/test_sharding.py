"""Penalty and mask optimizer over shards, summed by hand, against the whole (law 1c)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.mask_set import MaskSet
from megashear.masks.optimizer import MULTIPLIERS, MaskOptimizer, clip_factor
from megashear.masks.targets import MaskPart, target_units, whole_parts
from megashear.shape import ModelShape
from tests.unit.masks.test_targets import GQA, MHA, WIDE

LAW_1C = 1e-9  # relative; float64, summed in another order, through Adam at lr 1.0
STEPS = 6

TARGETS = {
    "mha": (
        MHA,
        replace(
            MHA, num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=4,
            ffn_hidden_size=64,
        ),
    ),
    "both": (
        WIDE,
        replace(
            WIDE, num_layers=2, hidden_size=32, num_attention_heads=12, num_query_groups=4,
            ffn_hidden_size=48,
        ),
    ),
    "groups": (
        GQA,
        replace(
            GQA, num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2,
            ffn_hidden_size=48,
        ),
    ),
}  # fmt: skip

Reduce = Callable[[str, list[list[Tensor]]], Tensor]


def add_up(kind: str, grid: list[list[Tensor]]) -> Tensor:
    """Sum ``grid[pp][tp]`` over the shards that hold different parts of ``kind``."""
    if kind in ("hidden", MULTIPLIERS):
        return grid[0][0]
    columns = 1 if kind == "layer" else len(grid[0])
    return torch.stack([shard for row in grid for shard in row[:columns]]).sum(dim=0)


def one_flat_sum(kind: str, grid: list[list[Tensor]]) -> Tensor:
    """Sum as if each tensor rank held another part of the layer mask."""
    return add_up("head" if kind == "layer" else kind, grid)


def shard(part: MaskPart, pp: int, pp_size: int, tp: int, tp_size: int) -> MaskPart:
    """Return parts with layers in turn, as for virtual stages of one layer, and units in runs."""
    if part.kind == "hidden":
        return part
    if part.kind == "layer":
        return replace(part, units=tuple(range(pp, part.num_units, pp_size)))
    if part.kind == "head" and part.num_rows == 4 * 8:  # WIDE: a row for each group
        own = range(tp * 8 // tp_size, (tp + 1) * 8 // tp_size)
        layers = range(pp, 4, pp_size)
        return replace(part, rows=tuple(8 * layer + group for layer in layers for group in own))
    width = part.num_units // tp_size
    return replace(
        part,
        rows=tuple(range(pp, part.num_rows, pp_size)),
        units=range(tp * width, (tp + 1) * width),
    )


class Shards:
    """All processes of a layout, one after the other, with the reductions done by hand."""

    def __init__(
        self,
        shapes: tuple[ModelShape, ModelShape],
        pp_size: int = 1,
        tp_size: int = 1,
        *,
        reduce_sums: Reduce = add_up,
        reduce_norm: Reduce = add_up,
    ) -> None:
        self.reduce_sums, self.reduce_norm = reduce_sums, reduce_norm
        self.whole = whole_parts(*shapes)
        self.masks = [
            [
                MaskSet(
                    {k: shard(p, pp, pp_size, tp, tp_size) for k, p in self.whole.items()},
                    dtype=torch.float64,
                )
                for tp in range(tp_size)
            ]
            for pp in range(pp_size)
        ]
        self.constraints = [
            [
                SparsityConstraint(
                    masks.parts, target_units(*shapes), warmup_steps=3, dtype=torch.float64
                )
                for masks in stage
            ]
            for stage in self.masks
        ]
        self.optimizers = [
            [MaskOptimizer(m, c) for m, c in zip(*pair)]
            for pair in zip(self.masks, self.constraints)
        ]

    def step(self, step: int) -> float:
        own = [[masks.closed_sums() for masks in stage] for stage in self.masks]
        whole = {
            kind: self.reduce_sums(
                kind,
                [
                    [self.rows(masks.parts[kind], sums[kind].detach()) for masks, sums in zip(*s)]
                    for s in zip(self.masks, own)
                ],
            )
            for kind in self.whole
        }
        values = set()
        for masks, constraints, sums in zip(self.masks, self.constraints, own):
            for m, c, s in zip(masks, constraints, sums):
                penalty = c.penalty(s, whole, step)
                (penalty + self.model_loss(m, step)).backward()
                values.add(penalty.item())
        assert len(values) == 1  # bit-equal on every process
        squares = [[o.grad_square_sums() for o in stage] for stage in self.optimizers]
        norm = math.sqrt(
            sum(
                float(self.reduce_norm(kind, [[s[kind] for s in stage] for stage in squares]))
                for kind in squares[0][0]
            )
        )
        for optimizer in (o for stage in self.optimizers for o in stage):
            optimizer.step(1.0, grad_scale=clip_factor(norm))
            optimizer.zero_grad()
        return values.pop()

    def rows(self, part: MaskPart, sums: Tensor) -> Tensor:
        whole = torch.zeros(part.num_rows, dtype=torch.float64)
        whole[list(part.rows)] = sums
        return whole

    def model_loss(self, masks: MaskSet, step: int) -> Tensor:
        """Return a loss that is linear in log_alpha, with a slope for each unit of a whole mask."""
        loss = torch.zeros((), dtype=torch.float64)
        for number, (kind, part) in enumerate(masks.parts.items()):
            generator = torch.Generator().manual_seed(10 * step + number)
            slopes = torch.randn(part.num_rows, part.num_units, generator=generator).double()
            own = slopes[list(part.rows)][:, list(part.units)]
            loss = loss + 0.05 * (own * masks.log_alpha[kind]).sum()
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return all state put together from all shards; copies must be bit-equal."""
        whole: dict[str, Tensor] = {}
        for masks, constraint, optimizer in self.each():
            moments = optimizer.state_tensors()
            for kind, part in masks.parts.items():
                for name in (kind, f"{kind}.exp_avg", f"{kind}.exp_avg_sq"):
                    empty = torch.full((part.num_rows, part.num_units), torch.nan).double()
                    values = whole.setdefault(name, empty)
                    at = (torch.tensor(part.rows)[:, None], torch.tensor([*part.units]))
                    own = masks.log_alpha[kind].detach() if name == kind else moments[name]
                    assert bool((values[at].isnan() | (values[at] == own)).all())
                    values[at] = own
            scalars: Mapping[str, Tensor] = constraint.state_dict() | {
                name: moment for name, moment in moments.items() if name.startswith("lambda")
            }
            for name, value in scalars.items():
                assert torch.equal(whole.setdefault(name, value.clone()), value)
        return whole

    def each(self) -> list[tuple[MaskSet, SparsityConstraint, MaskOptimizer]]:
        return [
            trio
            for stage in zip(self.masks, self.constraints, self.optimizers)
            for trio in zip(*stage)
        ]


def worst_error(found: Shards, wanted: Shards) -> float:
    worst = 0.0
    for step in range(STEPS):
        penalty, reference = found.step(step), wanted.step(step)
        worst = max(worst, abs(penalty - reference) / (abs(reference) or 1.0))
        state, reference_state = found.state(), wanted.state()
        assert state.keys() == reference_state.keys()
        for name, tensor in reference_state.items():
            scale = float(tensor.norm()) or 1.0
            worst = max(worst, float((state[name] - tensor).norm()) / scale)
    return worst


@pytest.mark.parametrize(("pp", "tp"), [(1, 2), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("shapes", TARGETS.values(), ids=TARGETS.keys())
def test_shards_step_as_the_whole(shapes: tuple[ModelShape, ModelShape], pp: int, tp: int) -> None:
    whole = Shards(shapes)
    assert worst_error(Shards(shapes, pp, tp), whole) < LAW_1C
    moved = whole.state()
    assert all(float(moved[kind].std()) > 0.01 for kind in whole.whole)  # there was much to lose


def over_stages_only(kind: str, grid: list[list[Tensor]]) -> Tensor:
    """Sum as if one tensor rank held all rows."""
    return add_up("layer" if kind == "head" else kind, grid)


@pytest.mark.parametrize("broken", ["reduce_sums", "reduce_norm"])
def test_shard_parity_notices_rows_of_groups_that_do_not_cross_tensor_ranks(broken: str) -> None:
    shapes = TARGETS["both"]
    shards = Shards(shapes, 1, 2, **{broken: over_stages_only})  # type: ignore[arg-type]
    assert worst_error(shards, Shards(shapes)) > 1e4 * LAW_1C


@pytest.mark.parametrize("broken", ["reduce_sums", "reduce_norm"])
def test_shard_parity_notices_a_replicated_mask_counted_twice(broken: str) -> None:
    shapes = TARGETS["mha"]
    shards = Shards(shapes, 1, 2, **{broken: one_flat_sum})  # type: ignore[arg-type]
    assert worst_error(shards, Shards(shapes)) > 1e4 * LAW_1C


@pytest.mark.parametrize(("target", "pp", "tp"), [("mha", 2, 1), ("both", 1, 2)])
def test_shard_parity_notices_a_mean_over_own_rows(
    target: str, pp: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dividing by the rows held here instead of the global number."""
    shapes = TARGETS[target]
    wanted, found = Shards(shapes), Shards(shapes, pp, tp)
    whole_penalty = SparsityConstraint.penalty

    def penalty(
        self: SparsityConstraint, own: dict[str, Tensor], whole: dict[str, Tensor], step: int
    ) -> Tensor:
        scaled = {
            kind: sums * self.parts[kind].num_rows / len(self.parts[kind].rows)
            for kind, sums in own.items()
        }
        return whole_penalty(self, scaled, whole, step)

    monkeypatch.setattr(SparsityConstraint, "penalty", penalty)
    assert worst_error(found, wanted) > 1e4 * LAW_1C


def test_gradients_of_the_penalty_are_exact_slices_and_need_no_other_shard() -> None:
    shapes = TARGETS["mha"]
    whole, shards = Shards(shapes), Shards(shapes, 2, 2)
    grads = []
    for layout in (whole, shards):
        layout.step(0)
        layout.step(1)
        for masks, constraint, _ in layout.each():
            for log_alpha in masks.parameters():
                log_alpha.data.uniform_(-2, 2, generator=torch.Generator().manual_seed(1))
            for multiplier in constraint.parameters():
                multiplier.data.fill_(0.7)
    part = shards.masks[1][0].parts["intermediate"]
    own = whole.masks[0][0].log_alpha["intermediate"].detach()[list(part.rows)][:, list(part.units)]
    shards.masks[1][0].log_alpha["intermediate"].data.copy_(own)
    sums = whole.masks[0][0].closed_sums()
    detached = {kind: s.detach() for kind, s in sums.items()}
    for masks, constraint, own_sums in (
        (whole.masks[0][0], whole.constraints[0][0], sums),
        (shards.masks[1][0], shards.constraints[1][0], shards.masks[1][0].closed_sums()),
    ):
        penalty = constraint.penalty(own_sums, detached, 2)
        (grad,) = torch.autograd.grad(penalty, masks.log_alpha["intermediate"])
        grads.append(grad)
    torch.testing.assert_close(
        grads[1], grads[0][list(part.rows)][:, list(part.units)], rtol=LAW_1C, atol=0
    )
