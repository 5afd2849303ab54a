from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megashear.config import MaskConfig
from megashear.masks import constraint as constraint_module
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.mask_set import MaskSet
from megashear.masks.targets import target_units, whole_parts
from tests.live import fill
from tests.unit.masks import golden
from tests.unit.masks.test_targets import MHA, WIDE

FLOAT32 = 2e-6  # relative, or absolute on sparsities; the reference sums and cancels in float32
STEPS = (0, 3, 10, 50)


def golden_masks() -> tuple[MaskSet, SparsityConstraint]:
    source, target = golden.shape("base"), golden.shape("target")
    parts = whole_parts(source, target)
    masks = MaskSet(parts)
    constraint = SparsityConstraint(
        parts, target_units(source, target), warmup_steps=golden.facts()["warmup"]
    )
    fill(masks.state_dict(), golden.log_alpha())
    fill(
        constraint.state_dict(),
        {
            f"lambda{n}.{kind}": golden.tensors()[f"lambda.lambda_{n}_{kind}"]
            for n in (1, 2)
            for kind in parts
        },
    )
    return masks, constraint


def golden_errors(step: int) -> dict[str, float]:
    masks, constraint = golden_masks()
    sums = masks.closed_sums()
    penalty = constraint.penalty(sums, sums, step)
    penalty.backward()
    facts = golden.facts()[f"lagrangian@{step}"]
    errors = {"total": abs(penalty.item() - facts["total"])}
    for kind, sparsity in constraint.expected_sparsity(sums).items():
        errors[f"s.{kind}"] = abs(sparsity - facts[f"expected_{kind}_sparsity"])
        errors[f"t.{kind}"] = abs(
            constraint.target_at(step)[kind] - facts[f"target_{kind}_sparsity"]
        )
    found: dict[str, Tensor | None] = {k: p.grad for k, p in masks.log_alpha.items()}
    found |= {
        name.replace(".", "_").replace("lambda", "lambda_"): parameter.grad
        for name, parameter in constraint.named_parameters().items()
    }
    for name, grad in found.items():
        assert grad is not None
        wanted = golden.tensors()[f"lag_grad@{step}.{name}"]
        errors[name] = golden.relative_error(grad, wanted.reshape(grad.shape))
    return errors


@pytest.mark.parametrize("step", STEPS)
def test_penalty_and_its_gradients_equal_the_reference(step: int) -> None:
    errors = golden_errors(step)
    assert len(errors) == 1 + 4 * 5
    assert max(errors.values()) < FLOAT32, errors


def one_row_per_kind(self: SparsityConstraint, own: object, whole: object, step: int) -> Tensor:
    """Return the penalty of the mean row instead of the mean of the rows' penalties."""
    total = torch.zeros((), dtype=torch.float64)
    for kind, part in self.parts.items():
        gap = own[kind].mean() / part.num_units - self.target_at(step)[kind]  # type: ignore[index]
        total = total + self.lambda1[kind] * gap + self.lambda2[kind] * gap**2
    return total


def no_warmup(self: SparsityConstraint, step: int) -> dict[str, float]:
    return self.targets


@pytest.mark.parametrize(
    ("name", "broken"), [("penalty", one_row_per_kind), ("target_at", no_warmup)]
)
def test_penalty_parity_notices_a_break(
    name: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparsityConstraint, name, broken)
    assert max(golden_errors(3).values()) > 100 * FLOAT32


def test_penalty_equals_a_formula_written_out() -> None:
    masks, constraint = golden_masks()
    wanted = 0.0
    for kind, log_alpha in masks.log_alpha.items():
        first, second = constraint.lambda1[kind].item(), constraint.lambda2[kind].item()
        t = constraint.targets[kind] * 0.7
        terms = []
        for row in log_alpha.tolist():
            closed = [1 / (1 + math.exp(a - 2 / 3 * math.log(0.1 / 1.1))) for a in row]
            gap = math.fsum(closed) / len(row) - t
            terms.append(first * gap + second * gap**2)
        wanted += math.fsum(terms) / len(terms)
    sums = masks.closed_sums()
    found = constraint.penalty(sums, sums, 7).item()
    assert found == pytest.approx(wanted, rel=1e-12)  # float64 throughout


