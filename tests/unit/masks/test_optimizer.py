from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.gates import LOG_ALPHA_MAX, LOG_ALPHA_MIN
from megashear.masks.mask_set import MaskSet
from megashear.masks.optimizer import MULTIPLIERS, MaskOptimizer, clip_factor
from megashear.masks.targets import target_units, whole_parts
from tests.live import fill
from tests.unit.masks.test_targets import MHA

TARGET = replace(MHA, num_layers=3, hidden_size=24, ffn_hidden_size=64)
FLOAT64 = 1e-12  # absolute, of values near 1: float64 operations in another order


class Run:
    """One process that prunes MHA to TARGET, with the same made-up model gradient each time."""

    def __init__(self, dtype: torch.dtype = torch.float32, lambda2_max: float | None = 500) -> None:
        parts = whole_parts(MHA, TARGET)
        self.masks = MaskSet(parts, dtype=dtype)
        self.constraint = SparsityConstraint(
            parts, target_units(MHA, TARGET), warmup_steps=4, lambda2_max=lambda2_max, dtype=dtype
        )
        self.optimizer = MaskOptimizer(self.masks, self.constraint)

    def backward(self, step: int) -> None:
        self.optimizer.zero_grad()
        sums = self.masks.closed_sums()
        generator = torch.Generator().manual_seed(step)
        loss = self.constraint.penalty(sums, sums, step)
        for log_alpha in self.masks.parameters():
            loss = loss + (log_alpha * torch.randn(log_alpha.shape, generator=generator)).sum()
        loss.backward()

    def train(self, steps: range) -> None:
        for step in steps:
            self.backward(step)
            self.optimizer.step(0.1 * (step + 1), grad_scale=0.5)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.masks.log_alpha | self.constraint.named_parameters()

    def state(self) -> dict[str, Tensor]:
        state = self.masks.state_dict() | self.constraint.state_dict()
        return {
            name: tensor.clone()
            for name, tensor in (state | self.optimizer.state_tensors()).items()
        }


def adam_error(*, second_decay: float = 0.95, ascent: float = -1.0) -> float:
    """Return the largest difference of five steps from a written-out Adam with these settings."""
    run, worst = Run(torch.float64), 0.0
    first = {name: torch.zeros_like(p).detach() for name, p in run.parameters().items()}
    second = {name: zeros.clone() for name, zeros in first.items()}
    wanted = {name: p.detach().clone() for name, p in run.parameters().items()}
    for step in range(5):
        run.backward(step)
        for name, parameter in run.parameters().items():
            assert parameter.grad is not None
            grad = 0.5 * parameter.grad * (ascent if name.startswith("lambda") else 1)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = second_decay * second[name] + (1 - second_decay) * grad**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            square = second[name] / (1 - second_decay ** (step + 1))
            moved = wanted[name] - 0.1 * (step + 1) * mean / (square.sqrt() + 1e-8)
            if name.startswith("lambda2"):
                moved = moved.clamp(0, 500)
            elif not name.startswith("lambda1"):
                moved = moved.clamp(-math.log(100), math.log(100))
            wanted[name] = moved
        run.optimizer.step(0.1 * (step + 1), grad_scale=0.5)
        for name, parameter in run.parameters().items():
            worst = max(worst, float((parameter.detach() - wanted[name]).abs().max()))
    assert run.optimizer.num_steps == 5
    assert max(log_alpha.min().item() for log_alpha in run.masks.parameters()) < 4  # they moved
    return worst


def test_steps_equal_adam_written_out() -> None:
    assert adam_error() < FLOAT64


def test_adam_parity_notices_a_decay_and_a_sign() -> None:
    assert adam_error(second_decay=0.951) > 1e6 * FLOAT64
    assert adam_error(ascent=1.0) > 1e6 * FLOAT64


def test_multipliers_ascend_and_log_alpha_descends() -> None:
    """Two small steps from the same place raise, or lower, the penalty to first order."""
    for side in ("lambda", "mask"):
        run = Run(torch.float64)
        run.train(range(4))
        run.optimizer.zero_grad()
        sums = run.masks.closed_sums()
        before = run.constraint.penalty(sums, sums, 9)
        before.backward()
        kept = {name: p.detach().clone() for name, p in run.parameters().items()}
        fill(
            run.optimizer.state_tensors(),
            {name: torch.zeros_like(t) for name, t in run.optimizer.state_tensors().items()},
        )
        run.optimizer.step(1e-4)
        with torch.no_grad():
            for name, parameter in run.parameters().items():
                if name.startswith("lambda") != (side == "lambda"):
                    parameter.copy_(kept[name])
        sums = run.masks.closed_sums()
        after = run.constraint.penalty(sums, sums, 9)
        assert (after.item() > before.item()) == (side == "lambda")


