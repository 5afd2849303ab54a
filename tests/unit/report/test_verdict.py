"""A verdict says that masks have settled where they have, and names what has not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megashear.masks.targets import target_units, whole_parts
from megashear.monitor import tags
from megashear.monitor.figures import Point
from megashear.report.kept import MaskReading
from megashear.report.record import RunRecord
from megashear.report.verdict import CHURN, DISTANCE, LIMITS, UNDECIDED, Finding, findings, verdict
from tests.tiny import PAIRS
from tests.unit.report.test_kept import half_open

SOURCE, TARGET = PAIRS["8-groups-of-4"]


def settled() -> dict[str, torch.Tensor]:
    """Masks that keep the target's units and have decided: as open and as closed as they get."""
    found = {}
    for kind, part in whole_parts(SOURCE, TARGET).items():
        found[kind] = torch.full((part.num_rows, part.num_units), -4.6)
        found[kind][:, : target_units(SOURCE, TARGET)[kind]] = 4.6
    return found


def run(log_alpha: dict[str, torch.Tensor], churn: float | None = 0.0) -> RunRecord:
    events = {}
    if churn is not None:
        events = {
            tags.churn(kind): {2: Point(0.9, 0.0), 4: Point(churn, 0.0)} for kind in log_alpha
        }
    return RunRecord(
        name="run", save=None, events=events, masks=MaskReading.of(log_alpha, SOURCE, TARGET)
    )


def test_settled_masks_are_said_to_be() -> None:
    assert verdict(run(settled())).startswith("The masks have settled: every kind is within all")
    assert "Nothing is known of gates that changed side" in verdict(run(settled(), churn=None))
    assert verdict(RunRecord(name="run", save=None)) == ""


def test_what_has_not_settled_is_named() -> None:
    restless = verdict(run(half_open(SOURCE, TARGET)))
    assert "The masks have not settled yet: " in restless
    moved = verdict(run(settled(), churn=0.5), most=1)
    assert "50.0 % of the hidden dimensions changed side since the evaluation before" in moved
    assert "(at most 2 % in settled masks); and " in moved


def test_a_finding_says_its_limit_as_one() -> None:
    undecided = Finding(kind="head", what=UNDECIDED, share=0.12, allowance=0.01)
    assert (
        str(undecided) == "12.0 % of the query heads are undecided (at most 10 % in settled masks)"
    )
    away = dataclasses.replace(undecided, what=DISTANCE, share=0.06)
    assert str(away) == (
        "the expected number of query heads is 6.0 % of a row away from the target (at most 5 %)"
    )


@pytest.mark.parametrize("what", LIMITS)
def test_a_measure_is_settled_up_to_its_limit(what: str) -> None:
    limit = LIMITS[what]
    at, above = (
        Finding(kind="head", what=what, share=limit + e, allowance=1e-3) for e in (0, 1e-6)
    )
    assert at.is_settled
    assert not above.is_settled


def test_one_gate_of_few_is_never_too_many() -> None:
    one = Finding(kind="layer", what=CHURN, share=1 / 6, allowance=1 / 6)
    assert one.is_settled
    assert not dataclasses.replace(one, share=2 / 6).is_settled


def test_every_kind_has_every_measure() -> None:
    found = findings(run(settled()))
    assert {(one.kind, one.what) for one in found} == {
        (kind, what) for kind in whole_parts(SOURCE, TARGET) for what in LIMITS
    }
