"""Folding gates into weights, against formulas in float64 and loops that spell every index out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megashear.models import fold as module
from megashear.models.fold import Factors, fold, pick, unfold, unit_values
from megashear.parallel import device, kernel_choice
from megashear.shape import ModelShape
from tests.compiled import graphs_counted
from tests.tiny import relative_error
from tests.unit.models.test_kernels import gates, random

FLOAT32 = 5e-6
"""Relative, against float64: a few roundings at 6e-8 each, and sums of at most 520 terms; measured
up to 1.4e-6."""
FLOAT32_PLACES = 2.0**-22
"""Relative: two products in float32, each rounded."""
BROKEN = 0.01
"""Relative; any of the breakages shown here is off by more."""

ROWS, COLUMNS = 13, 40
Axis = str | None
"""Factors of an axis: one for each "index", "one" for all, or none."""
AXES: tuple[Axis, ...] = (None, "one", "index")
MATRICES: list[tuple[Axis, ...]] = list(itertools.product(AXES, AXES))
VECTORS: list[tuple[Axis, ...]] = list(itertools.product(AXES))


def factor(kind: Axis, size: int, seed: int) -> Tensor | None:
    if kind is None:
        return None
    return gates(size, seed) if kind == "index" else torch.tensor([0.7])


def case(axes: Sequence[Axis]) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """Return a weight, the factors of its axes, and a gradient of the folded weight."""
    extents = (ROWS, COLUMNS)[-len(axes) :]
    factors = [factor(kind, n, 5 + n) for kind, n in zip(axes, extents)]
    return random(*extents, seed=1), factors, random(*extents, seed=2)


def product(weight: Tensor, factors: Sequence[Tensor | None], power: int = 1) -> Tensor:
    """Return the folded weight in float64, with factors raised to the power."""
    wide = weight.double()
    for axis, each in enumerate(factors):
        if each is not None:
            wide = wide * each.double().pow(power).view(
                [-1 if n == axis else 1 for n in range(weight.dim())]
            )
    return wide


def by_autograd(
    weight: Tensor, factors: Sequence[Tensor | None], raw: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients of the weight and of its factors, in float64."""
    leaf = weight.double().requires_grad_()
    leaves = [None if f is None else f.double().requires_grad_() for f in factors]
    product(leaf, leaves).backward(raw.double())
    assert leaf.grad is not None
    return leaf.grad, [None if f is None else f.grad for f in leaves]