def test_masters_are_clamped() -> None:
    run = Run(lambda2_max=150.0)
    for log_alpha in run.masks.parameters():
        log_alpha.grad = torch.ones_like(log_alpha)
    for parameter in run.constraint.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step(1000.0)
    low = torch.tensor(LOG_ALPHA_MIN)
    assert all((log_alpha == low).all() for log_alpha in run.masks.parameters())
    assert all(value == 150.0 for value in run.constraint.lambda2.values())
    assert all(value > 900.0 for value in run.constraint.lambda1.values())  # lambda1 is free
    run = Run()
    for parameter in run.parameters().values():
        parameter.grad = -torch.ones_like(parameter)
    run.optimizer.step(1000.0)
    high = torch.tensor(LOG_ALPHA_MAX)
    assert all((log_alpha == high).all() for log_alpha in run.masks.parameters())
    assert all(value == 0.0 for value in run.constraint.lambda2.values())
    assert all(value < -900.0 for value in run.constraint.lambda1.values())


def test_without_a_bound_lambda2_is_free() -> None:
    run = Run(lambda2_max=None)
    for parameter in run.parameters().values():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step(1000.0)
    assert all(value > 900.0 for value in run.constraint.lambda2.values())


def test_grad_square_sums_give_the_norm_over_everything() -> None:
    run = Run(torch.float64)
    run.train(range(2))
    run.backward(2)
    sums = run.optimizer.grad_square_sums()
    assert list(sums) == ["hidden", "intermediate", "layer", MULTIPLIERS]
    norm = math.sqrt(sum(float(value) for value in sums.values()))
    grads = [parameter.grad for parameter in run.parameters().values()]
    assert norm == pytest.approx(
        float(torch.cat([g.flatten() for g in grads if g is not None]).norm()), rel=FLOAT64
    )
    scaled = clip_factor(norm) * norm
    clipped = float(nn.utils.clip_grad_norm_(run.parameters().values(), 1.0))
    assert clipped == pytest.approx(norm, rel=FLOAT64)
    assert scaled == pytest.approx(
        math.sqrt(sum(float(v) for v in run.optimizer.grad_square_sums().values())), rel=FLOAT64
    )


def test_clip_factor_never_enlarges_and_keeps_nan() -> None:
    assert clip_factor(0.0) == 1.0
    assert clip_factor(0.5) == 1.0
    assert clip_factor(4.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(4.0, max_norm=2.0) == pytest.approx(0.5, rel=1e-6)
    assert clip_factor(math.inf) == 0.0
    assert math.isnan(clip_factor(math.nan))


def resumed(*, with_steps: bool) -> Run:
    first = Run()
    first.train(range(3))
    second = Run()
    fill(second.masks.state_dict(), {k: t.clone() for k, t in first.masks.state_dict().items()})
    fill(second.constraint.state_dict(), first.constraint.state_dict())
    fill(second.optimizer.state_tensors(), first.optimizer.state_tensors())
    if with_steps:
        second.optimizer.num_steps = first.optimizer.num_steps
    second.train(range(3, 6))
    return second


def test_a_resumed_run_is_bit_equal() -> None:
    straight = Run()
    straight.train(range(6))
    again = resumed(with_steps=True)
    assert again.optimizer.num_steps == straight.optimizer.num_steps == 6
    for name, tensor in straight.state().items():
        assert torch.equal(again.state()[name], tensor), name


def test_resume_notices_a_forgotten_step_count() -> None:
    straight = Run()
    straight.train(range(6))
    again = resumed(with_steps=False)
    assert not torch.equal(again.state()["hidden"], straight.state()["hidden"])


def test_moments_exist_before_the_first_step_and_are_shaped_like_their_parameters() -> None:
    run = Run()
    shapes = {name: list(tensor.shape) for name, tensor in run.optimizer.state_tensors().items()}
    assert shapes["intermediate.exp_avg"] == [4, 96]
    assert shapes["lambda1.hidden.exp_avg_sq"] == []
    assert len(shapes) == 2 * (3 + 6)
    assert run.optimizer.num_steps == 0


def test_a_step_without_gradients_is_ours_to_prevent() -> None:
    with pytest.raises(AssertionError, match="hidden has no gradient"):
        Run().optimizer.step(1.0)
    with pytest.raises(AssertionError, match="no gradient yet"):
        Run().optimizer.grad_square_sums()
