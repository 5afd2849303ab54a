"""Masks and multipliers alone at 7B shapes, against the trace of docs/algorithm.md, section 4.

Without a model's gradient all units of a kind start equal and stay equal. A run of 7B is then one
shard of one unit per kind beside num_rows * num_units - 1 shards like it: the real code for one
shard, with the reductions over the others written as products. The reduction is itself tested
against whole masks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.mask_set import MaskSet
from megashear.masks.optimizer import MULTIPLIERS, MaskOptimizer, clip_factor
from megashear.masks.targets import MaskPart, target_units, whole_parts
from megashear.shape import PRESETS, ModelShape
from tests.unit.masks.test_targets import MHA

STEPS, LR_WARMUP, LR_FLOOR, SPARSITY_WARMUP = 3200, 320, 0.1, 640

# Published with the trace, which oscillates around the end of the warm-up: there the order of a sum
# decides the phase of the oscillation.
TOLERANCES = {320: 0.002, 640: 0.02, 1600: 0.02, 3199: 0.003}
TRACES = {
    "llama2-2.7b": {
        320: {"head": 0.1745, "intermediate": 0.1729, "hidden": 0.2050},
        640: {"head": 0.3742, "intermediate": 0.3776, "hidden": 0.3788},
        1600: {"head": 0.3765, "intermediate": 0.3763, "hidden": 0.3794},
        3199: {"head": 0.3748, "intermediate": 0.3730, "hidden": 0.3743},
    },
    "llama2-1.3b": {
        320: {"head": 0.2529, "intermediate": 0.2451, "layer": 0.1268, "hidden": 0.2586},
        640: {"head": 0.4916, "intermediate": 0.5095, "layer": 0.2568, "hidden": 0.5104},
        3199: {"head": 0.4997, "intermediate": 0.4992, "layer": 0.2494, "hidden": 0.5001},
    },
}

REDUCTION = 1e-6  # relative; products for sums in float64, float32 where sigmoids round unalike


def cosine(step: int) -> float:
    if step < LR_WARMUP:
        return step / LR_WARMUP
    progress = (step - LR_WARMUP) / (STEPS - LR_WARMUP)
    return LR_FLOOR + (1 - LR_FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def first_unit(part: MaskPart) -> MaskPart:
    return replace(part, rows=(0,), units=range(1))


def trace(
    source: ModelShape,
    target: ModelShape,
    num_steps: int,
    *,
    whole: bool = False,
    sparsity_warmup: int = SPARSITY_WARMUP,
    max_norm: float = 1.0,
    count_shards: bool = True,
) -> list[dict[str, float]]:
    """Return the expected sparsity by kind before each step, and the multipliers then."""
    everything = whole_parts(source, target)
    parts = everything if whole else {k: first_unit(part) for k, part in everything.items()}
    shards = {
        kind: 1 if whole else part.num_rows * part.num_units for kind, part in everything.items()
    } | {MULTIPLIERS: 1}
    masks = MaskSet(parts)
    constraint = SparsityConstraint(
        parts, target_units(source, target), warmup_steps=sparsity_warmup, lambda2_max=None
    )
    optimizer = MaskOptimizer(masks, constraint)
    found = []
    for step in range(num_steps):
        own = masks.closed_sums()
        sums = own
        if not whole:
            sums = {k: (s * parts[k].num_units).expand(parts[k].num_rows) for k, s in own.items()}
        multipliers = {name: value.item() for name, value in constraint.state_dict().items()}
        found.append(constraint.expected_sparsity(sums) | multipliers)
        constraint.penalty(own, sums, step).backward()
        squares = optimizer.grad_square_sums()
        counts = shards if count_shards else dict.fromkeys(shards, 1)
        norm = math.sqrt(sum(float(square) * counts[kind] for kind, square in squares.items()))
        optimizer.step(cosine(step), grad_scale=clip_factor(norm, max_norm))
        optimizer.zero_grad()
    return found


def worst_excess(found: list[dict[str, float]], target: str) -> float:
    """Return the largest distance from the published trace, in tolerances."""
    return max(
        abs(found[step][kind] - sparsity) / TOLERANCES[step]
        for step, row in TRACES[target].items()
        for kind, sparsity in row.items()
        if step < len(found)
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("target", TRACES)
def test_controller_follows_the_published_trace(target: str) -> None:
    found = trace(PRESETS["llama2-7b"], PRESETS[target], STEPS)
    assert worst_excess(found, target) <= 1.0


@pytest.mark.parametrize("broken", [{"sparsity_warmup": 660}, {"max_norm": 1e9}])
def test_trace_notices_a_setting(broken: dict[str, float]) -> None:
    found = trace(PRESETS["llama2-7b"], PRESETS["llama2-2.7b"], 321, **broken)  # type: ignore[arg-type]
    assert worst_excess(found, "llama2-2.7b") > 2.0


def reduction_error(source: ModelShape, target: ModelShape, num_steps: int, **how: bool) -> float:
    reduced = trace(source, target, num_steps, **how)  # type: ignore[arg-type]
    whole = trace(source, target, num_steps, whole=True)
    return max(
        abs(reduced[step][name] - value) / (abs(value) or 1.0)
        for step in range(num_steps)
        for name, value in whole[step].items()
    )


TINY = replace(
    MHA, num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=4, ffn_hidden_size=64
)
CLIPPED = 300  # steps after which the tiny run has met the clip norm, too


def test_one_unit_stands_for_all_of_them() -> None:
    assert reduction_error(MHA, TINY, CLIPPED) < REDUCTION
    assert reduction_error(PRESETS["llama2-7b"], PRESETS["llama2-1.3b"], 4) < REDUCTION


def test_reduction_notices_a_norm_over_one_shard() -> None:
    assert reduction_error(MHA, TINY, CLIPPED, count_shards=False) > 100 * REDUCTION
