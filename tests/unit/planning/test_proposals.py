"""Shapes proposed for a budget, against all shapes of a small model and against published ones."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megashear.commands.parse import parse
from megashear.config import BudgetConfig, CutConfig, PlanConfig, TargetConfig
from megashear.masks.target_flags import target_shape
from megashear.masks.targets import target_units
from megashear.models.loadable import why_refused
from megashear.planning.budget import kv_bytes, weight_bytes
from megashear.planning.proposal_tables import shape_lines
from megashear.planning.published import PUBLISHED
from megashear.planning.shapes import Shapes, make_shapes
from megashear.shape import PRESETS, ModelShape

SEVEN, EIGHT = PRESETS["llama2-7b"], PRESETS["llama3.1-8b"]
SMALL = ModelShape(
    num_layers=6,
    hidden_size=48,
    num_attention_heads=12,
    num_query_groups=6,
    head_dim=6,
    ffn_hidden_size=80,
    vocab_size=32,
)
"""Multiples of 16 in width and neurons, and heads of 6 that fill 1.5 times the width."""


def shapes(source: ModelShape = SEVEN, **flags: Any) -> Shapes:
    budget = {name: flags.pop(name) for name in [*flags] if name.startswith("budget_")}
    config = PlanConfig(model="given", budget=BudgetConfig(**budget), **flags)
    names = TargetConfig.__dataclass_fields__
    return make_shapes(
        config, source, TargetConfig(**{name: getattr(config, name) for name in names})
    )


@pytest.mark.parametrize("size", ["1.3b", "2.7b"])
def test_the_published_shape_is_among_the_first_five(size: str) -> None:
    found = shapes(budget_params=float(size[:3]) * 1e9).found
    published = PRESETS[f"llama2-{size}"]
    assert published in [one.shape for one in found[:5]]
    assert found[0].shape == published


def reachable(source: ModelShape) -> list[ModelShape]:
    """Return every shape with widths and neurons in steps of 16 that masks reach."""
    steps = (
        range(1, source.num_layers + 1),
        range(16, source.hidden_size + 1, 16),
        [
            (groups * each, groups)
            for groups in range(1, source.num_query_groups + 1)
            for each in range(1, source.heads_per_group + 1)
        ],
        range(16, source.ffn_hidden_size + 1, 16),
    )
    found = [
        replace(
            source,
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=groups,
            ffn_hidden_size=neurons,
        )
        for layers, hidden, (heads, groups), neurons in itertools.product(*steps)
    ]
    return [shape for shape in found if shape != source]


def distance(shape: ModelShape, source: ModelShape, aimed: float) -> float:
    """Return the distance as docs/choosing-a-shape.md defines it, written once more."""
    heads = shape.num_attention_heads * source.hidden_size / shape.hidden_size
    parts = [shape.num_params() / aimed]
    if shape.num_attention_heads != source.num_attention_heads:
        parts.append(heads / source.num_attention_heads)
    parts.append(
        shape.ffn_hidden_size / shape.hidden_size * source.hidden_size / source.ffn_hidden_size
    )
    flat = shape.hidden_size / shape.num_layers * source.num_layers / source.hidden_size
    parts.append(flat / min(1.0, max(0.6, flat)))
    kept = shape.num_query_groups / source.num_query_groups
    ratio = source.heads_per_group / shape.heads_per_group
    parts.append(min(kept, ratio, key=lambda each: abs(math.log(each))))
    uneven = [
        getattr(shape, extent) % 4 != 0 and getattr(shape, extent) != getattr(source, extent)
        for extent in ("num_layers", "num_query_groups")
    ]
    return sum(abs(math.log(part)) for part in parts) + 0.04 * sum(uneven)


@pytest.mark.parametrize("share", [0.3, 0.42, 0.5])
def test_the_first_is_the_nearest_of_all(share: float) -> None:
    aimed = share * SMALL.num_params()
    usual = SMALL.num_attention_heads / SMALL.hidden_size
    fitting = [
        shape
        for shape in reachable(SMALL)
        if abs(shape.num_params() / aimed - 1) <= 0.05
        and why_refused(shape) is None
        and 2 / 3 <= shape.num_attention_heads / shape.hidden_size / usual <= 1.5
    ]
    found = shapes(SMALL, budget_params=aimed).found
    best = min(distance(shape, SMALL, aimed) for shape in fitting)
    assert found[0].deviation.distance == pytest.approx(best)
    for one in found:
        assert one.shape in fitting
        assert one.deviation.distance == pytest.approx(distance(one.shape, SMALL, aimed))
    # one of each width, nearest first
    assert len({one.shape.hidden_size for one in found}) == len(found)
    distances = [one.deviation.distance for one in found]
    assert distances == sorted(distances)


def test_the_measure_notices_a_part_that_is_left_out() -> None:
    one = shapes(SMALL, budget_params=0.5 * SMALL.num_params()).found[-1]
    aimed = 0.6 * SMALL.num_params()
    assert one.deviation.distance != pytest.approx(distance(one.shape, SMALL, aimed))


def test_every_shape_is_reached_loads_and_divides() -> None:
    words: dict[str, Any] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    found = shapes(EIGHT, budget_params=3.6e9, num_virtual_stages_per_pipeline_rank=2, **words)
    for one in found.found:
        shape = one.shape
        assert target_units(EIGHT, shape)
        assert why_refused(shape) is None
        shape.check_division(tensor=2, pipeline=2, virtual=2)
        assert shape.hidden_size % 128 == shape.ffn_hidden_size % 128 == 0
    # the twins: with fewer conditions come shapes that break them
    free = shapes(EIGHT, budget_params=3.6e9, force_unloadable_target=True).found
    assert any(why_refused(one.shape) for one in free)
    assert any(one.shape.num_layers % 4 for one in free)


@pytest.mark.parametrize(
    ("flags", "cost"),
    [
        ({"budget_weights_gb": 5.0}, lambda shape: weight_bytes(shape) / 5e9),
        ({"budget_kv_bytes": 65536.0}, lambda shape: kv_bytes(shape) / 65536),
        # six operations a weight in training are two forward; 32 % of the peak of an A100
        (
            {"budget_forward_ms": 150.0, "gpu": "A100-80G"},
            lambda shape: 4096 * shape.training_flops(4096) / 3 / (0.32 * 312e12) / 0.150,
        ),
        # a single token waits for the weights, 2,039 GB/s
        (
            {"budget_forward_ms": 2.0, "gpu": "A100-80G", "seq_length": 1},
            lambda shape: weight_bytes(shape) / 2039e9 / 0.002,
        ),
    ],
)
def test_a_limit_is_kept_and_used(flags: dict[str, Any], cost: Any) -> None:
    found = shapes(EIGHT, **flags).found
    uses = [cost(one.shape) for one in found]
    assert 0.8 <= min(uses) <= max(uses) <= 1
    assert math.exp(found[0].deviation.budget) == pytest.approx(uses[0])


def test_the_page_shows_what_others_chose() -> None:
    page = (Path(__file__).parents[3] / "docs/choosing-a-shape.md").read_text()
    for one in PUBLISHED:
        shape, source = one.shape, SEVEN if one.source == "LLaMA-2-7B" else EIGHT
        wider = source.head_dim // shape.head_dim
        flat = shape.hidden_size / shape.num_layers * source.num_layers / source.hidden_size
        row = (
            f"| {one.name} | {one.source} | {shape.num_layers} of {source.num_layers} | "
            f"{shape.hidden_size} of {source.hidden_size} | {shape.num_attention_heads} of "
            f"{wider * source.num_attention_heads} | {shape.num_query_groups} of "
            f"{source.num_query_groups} | {shape.ffn_hidden_size} of {source.ffn_hidden_size} | "
            f"{flat:.2f} |"
        )
        assert row in page


def test_a_limit_beside_the_parameters_is_kept() -> None:
    free = shapes(budget_params=1.3e9).found
    held = shapes(budget_params=1.3e9, budget_kv_bytes=180000).found
    assert any(kv_bytes(one.shape) > 180000 for one in free)
    assert held
    assert all(kv_bytes(one.shape) <= 180000 for one in held)


def test_costs_are_those_counted_by_hand() -> None:
    assert weight_bytes(SEVEN) == 2 * 6_738_415_616
    assert kv_bytes(SEVEN) == 2 * 2 * 32 * 4096
    assert kv_bytes(EIGHT) == 2 * 2 * 32 * 8 * 128


@pytest.mark.parametrize("size", ["1.3B", "2.7B"])
def test_a_forward_pass_takes_about_what_was_measured(size: str) -> None:
    file = Path(__file__).parents[3] / "docs/benchmarks/gpu_speed.json"
    name, speed = f"{size} pretraining", json.loads(file.read_text())
    work = speed["work"][name]
    sequences = work["micro_batch_size"] * work["num_microbatches"]
    took = 1e3 * speed["speed"][name]["parts_s"][name]["forward"] / sequences
    page = (Path(__file__).parents[3] / "docs/choosing-a-shape.md").read_text()
    assert f"{took:.1f} ms with {size}" in " ".join(page.split())
    forward = shapes(budget_params=1.3e9, gpu="H200").budget.forward
    estimated = 1e3 * forward.seconds(PRESETS[f"llama2-{size.lower()}"])
    assert took == pytest.approx(estimated, rel=0.1)
    assert f" {100 * (1 - took / estimated):.0f} " in " ".join(page.split())


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        (SEVEN, {"budget_params": 2e9}),
        (EIGHT, {"budget_params": 4.5e9}),
        (EIGHT, {"budget_params": 4.5e9, "target_num_layers": 32}),
        (PRESETS["qwen2.5-7b"], {"budget_params": 3e9}),
    ],
)
def test_the_flags_name_the_shape(source: ModelShape, flags: dict[str, Any]) -> None:
    for one in shapes(source, **flags).found[:4]:
        words = ["--load", "a", "--output", "b", "--scores", "c"]
        asked = parse(CutConfig, [*words, *shlex.split(one.flags(source))], prog="", description="")
        assert target_shape(asked, source) == one.shape


def test_extents_that_are_chosen_stay() -> None:
    found = shapes(budget_params=2e9, target_hidden_size=2560).found
    assert {one.shape.hidden_size for one in found} == {2560}
    assert len({one.shape.num_layers for one in found}) == len(found) > 1
    found = shapes(budget_params=2e9, target_num_layers=32, target_ffn_hidden_size=6400).found
    assert {(one.shape.num_layers, one.shape.ffn_hidden_size) for one in found} == {(32, 6400)}
    heads = shapes(budget_params=2e9, target_num_attention_heads=16).found
    assert {one.shape.num_query_groups for one in heads} == {16}


def test_lines_say_what_is_off_and_what_others_chose() -> None:
    found = shapes(budget_params=1.3e9)
    lines = list(shape_lines(found, top=3))
    text = "\n".join(lines)
    assert "the shape of Sheared-LLaMA-1.3B; parameters +3.5 %" in text
    assert "Llama-3.2-1B, from Llama-3.1-8B; no masks lead there from --model" in text
    assert "24 of 32 layers, 2,048 of 4,096 hidden dimensions" in " ".join(lines)
    assert f"--top {len(found.found)} shows all" in text
    assert lines[-1] == f"The first: {found.first.flags(SEVEN)}"
    grouped = "\n".join(shape_lines(shapes(EIGHT, budget_params=4.5e9), top=3))
    assert "Llama-3.1-Minitron-4B-Width, from Llama-3.1-8B; neurons -14.3 % for the" in grouped
    assert "4B-Depth, from Llama-3.1-8B; parameters +0.9 %; width per layer +100.0 % out" in grouped


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        (SEVEN, {"budget_params": 7e9}, r"--budget-params 7e9 is not below the 6,738,415,616 par"),
        (SEVEN, {"budget_weights_gb": 14}, r"--model itself is within --budget-weights-gb 14, so"),
        (
            SEVEN,
            {"budget_params": 1.3e9, "budget_kv_bytes": 10000},
            r"fits --budget-params 1.3e9 --budget-kv-bytes 10000; the nearest takes 27.6 % of it: "
            r"--target-num-layers 1 .*; change the budget",
        ),
        (SEVEN, {"budget_kv_bytes": 10}, r"fits --budget-kv-bytes 10; none is below its limits;"),
        (
            SEVEN,
            {"budget_params": 1.3e9, "tensor_model_parallel_size": 64},
            r"heads for 64 tensor ranks, fits --budget-params 1.3e9; none",
        ),
        (
            SEVEN,
            {"budget_params": 2.7e9, "target_num_layers": 40},
            r"num_layers is 40, the source has 32, .* set --target-num-layers to at most 32",
        ),
        (
            SEVEN,
            {"budget_params": 2.7e9, "target_ffn_hidden_size": 20000},
            r"is 20000, the source has 11008, .* set --target-ffn-hidden-size to at most 11008",
        ),
        (
            SEVEN,
            {"budget_params": 2.7e9, "target_hidden_size": 5120},
            r"is 5120, the source has 4096, .* set --target-hidden-size to at most 4096",
        ),
        (
            PRESETS["mistral-7b-v0.1"],
            {"budget_params": 1e9, "seq_length": 8192},
            r"--seq-length 8192 is longer than the model's sliding_window",
        ),
    ],
)
def test_a_budget_that_nothing_meets_is_refused(
    source: ModelShape, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(source, **flags)


def test_a_plan_needs_gpus_or_a_budget_and_no_whole_target() -> None:
    with pytest.raises(ValueError, match=r"--gpus is needed and not given; .*--budget-params"):
        PlanConfig(model="llama2-7b")
    budget = BudgetConfig(budget_weights_gb=3.0)
    with pytest.raises(ValueError, match=r"--target llama2-1.3b is a whole shape, and --budget-w"):
        PlanConfig(model="llama2-7b", target="llama2-1.3b", budget=budget)
    with pytest.raises(ValueError, match=r"--budget-batch-size 8 is for a budget, and none is g"):
        BudgetConfig(budget_batch_size=8)
    with pytest.raises(ValueError, match=r"--budget-params is 0; wanted 1e-6 to 1e18"):
        BudgetConfig(budget_params=0)
