"""Differences are found where they are, and nowhere else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megashear.checkpoint.description import Description
from megashear.conversion.sources import CHECKPOINT
from megashear.report import comparison
from megashear.report.comparison import (
    check_comparable,
    differing_fields,
    differing_gates,
    same_shapes,
    weight_distances,
)
from megashear.report.kept import MaskReading
from megashear.report.open_model import OpenModel
from megashear.report.tables import compare_text
from tests.reference_llama import random_weights
from tests.tiny import PAIRS, SOURCE, TARGET
from tests.unit.report.test_kept import half_open


def opened(**details: Any) -> OpenModel:
    return OpenModel(
        path=Path("somewhere"),
        kind=CHECKPOINT,
        shape=SOURCE,
        weights={},
        description=Description(shape=SOURCE, iteration=3, stage="prune", details=details),
        masks=None,
    )


def test_fields_that_differ_are_named_once() -> None:
    first = opened(run={"train": {"lr": 1.0, "seed": 1}}, scheduler={"num_steps": 3})
    second = opened(
        run={"train": {"lr": 2.0, "seed": 1}}, scheduler={"num_steps": 4}, source_shape={"a": 1}
    )
    assert differing_fields(first, first) == []
    found = {f.field: (f.first, f.second) for f in differing_fields(first, second)}
    assert found == {
        "details.run.train.lr": (1.0, 2.0),
        "details.source_shape": (None, {"a": 1}),
    }
    smaller = dataclasses.replace(second, shape=TARGET, description=None)
    names = {field.field for field in differing_fields(first, smaller)}
    assert {"shape.hidden_size", "stage", "iteration", "details"} <= names


def test_gates_that_differ_are_named_by_row_and_unit() -> None:
    source, target = PAIRS["8-groups-of-4"]
    log_alpha = half_open(source, target)
    first = MaskReading.of(log_alpha, source, target)
    assert differing_gates(first, MaskReading.of(log_alpha, source, target)) == []
    moved = {kind: rows.clone() for kind, rows in log_alpha.items()}
    row = moved["intermediate"][2]
    most, least = int(row.argmax()), int(row.argmin())
    row[[most, least]] = row[[least, most]]
    (found,) = differing_gates(first, MaskReading.of(moved, source, target))
    assert (found.kind, found.row) == ("intermediate", 2)
    assert (found.only_first, found.only_second) == ([most], [least])


def test_masks_of_other_sizes_are_not_compared() -> None:
    readings = [
        MaskReading.of(half_open(source, target), source, target)
        for source, target in (PAIRS["8-groups-of-4"], PAIRS["multi-head"])
    ]
    assert check_comparable(readings[0], readings[0]) is None
    reason = check_comparable(*readings)
    assert reason is not None
    assert "masks differ" in reason


@pytest.mark.parametrize("at_once", [7, 2**22])
def test_distances_are_those_of_whole_weights(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "COMPARED_AT_ONCE", at_once)
    first = random_weights(TARGET, 0)
    second = {name: weight.clone() for name, weight in first.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    second[name][3, 5] += 0.25
    second["lm_head.weight"] *= 1.5
    calls: list[None] = []
    found = weight_distances(first, second, TARGET, progress=lambda: calls.append(None))
    by_name = {one.name: one for one in found}
    assert len(calls) == len(found) == len(first)
    assert {one.name for one in found if one.distance} == {name, "lm_head.weight"}
    assert by_name[name].largest == pytest.approx(0.25, abs=1e-6)
    assert by_name[name].relative == pytest.approx(0.25 / float(first[name].norm()), rel=1e-5)
    assert by_name["lm_head.weight"].relative == pytest.approx(0.5, rel=1e-5)
    text = compare_text([], None, found, [])
    assert "model.layers.*.mlp.up_proj.weight" in text
    assert name in text


def test_what_is_not_a_number_is_no_equality() -> None:
    first = random_weights(TARGET, 0)
    second = {name: weight.clone() for name, weight in first.items()}
    second["model.norm.weight"][0] = math.nan
    found = {one.name: one for one in weight_distances(first, second, TARGET)}
    assert math.isnan(found["model.norm.weight"].relative)
    assert math.isnan(found["model.norm.weight"].largest)
    text = compare_text([], None, list(found.values()), [])
    assert "all" not in text.splitlines()[2]
    assert "nan" in text


def test_equal_models_are_said_to_be_equal() -> None:
    weights = random_weights(TARGET, 0)
    text = compare_text([], [], weight_distances(weights, weights, TARGET), ["a note"])
    assert text.splitlines()[0] == "descriptions: the same"
    assert "masks: the same gates open" in text
    assert f"all {len(weights)} are equal" in text
    assert text.endswith("a note")


def test_zeros_are_apart_from_what_is_not_zero() -> None:
    first = {name: torch.zeros_like(weight) for name, weight in random_weights(TARGET, 0).items()}
    (one, *_) = weight_distances(first, random_weights(TARGET, 0), TARGET)
    assert one.relative == math.inf


def test_shapes_are_the_same_where_all_weights_are() -> None:
    assert same_shapes(SOURCE, dataclasses.replace(SOURCE, norm_epsilon=1e-6))
    assert not same_shapes(SOURCE, TARGET)
