"""Counts of gates equal counts made gate by gate, from independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megashear.masks import census
from megashear.masks.census import GateSides, take_census, target_sizes
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.targets import MaskPart, target_units, whole_parts
from tests.tiny import PAIRS

SOURCE, TARGET = PAIRS["8-groups-of-4"]
CLAMP = math.log(100.0)


def masks(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: (torch.randn(part.num_rows, part.num_units, generator=generator) * 3).clamp(
            -CLAMP, CLAMP
        )
        for kind, part in whole_parts(SOURCE, TARGET).items()
    }


def chance_of(log_alpha: float) -> float:
    """Return P(open) = 1 - sigmoid(2/3 ln(0.1/1.1) - log_alpha), in Python's arithmetic."""
    return 1 - 1 / (1 + math.exp(log_alpha - 2 / 3 * math.log(0.1 / 1.1)))


def open_places(row: list[float], num_open: int) -> set[int]:
    """Return the places of the most open units, of equal ones the last."""
    order = sorted(range(len(row)), key=lambda unit: (row[unit], unit))
    return set(order[len(row) - num_open :])


def test_every_count_is_that_of_single_gates() -> None:
    whole, targets = masks(), target_units(SOURCE, TARGET)
    found = take_census(whole, targets)
    assert found.keys() == whole.keys()
    for kind, log_alpha in whole.items():
        rows = log_alpha.tolist()
        chances = [[chance_of(value) for value in row] for row in rows]
        # the expected number of closed units is rounded, halves up
        num_open = [len(c) - math.floor(sum(1 - p for p in c) + 0.5) for c in chances]
        rounded = sum(
            len(open_places(row, count) ^ open_places(row, targets[kind]))
            for row, count in zip(rows, num_open)
        )
        ours = found[kind]
        assert ours.num_gates == sum(map(len, rows))
        assert ours.expected_open == pytest.approx(sum(map(sum, chances)) / len(rows), rel=1e-9)
        assert ours.actual_open == pytest.approx(sum(num_open) / len(rows), rel=1e-12)
        assert (ours.fewest_open, ours.most_open) == (min(num_open), max(num_open))
        assert ours.num_undecided == sum(0.1 < p < 0.9 for c in chances for p in c)
        assert 0 < ours.num_undecided < ours.num_gates
        assert ours.num_changed == rounded


def test_other_bounds_count_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, targets = masks(), target_units(SOURCE, TARGET)
    before = take_census(whole, targets)["intermediate"].num_undecided
    monkeypatch.setattr(census, "UNDECIDED", (0.2, 0.9))
    assert take_census(whole, targets)["intermediate"].num_undecided < before


def test_gates_at_the_clamps_are_decided() -> None:
    log_alpha = torch.tensor([[CLAMP, -CLAMP, 0.0]])
    found = take_census({"layer": log_alpha}, {"layer": 2})
    assert found["layer"].num_undecided == 1


def test_gates_that_rounding_changes_differ_between_the_modes() -> None:
    # P(z = 0) is .953 for the low, .002 for the high: rows are expected to close 1, 2 and 3 of 4
    low, high = -4.6, 4.6
    log_alpha = torch.tensor([[low, high, high, 4], [low, low, 4, high], [low, low, low, high]])
    found = take_census({"intermediate": log_alpha}, {"intermediate": 2})["intermediate"]
    assert (found.num_changed, found.num_gates, found.target) == (2, 12, 2)
    assert (found.fewest_open, found.most_open) == (1, 3)


def test_target_sizes_fall_from_the_source_to_the_target() -> None:
    parts, targets = whole_parts(SOURCE, TARGET), target_units(SOURCE, TARGET)
    constraint = SparsityConstraint(parts, targets, warmup_steps=10)
    for kind, part in parts.items():
        sizes = [target_sizes(constraint, step)[kind] for step in (0, 5, 10, 20)]
        middle = (part.num_units + targets[kind]) / 2
        wanted = [part.num_units, middle, targets[kind], targets[kind]]
        assert sizes == pytest.approx(wanted, rel=1e-12), kind


def test_sides_count_what_changed_since_the_last_look() -> None:
    part = MaskPart(kind="head", num_rows=4, num_units=6, rows=(1, 3), units=range(2, 5))
    sides = GateSides({"head": part})
    first = torch.tensor([[0.7, 0.0, 0.9], [0.0, 0.0, 0.1]])
    second = torch.tensor([[0.0, 0.2, 0.9], [0.0, 0.0, 0.6]])
    assert sides.changed({"head": first})["head"].tolist() == [1, 2]  # at first all were open
    assert sides.changed({"head": second})["head"].tolist() == [2, 0]
    assert sides.changed({"head": second})["head"].tolist() == [0, 0]


def test_sides_go_on_from_what_was_saved() -> None:
    part = MaskPart(kind="layer", num_rows=1, num_units=3, rows=(0,), units=range(3))
    one, other = GateSides({"layer": part}), GateSides({"layer": part})
    gates = {"layer": torch.tensor([[0.0, 1.0, 0.0]])}
    one.changed(gates)
    other.state_dict()["layer"].copy_(one.state_dict()["layer"])  # as a checkpoint does
    assert other.changed(gates)["layer"].tolist() == [0]
