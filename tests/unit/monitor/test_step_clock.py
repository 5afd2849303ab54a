"""Time by part over a clock that the test moves."""

from __future__ import annotations

import pytest

from megashear.monitor.step_clock import StepClock
from tests.unit.monitor.test_throughput import Clock


def test_parts_have_their_own_time_and_not_that_of_parts_inside() -> None:
    clock = Clock()
    meter = StepClock(clock=clock)
    for _ in range(2):
        with meter.step(is_timed=True):
            clock.now += 0.5  # in no part
            with meter.part("data"):
                clock.now += 1
            with meter.part("forward-backward"):
                clock.now += 2
                with meter.part("communication"):
                    clock.now += 4
                clock.now += 8
    assert meter.window() == {
        "data": pytest.approx(1),
        "forward-backward": pytest.approx(10),
        "communication": pytest.approx(4),
    }
    assert meter.window() == {}


def test_only_timed_steps_count_and_only_in_steps() -> None:
    clock, waits = Clock(), []
    meter = StepClock(clock=clock, synchronize=lambda: waits.append(clock.now))
    with meter.step(is_timed=False), meter.part("data"):
        clock.now += 100
    with meter.part("data"):  # an evaluation's
        clock.now += 100
    assert waits == []  # the device is left alone
    with meter.step(is_timed=True), meter.part("data"):
        clock.now += 3
    assert len(waits) == 2
    assert meter.window() == {"data": pytest.approx(3)}


def test_a_step_that_fails_leaves_no_part_open() -> None:
    clock = Clock()
    meter = StepClock(clock=clock)
    with pytest.raises(OSError, match="disk"), meter.step(is_timed=True), meter.part("data"):
        raise OSError("disk")
    with meter.step(is_timed=True), meter.part("optimizer"):
        clock.now += 1
    assert meter.window() == {"data": 0, "optimizer": pytest.approx(0.5)}
