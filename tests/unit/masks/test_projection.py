from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megashear.masks import projection
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.gates import LOG_ALPHA_MAX, LOG_ALPHA_MIN
from megashear.masks.mask_set import MaskSet
from megashear.masks.optimizer import MULTIPLIERS, MaskOptimizer, clip_factor
from megashear.masks.projection import ROUNDS, next_shift, row_sums
from megashear.masks.targets import target_units, whole_parts
from tests.unit.masks.test_targets import MHA

TARGET = replace(
    MHA, num_layers=3, hidden_size=24, num_attention_heads=5, num_query_groups=5, ffn_hidden_size=40
)
FLOAT64 = 1e-12  # absolute, of numbers near 1
LEFT_OVER = 1e-3  # of sparsity, after ROUNDS of Newton's method from where a step of Adam led
CONVERGED = 12  # rounds after which any row is at its target
BISECTED = 1e-6  # of log_alpha; flat rows magnify what 60 halvings leave of sparsity
START = 0.0021  # sparsity of the upper clamp, from which every run starts


def closed_in_words(log_alpha: float) -> float:
    return 1 / (1 + math.exp(log_alpha - 2 / 3 * math.log(0.1 / 1.1)))


def bisected(row: list[float], target: float) -> list[float]:
    """Return the row, shifted to the target by halving an interval: another method."""

    def shifted(by: float) -> list[float]:
        return [min(max(value + by, -math.log(100)), math.log(100)) for value in row]

    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        sparsity = math.fsum(map(closed_in_words, shifted(middle))) / len(row)
        low, high = (middle, high) if sparsity > target else (low, middle)
    return shifted(low)


def scattered(seed: int, dtype: torch.dtype = torch.float64) -> MaskSet:
    """Return masks in the middle of pruning, many of them at a clamp."""
    masks = MaskSet(whole_parts(MHA, TARGET), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for log_alpha in masks.parameters():
        drawn = 1 + 4 * torch.randn(log_alpha.shape, generator=generator, dtype=dtype)
        log_alpha.data.copy_(drawn.clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX))
    return masks


def project(masks: MaskSet, targets: Mapping[str, float], rounds: int = ROUNDS) -> None:
    """Project in one process, which holds whole rows."""
    projection.project(masks, targets, lambda own: own, rounds=rounds)


def worst_distance(rounds: int = CONVERGED) -> float:
    """Return how far projected rows are from bisected ones."""
    worst = 0.0
    for seed in range(3):
        masks = scattered(seed)
        before = {kind: mask.tolist() for kind, mask in masks.log_alpha.items()}
        sparsity = {
            kind: torch.tensor([[*map(closed_in_words, row)] for row in rows]).mean().item()
            for kind, rows in before.items()
        }
        # as much as a step of Adam at rate 1.0 can move it, up and down
        targets = {kind: now + (0.1 if seed % 2 else -0.1) for kind, now in sparsity.items()}
        project(masks, targets, rounds)
        for kind, rows in before.items():
            wanted = torch.tensor([bisected(row, targets[kind]) for row in rows])
            worst = max(worst, float((masks.log_alpha[kind].detach() - wanted).abs().max()))
    return worst


def test_projected_rows_equal_bisected_ones() -> None:
    assert worst_distance() < BISECTED


def test_projection_parity_notices_a_missing_round_and_slopes_of_clamped_gates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert worst_distance(rounds=1) > 1e4 * BISECTED

    def every_gate(log_alpha: Tensor, shift: Tensor) -> Tensor:
        closed = row_sums(log_alpha, shift)[:, 0]
        clamped = (log_alpha.detach() + shift[:, None]).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX)
        chance = torch.sigmoid(2 / 3 * math.log(0.1 / 1.1) - clamped)
        return torch.stack([closed, *[(chance * (1 - chance)).sum(dim=1)] * 2], dim=1)

    monkeypatch.setattr(projection, "row_sums", every_gate)
    assert worst_distance(rounds=4) > 1e4 * BISECTED


def test_row_sums_equal_a_formula_written_out() -> None:
    masks = scattered(5)
    for log_alpha in masks.parameters():
        shift = torch.linspace(-1, 1, len(log_alpha), dtype=torch.float64)
        moved = (log_alpha.detach() + shift[:, None]).tolist()
        for row, found in zip(moved, row_sums(log_alpha, shift)):
            most = math.log(100)
            chance = [closed_in_words(min(max(value, -most), most)) for value in row]
            falls = [p * (1 - p) for p, a in zip(chance, row) if -most < a <= most]
            rises = [p * (1 - p) for p, a in zip(chance, row) if -most <= a < most]
            wanted = [math.fsum(chance), math.fsum(falls), math.fsum(rises)]
            assert found.tolist() == pytest.approx(wanted, rel=FLOAT64, abs=FLOAT64)
    assert int(sum((m == LOG_ALPHA_MAX).sum() for m in masks.parameters())) > 10


