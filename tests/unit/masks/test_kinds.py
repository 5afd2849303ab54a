"""The table of kinds is complete, and no other module repeats it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megashear.config import TargetConfig
from megashear.masks.kinds import (
    EXTENTS,
    KINDS,
    ON_AXIS,
    SPLIT_OVER_PIPELINE,
    SPLIT_OVER_TENSOR,
    Kind,
    kinds_of,
)
from megashear.masks.targets import target_flag, whole_parts
from megashear.models import weight_table
from megashear.shape import ModelShape
from tests.tiny import PAIRS

PACKAGE = Path(__file__).parents[3] / "megashear"
MAY_SAY_KINDS = {
    "masks/kinds.py",  # the table
    "models/weight_table.py",  # the weights' table: their axes, and the kinds that fold into each
}
GROUPED = PAIRS["8-groups-of-4"][0]
PLAIN = replace(GROUPED, num_query_groups=GROUPED.num_attention_heads)
NOT_PRUNED = {"vocab", "head_dim"}
"""Axes of weights that no mask shortens."""


def literals(source: str) -> Iterator[str]:
    """Return names of kinds that are strings in code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS:
            yield f"line {node.lineno}: {node.value!r}"


def test_names_of_kinds_stand_in_the_table_alone() -> None:
    found = {
        file.relative_to(PACKAGE).as_posix(): [*literals(file.read_text(encoding="utf-8"))]
        for file in PACKAGE.rglob("*.py")
    }
    saying = {file: lines for file, lines in found.items() if lines}
    assert saying.keys() >= MAY_SAY_KINDS, "a file that needs no leave"
    elsewhere = {file: saying[file] for file in saying.keys() - MAY_SAY_KINDS}
    assert not elsewhere, "import the names from megashear.masks.kinds"


def test_a_name_of_a_kind_elsewhere_is_noticed() -> None:
    # a comparison, a key, a default
    for source in ('kind == "hidden"', 'gates = {"layer": 1}', 'def f(kind="head"): pass'):
        assert len(list(literals(source))) == 1, source
    assert not list(literals('"a hidden mask"; hidden = group'))


@pytest.mark.parametrize("kind", KINDS.values(), ids=[*KINDS])
def test_every_kind_has_all_that_others_look_up(kind: Kind) -> None:
    assert KINDS[kind.name] is kind
    assert kind.extent in {field.name for field in fields(ModelShape)}
    assert kind.width is None or kind.width in {field.name for field in fields(ModelShape)}
    name = target_flag(kind.extent).removeprefix("--").replace("-", "_")
    assert name in {field.name for field in fields(TargetConfig)}
    assert kind.within is None or kind.within in KINDS
    assert kind.unit.isascii()


def test_no_two_kinds_share_a_name_or_an_axis() -> None:
    for of in ("name", "unit", "extent", "axis"):
        said = [getattr(kind, of) for kind in KINDS.values() if getattr(kind, of) is not None]
        assert len({*said}) == len(said), of


def test_what_tensor_ranks_divide_stages_divide_too() -> None:
    # `MaskBinding._owners` handles no kind that tensor ranks divide and stages do not
    assert SPLIT_OVER_TENSOR <= SPLIT_OVER_PIPELINE


@pytest.mark.parametrize("source", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_masks_of_all_kinds_have_a_gate_for_each_unit(source: ModelShape) -> None:
    smallest = replace(source, **dict.fromkeys(EXTENTS, 1))
    parts = whole_parts(source, smallest)
    assert [*parts] == [kind.name for kind in kinds_of(source)]
    for name, part in parts.items():
        assert part.num_rows * part.num_units == KINDS[name].num_gates(source), name
    removed = {*KINDS} - {*parts}
    assert removed == (set() if source is GROUPED else {"group"})
    # the mask of another kind prunes units that have no mask of their own
    assert all(KINDS[name].pruned_by(source).name in parts for name in removed)


def test_axes_and_folds_of_weights_are_those_of_kinds() -> None:
    weights = [weight for _, weight, _ in weight_table.weights(GROUPED)]
    axes = {axis for weight in weights for axis in weight.axes}
    assert axes >= {*ON_AXIS}
    assert axes - {*ON_AXIS} <= NOT_PRUNED
    folded = {kind for weight in weights for kinds in weight.folds for kind in kinds}
    assert folded <= {*KINDS}
    # a fold of query heads is also a fold of their key/value heads
    assert {*KINDS} - folded == {KINDS[kind].within for kind in folded} - {None}