def unfolded(
    weight: Tensor, factors: Sequence[Tensor | None], raw: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients of `unfold`, where those of factors are added to ones."""
    totals = [None if f is None else torch.ones_like(f) for f in factors]
    raw = raw.clone()
    unfold(raw, weight, factors, totals)
    return raw, [None if total is None else total - 1.0 for total in totals]


def worst(
    found: tuple[Tensor, Sequence[Tensor | None]], wanted: tuple[Tensor, Sequence[Tensor | None]]
) -> float:
    """Return the largest relative error; sums were added to 1, which limits their precision."""
    errors = [relative_error(found[0], wanted[0])]
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            errors.append(float((ours - theirs).norm() / (1.0 + theirs.norm())))
    return max(errors)


@pytest.mark.parametrize("power", [1, -1, -2])
@pytest.mark.parametrize("axes", MATRICES + VECTORS)
def test_a_folded_weight_is_the_product(axes: Sequence[Axis], power: int) -> None:
    weight, factors, _ = case(axes)
    factors = [None if each is None else each + 0.1 for each in factors]  # none divides by 0
    found = fold(weight, factors, power=power)
    assert found.dtype == weight.dtype
    assert found.data_ptr() != weight.data_ptr()
    assert relative_error(found, product(weight, factors, power)) < FLOAT32
    if any(axes):
        assert relative_error(found, product(weight, factors, 1 - power)) > BROKEN


@pytest.mark.parametrize("axes", MATRICES + VECTORS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["master", "rounded"])
def test_a_bfloat16_weight_is_rounded_once(axes: Sequence[Axis], precision: torch.dtype) -> None:
    weight, factors, _ = case(axes)
    weight = weight.to(precision)
    out = torch.full(weight.shape, float("nan"), dtype=torch.bfloat16)
    assert fold(weight, factors, out=out) is out
    assert off_nearest(out, product(weight, factors)) == 0.0


def test_a_weight_that_is_rounded_twice_is_noticed() -> None:
    weight, factors, _ = case(("index", "index"))
    wanted = product(weight, factors)
    from_weight = fold(weight.bfloat16(), factors)  # as if there were no master
    between = fold(fold(weight, [factors[0], None]).bfloat16(), [None, factors[1]])
    of_gates = fold(weight.bfloat16(), [None if f is None else f.bfloat16() for f in factors])
    for rounded in (from_weight, between, of_gates):
        assert off_nearest(rounded.bfloat16(), wanted) > 0.05


def off_nearest(found: Tensor, exact: Tensor) -> float:
    """Return the share of bfloat16 numbers that are not nearest to ``exact``, without ties."""
    nearest = (exact.to(found.dtype).double() - exact).abs()
    return float(
        ((found.double() - exact).abs() > nearest + FLOAT32_PLACES * exact.abs()).double().mean()
    )


@pytest.mark.parametrize("rows_at_once", [None, 1, 5], ids=["whole", "rows", "blocks"])
@pytest.mark.parametrize("axes", MATRICES + VECTORS)
def test_unfolded_gradients_are_those_of_autograd(
    axes: Sequence[Axis], rows_at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows_at_once is not None:  # 13 rows: the last block of 5 is smaller
        monkeypatch.setattr(module, "_BLOCK", rows_at_once * COLUMNS)
    weight, factors, raw = case(axes)
    assert worst(unfolded(weight, factors, raw), by_autograd(weight, factors, raw)) < FLOAT32


@pytest.mark.parametrize("axes", MATRICES + VECTORS)
def test_a_bfloat16_weight_is_unfolded_in_float32(axes: Sequence[Axis]) -> None:
    weight, factors, raw = case(axes)
    weight = weight.bfloat16()
    found = unfolded(weight, factors, raw)
    assert found[0].dtype == torch.float32
    assert worst(found, by_autograd(weight, factors, raw)) < FLOAT32


def test_blocks_of_the_true_size_are_the_whole() -> None:
    height = module._BLOCK // COLUMNS
    weight, raw = random(2 * height + 3, COLUMNS, seed=1), random(2 * height + 3, COLUMNS, seed=2)
    factors = [gates(len(weight), 3), gates(COLUMNS, 4)]
    found, wanted = unfolded(weight, factors, raw), by_autograd(weight, factors, raw)
    assert worst(found, wanted) < 1e-5  # sums of 6,555 terms


def test_a_gradient_that_is_not_wanted_is_left_out() -> None:
    weight, factors, raw = case(("index", "index"))
    wanted, (of_rows, _) = by_autograd(weight, factors, raw)
    rows, total = torch.zeros(ROWS), raw.clone()
    unfold(total, weight, factors, [rows, None])
    assert of_rows is not None
    assert relative_error(total, wanted) < FLOAT32
    assert relative_error(rows, of_rows) < FLOAT32
    unfold(raw, weight, factors, [None, None])
    assert torch.equal(raw, total)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_a_factor_left_out_of_the_others_gradient_is_noticed(axis: int) -> None:
    weight, factors, raw = case(("index", "index"))
    _, wanted = by_autograd(weight, factors, raw)
    alone = [each if n == axis else None for n, each in enumerate(factors)]
    _, found = unfolded(weight, alone, raw)
    ours, theirs = found[axis], wanted[axis]
    assert ours is not None
    assert theirs is not None
    assert relative_error(ours, theirs) > BROKEN


def test_a_last_block_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 5 * COLUMNS)
    split = Tensor.split

    def split_evenly(tensor: Tensor, size: Any, *rest: Any) -> Any:
        return [each for each in split(tensor, size, *rest) if len(each) == size]

    weight, factors, raw = case((None, "index"))
    wanted = by_autograd(weight, factors, raw)
    monkeypatch.setattr(Tensor, "split", split_evenly)
    assert worst(unfolded(weight, factors, raw), wanted) > BROKEN


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_compiled_form_is_the_same(precision: torch.dtype) -> None:
    with graphs_counted() as graphs:
        for axes in MATRICES:
            weight, factors, raw = case(axes)
            weight = weight.to(precision)
            with mock.patch.object(kernel_choice, "_compiles", False):
                eager, gradients = fold(weight, factors), unfolded(weight, factors, raw)
            assert torch.equal(fold(weight, factors), eager)
            assert worst(unfolded(weight, factors, raw), gradients) < FLOAT32
    assert graphs == {"_fold_matrix": 1, "_unfold_matrix": 1}


def test_nothing_is_compiled_for_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factors, _ = case(("index", "index"))
    monkeypatch.setattr(device, "device", lambda: torch.device("cuda", 0))
    with graphs_counted() as graphs:
        assert relative_error(fold(weight, factors), product(weight, factors)) < FLOAT32
    assert not graphs


LAYERS, HEADS, GROUPS, HEAD_DIM, HIDDEN, NEURONS = 3, 8, 4, 2, 10, 6
"""Shape of one rank's part; heads per group is 2."""
SHAPE = ModelShape(
    num_layers=2 * LAYERS,
    hidden_size=HIDDEN,
    num_attention_heads=2 * HEADS,
    num_query_groups=2 * GROUPS,
    head_dim=HEAD_DIM,
    ffn_hidden_size=2 * NEURONS,
    vocab_size=11,
)
"""Shape of the whole model, which two stages and two tensor ranks divide."""
WHOLE = {
    "hidden": gates(HIDDEN, 1).view(1, -1),
    "layer": torch.tensor([[0.5, 0.0, 0.9]]),
    "head": gates(LAYERS * HEADS, 2).view(LAYERS, HEADS),
    "group": gates(LAYERS * GROUPS, 3).view(LAYERS, GROUPS),
    "intermediate": gates(LAYERS * NEURONS, 4).view(LAYERS, NEURONS),
}
GROUPED = WHOLE | {"head": WHOLE["head"].view(LAYERS * GROUPS, HEADS // GROUPS)}
SETS = [
    {kind: of[kind] for kind in kinds}
    for of in (WHOLE, GROUPED)
    for size in range(len(WHOLE) + 1)
    for kinds in itertools.combinations(WHOLE, size)
]
"""Every set of kinds, heads by layer and by group."""


def factors_of(found: dict[str, Tensor]) -> Factors:
    return Factors(found, SHAPE, num_layers=LAYERS)


def written_out(found: dict[str, Tensor], kind: str, layer: int, index: int) -> float:
    """Return the factor of one kind of the weight table at one index of an axis."""
    if kind != "head":
        at = {"hidden": (0, index), "layer": (0, layer), "intermediate": (layer, index)}[kind]
        return float(found[kind][at]) if kind in found else 1.0
    head = index // HEAD_DIM
    value = 1.0
    if "head" in found:
        value *= float(found["head"].flatten()[layer * HEADS + head])
    if "group" in found:
        value *= float(found["group"][layer, head // (HEADS // GROUPS)])
    return value


@pytest.mark.parametrize(
    ("kinds", "length"),
    [
        ((), 7),
        (("hidden",), HIDDEN),
        (("layer", "hidden"), HIDDEN),
        (("head",), HEADS * HEAD_DIM),
        (("intermediate",), NEURONS),
    ],
)
def test_factors_are_those_of_every_index(kinds: tuple[str, ...], length: int) -> None:
    for found in SETS:
        factors = factors_of(found)
        for layer in range(LAYERS):
            (ours,) = factors.of([kinds], layer)
            there = {"head", "group"} if kinds == ("head",) else set(kinds)
            assert (ours is None) == there.isdisjoint(found)
            if ours is None:
                continue
            assert ours.shape == ((1,) if there & found.keys() == {"layer"} else (length,))
            wanted = torch.ones(length)
            for index in range(length):
                for kind in kinds:
                    wanted[index] *= written_out(found, kind, layer, index)
            assert torch.equal(ours.expand(length), wanted)


def test_what_lies_outside_the_layers_has_factors_of_its_own() -> None:
    factors = factors_of(WHOLE)
    nothing, hidden = factors.of(((), ("hidden",)), None)
    assert nothing is None
    assert hidden is not None
    assert torch.equal(hidden, WHOLE["hidden"][0])


def test_factors_keep_their_graph() -> None:
    leaves = {kind: z.clone().requires_grad_() for kind, z in GROUPED.items()}
    factors = factors_of(leaves)
    for kinds in (("layer", "hidden"), ("head",), ("intermediate",)):
        stacked = factors.stacked(kinds)
        assert stacked is factors.stacked(kinds)  # made once
        assert stacked is not None
        stacked.sum().backward(retain_graph=True)
    # a group's gate acts on each of its heads, and on each of their dimensions
    of_group = torch.tensor(
        [
            [
                HEAD_DIM * float(WHOLE["head"][layer, 2 * group : 2 * group + 2].sum())
                for group in range(GROUPS)
            ]
            for layer in range(LAYERS)
        ]
    )
    assert relative_error(given(leaves["group"].grad), of_group) < FLOAT32
    of_layer = torch.full((1, LAYERS), float(WHOLE["hidden"].sum()))
    assert relative_error(given(leaves["layer"].grad), of_layer) < FLOAT32


def given(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


@pytest.mark.parametrize(
    "broken",
    [
        lambda heads, groups: heads.repeat(1, 2)[:, :HEADS],  # heads taken for those of groups
        lambda heads, groups: groups.repeat(1, HEADS // GROUPS) * heads,  # group by group
        lambda heads, groups: heads,
        lambda heads, groups: groups.repeat_interleave(HEADS // GROUPS, dim=1),
    ],
    ids=["transposed", "tiled", "without-groups", "without-heads"],
)
def test_heads_laid_out_otherwise_are_noticed(broken: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = unit_values(GROUPED, SHAPE, LAYERS)["head"]
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        wanted = written_out(GROUPED, "head", layer, head * HEAD_DIM)
        assert float(found[layer, head]) == pytest.approx(wanted, rel=FLOAT32)
    assert relative_error(broken(WHOLE["head"].roll(1, 1), WHOLE["group"]), found) > BROKEN
    assert unit_values({}, SHAPE, LAYERS) == {}


def test_a_row_is_a_view_of_its_layer() -> None:
    stacked, same = torch.zeros(LAYERS, 4), torch.zeros(1, 4)
    pick(stacked, 2).add_(1.0)
    pick(same, 2).add_(1.0)  # the same in every layer
    pick(same, None).add_(1.0)
    assert stacked.tolist() == [[0.0] * 4, [0.0] * 4, [1.0] * 4]
    assert same.tolist() == [[2.0] * 4]