def heads_in_groups() -> tuple[MaskSet, SparsityConstraint]:
    target = replace(WIDE, num_attention_heads=12, num_query_groups=4)
    parts = whole_parts(WIDE, target)
    masks = MaskSet(parts)
    constraint = SparsityConstraint(parts, target_units(WIDE, target), warmup_steps=0)
    torch.manual_seed(4)
    for log_alpha in masks.parameters():
        log_alpha.data.copy_(3 * torch.randn(log_alpha.shape))
    for number, multiplier in enumerate(constraint.parameters()):
        multiplier.data.fill_(0.3 + number)
    return masks, constraint


def test_penalty_of_heads_is_a_mean_over_the_groups_of_all_layers() -> None:
    masks, constraint = heads_in_groups()
    closed = {
        kind: torch.sigmoid(2 / 3 * math.log(0.1 / 1.1) - log_alpha.detach().double())
        for kind, log_alpha in masks.log_alpha.items()
    }
    in_groups = closed["head"].view(4, 8, 4)  # 4 layers, 8 groups, 4 heads: 3 of them are kept

    def penalty(kind: str, sparsity: Tensor, target: float) -> float:
        gap = sparsity - target
        first, second = constraint.lambda1[kind].item(), constraint.lambda2[kind].item()
        return float((first * gap + second * gap**2).mean())

    groups = penalty("group", closed["group"].mean(dim=1), 0.5)
    wanted = groups + penalty("head", in_groups.mean(dim=2), 0.25)
    sums = masks.closed_sums()
    assert constraint.penalty(sums, sums, 0).item() == pytest.approx(wanted, rel=1e-12)
    # the twin: a row for each layer, in which closed and open groups compensate
    by_layer = groups + penalty("head", in_groups.mean(dim=(1, 2)), 0.25)
    assert by_layer != pytest.approx(wanted, rel=0.01)


def build(**settings: object) -> SparsityConstraint:
    target = replace(MHA, hidden_size=24)
    return SparsityConstraint(
        whole_parts(MHA, target), target_units(MHA, target), **({"warmup_steps": 10} | settings)
    )  # type: ignore[arg-type]


def test_target_grows_over_the_warmup() -> None:
    constraint = build(warmup_steps=4)
    grown = [constraint.target_at(step)["hidden"] for step in (0, 1, 2, 4, 100)]
    assert grown == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4])
    assert build(warmup_steps=0).target_at(0) == {"hidden": pytest.approx(0.4)}


def test_multipliers_start_at_nothing_in_float32() -> None:
    state = build().state_dict()
    assert list(state) == ["lambda1.hidden", "lambda2.hidden"]
    assert all(value.dtype == torch.float32 and value == 0 for value in state.values())


def test_reachable_range_is_computed_from_the_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_module, "LOG_ALPHA_MAX", 0.0)
    target = replace(MHA, hidden_size=36)
    message = r"masks reach 0.1682 to 0.9529; the nearest --target-hidden-size is 33"
    with pytest.raises(ValueError, match=message):
        SparsityConstraint(whole_parts(MHA, target), target_units(MHA, target), warmup_steps=1)


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="--sparsity-warmup-iters is -1; wanted 0 to"):
        MaskConfig(sparsity_warmup_iters=-1)
    assert MaskConfig(sparsity_warmup_iters=0).sparsity_warmup_iters == 0


@pytest.mark.parametrize("bound", [99.0, 0.0, -5.0, math.nan])
def test_a_bound_that_loses_control_is_refused_unless_forced(bound: float) -> None:
    with pytest.raises(ValueError, match=f"lambda2_max is {bound:g}; below 100 .*or force it with"):
        build(lambda2_max=bound)
    assert build(lambda2_max=None).lambda2_max is None
    assert build(lambda2_max=100.0).lambda2_max == 100.0
    assert build(lambda2_max=10.0, force=True).lambda2_max == 10.0