def test_gates_at_a_clamp_of_float32_can_leave_it() -> None:
    bounds = torch.tensor([[LOG_ALPHA_MIN, LOG_ALPHA_MAX]])  # float32
    (at_min, at_max) = (p * (1 - p) for p in map(closed_in_words, bounds[0].tolist()))
    ((_, down, up),) = row_sums(bounds, torch.zeros(1, dtype=torch.float64)).tolist()
    assert (down, up) == pytest.approx((at_max, at_min), rel=1e-6)  # float32 rounds the clamps


def test_equal_gates_reach_any_target_in_one_round() -> None:
    for target in (0.003, 0.01, 0.05):
        start = torch.full((2, 7), LOG_ALPHA_MAX, dtype=torch.float64)
        shift = next_shift(row_sums(start, torch.zeros(2)), 7, target)
        wanted = bisected([LOG_ALPHA_MAX] * 7, target)[0] - LOG_ALPHA_MAX
        assert shift.tolist() == pytest.approx([max(wanted, -2.0)] * 2, abs=1e-9)  # halved 60 times


def test_shards_sum_to_the_whole_row() -> None:
    whole = scattered(6).log_alpha["intermediate"]
    shift = torch.linspace(-1, 1, len(whole), dtype=torch.float64)
    halves = row_sums(whole[:, :40], shift) + row_sums(whole[:, 40:], shift)
    torch.testing.assert_close(halves, row_sums(whole, shift), rtol=FLOAT64, atol=0)


def test_a_shift_keeps_the_order_that_the_model_made() -> None:
    masks = scattered(7, torch.float32)
    before = {kind: mask.detach().clone() for kind, mask in masks.log_alpha.items()}
    project(masks, dict.fromkeys(before, 0.6))
    for kind, old in before.items():
        new = masks.log_alpha[kind].detach()
        assert not torch.equal(new, old)
        order = old.argsort(dim=1, stable=True)
        assert (new.gather(1, order).diff(dim=1) >= 0).all(), kind


@pytest.mark.parametrize(
    ("target", "bound"), [(0.0, LOG_ALPHA_MAX), (1.0, LOG_ALPHA_MIN), (0.99, LOG_ALPHA_MIN)]
)
def test_a_target_beyond_the_clamps_stands_for_the_nearest(target: float, bound: float) -> None:
    masks = scattered(8, torch.float32)
    project(masks, dict.fromkeys(masks.log_alpha, target), rounds=40)
    assert all((mask - bound).abs().max() < 0.01 for mask in masks.parameters())


# The whole mask phase: a made-up model that wants gates open, some more than others


def widest_gap(steps: int, *, projected: bool) -> dict[str, tuple[float, float]]:
    """Return how far expected sparsity was above and below its target, by kind."""
    parts, units = whole_parts(MHA, TARGET), target_units(MHA, TARGET)
    masks = MaskSet(parts)
    constraint = SparsityConstraint(parts, units, warmup_steps=steps // 5)
    optimizer = MaskOptimizer(masks, constraint, ascend=not projected)
    generator = torch.Generator().manual_seed(steps)
    worth = {k: torch.rand(mask.shape, generator=generator) for k, mask in masks.log_alpha.items()}
    gaps: dict[str, list[float]] = {kind: [] for kind in parts}
    for step in range(steps):
        sums = masks.closed_sums()
        target = constraint.target_at(step)
        for kind, sparsity in constraint.expected_sparsity(sums).items():
            gaps[kind].append(sparsity - target[kind])
        loss = -sum(
            (worth[kind] * z).mean()
            for kind, z in masks.sample(seed=1, step=step, stream=0).items()
        )
        if not projected:
            loss = loss + constraint.penalty(sums, sums, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        norm = math.sqrt(sum(map(float, optimizer.grad_square_sums().values())))
        warm = min(1.0, step / (steps // 10))
        rate = warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.step(rate, grad_scale=clip_factor(norm))
        if projected:
            project(masks, constraint.target_at(step + 1))
    return {kind: (max(found), -min(found)) for kind, found in gaps.items()}


@pytest.mark.parametrize("steps", [20, 60, 200])
def test_projected_masks_follow_their_target_at_any_length(steps: int) -> None:
    for kind, (above, below) in widest_gap(steps, projected=True).items():
        assert above < START, kind
        assert below < LEFT_OVER, kind


def test_the_lagrangian_overshoots_in_a_short_run() -> None:
    """The twin: the same run, in which multipliers push and nothing damps them."""
    for above, below in widest_gap(60, projected=False).values():
        assert max(above, below) > 0.15


def test_multipliers_stay_where_they_are_without_a_penalty() -> None:
    masks = scattered(9)
    constraint = SparsityConstraint(masks.parts, target_units(MHA, TARGET), warmup_steps=1)
    optimizer = MaskOptimizer(masks, constraint, ascend=False)
    for log_alpha in masks.parameters():
        log_alpha.grad = torch.ones_like(log_alpha)
    assert optimizer.grad_square_sums()[MULTIPLIERS] == 0
    optimizer.step(1.0)
    assert not any(constraint.state_dict().values())
    moments = optimizer.state_tensors()
    assert all(bool(moments[name].any()) != name.startswith("lambda") for name in moments)
    with pytest.raises(AssertionError, match="was the penalty added"):
        MaskOptimizer(masks, constraint).step(1.0)
