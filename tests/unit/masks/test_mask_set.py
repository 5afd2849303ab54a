from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.gates import LOG_ALPHA_MAX, uniform_noise
from megashear.masks.kinds import KINDS
from megashear.masks.mask_set import MaskSet, exact_gates
from megashear.masks.optimizer import MaskOptimizer
from megashear.masks.targets import target_units, whole_parts
from tests.unit.masks.test_targets import MHA

TARGET = replace(
    MHA, num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=4, ffn_hidden_size=64
)


def test_masks_start_open_on_the_cpu_in_float32_and_in_one_order() -> None:
    parts = whole_parts(MHA, TARGET)
    masks = MaskSet(dict(reversed(parts.items())))  # another order must not reorder collectives
    assert list(masks.log_alpha) == list(masks.parts) == [k for k in KINDS if k in parts]
    for log_alpha in masks.parameters():
        assert log_alpha.dtype == torch.float32
        assert log_alpha.device.type == "cpu"
        assert (log_alpha == torch.tensor(LOG_ALPHA_MAX)).all()


def test_sampled_gates_are_hard_concrete_values_of_the_rows_noise() -> None:
    masks = MaskSet(whole_parts(MHA, TARGET))
    with torch.no_grad():
        masks.log_alpha["head"].fill_(0.5)
    z = masks.sample(seed=1, step=2, stream=3)["head"]
    for row in range(4):
        noise = uniform_noise(8, seed=1, step=2, stream=3, kind="head", row=row)
        logit = noise.log() - (1 - noise).log() + 0.5
        wanted = (1.2 / (1 + (-1.5 * logit).exp()) - 0.1).clamp(0, 1)
        torch.testing.assert_close(z[row], wanted, rtol=1e-5, atol=1e-6)  # float32 logarithms
    z.sum().backward()
    grad = masks.log_alpha["head"].grad
    assert grad is not None
    assert torch.equal(grad != 0, (z > 0) & (z < 1))


def test_exact_gates_keep_the_target_in_every_row() -> None:
    parts = whole_parts(MHA, TARGET)
    torch.manual_seed(0)
    whole = {k: torch.randn(part.num_rows, part.num_units) for k, part in parts.items()}
    targets = target_units(MHA, TARGET)
    for kind, z in exact_gates(whole, targets).items():
        assert ((z > 0).sum(dim=1) == targets[kind]).all()
        for gates, log_alpha in zip(z, whole[kind]):
            assert log_alpha[gates > 0].min() > log_alpha[gates == 0].max()
    with pytest.raises(AssertionError, match="hidden"):
        exact_gates(whole, {"hidden": 24})


def test_a_process_without_rows_of_a_kind_takes_part() -> None:
    """A stage without layers must still step its multipliers like other stages."""
    parts = whole_parts(MHA, TARGET)
    held = {
        kind: part if kind == "hidden" else replace(part, **{axis: ()})
        for kind, part in parts.items()
        for axis in ("units" if kind == "layer" else "rows",)
    }
    whole, empty = MaskSet(parts), MaskSet(held)
    sums = whole.closed_sums()
    lambdas = []
    for masks in (whole, empty):
        constraint = SparsityConstraint(masks.parts, target_units(MHA, TARGET), warmup_steps=1)
        optimizer = MaskOptimizer(masks, constraint)
        constraint.penalty(masks.closed_sums(), sums, 5).backward()
        optimizer.step(1.0)
        lambdas.append(constraint.state_dict())
        assert set(masks.sample(seed=0, step=0, stream=0)) == set(parts)
    assert lambdas[0] == lambdas[1]
    assert all(value != 0 for value in lambdas[0].values())
