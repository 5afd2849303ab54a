"""Throughput over a clock that the test moves."""

import contextlib

import pytest

from megashear.monitor.throughput import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_counts_tokens_and_seconds() -> None:
    clock = Clock()
    meter = Throughput(num_devices=4, clock=clock)
    for _ in range(5):
        clock.now += 2.0
        meter.step(1000)
    rate = meter.window()
    assert rate.tokens_per_second == pytest.approx(500)
    assert rate.tokens_per_second_per_device == pytest.approx(125)
    assert rate.seconds_per_step == pytest.approx(2)


def test_windows_are_apart() -> None:
    clock = Clock()
    meter = Throughput(clock=clock)
    clock.now += 1
    meter.step(100)
    meter.window()
    clock.now += 4
    meter.step(100)
    assert meter.window().tokens_per_second == pytest.approx(25)


@pytest.mark.parametrize(("paused", "seconds"), [(True, 2.0), (False, 32.0)])
def test_pauses_are_left_out(paused: bool, seconds: float) -> None:
    clock = Clock()
    meter = Throughput(clock=clock)
    clock.now += 2
    meter.step(100)
    if paused:
        with meter.pause("evaluation"):
            clock.now += 30
    else:  # the twin: without the pause the evaluation counts
        clock.now += 30
    assert meter.window().seconds_per_step == pytest.approx(seconds)


def test_a_pause_ends_with_an_error() -> None:
    clock = Clock()
    meter = Throughput(clock=clock)
    with contextlib.suppress(OSError), meter.pause("evaluation"):
        clock.now += 30
        raise OSError("full disk")
    clock.now += 2
    meter.step(1)
    assert meter.window().seconds_per_step == pytest.approx(2)


def test_eta_is_the_mean_pace_of_all_windows() -> None:
    clock = Clock()
    meter = Throughput(clock=clock)
    assert meter.eta(10) is None
    for seconds in (1.0, 3.0):
        clock.now += seconds
        meter.step(1)
        meter.window()
    assert meter.eta(10) == pytest.approx(20)


def test_an_empty_window_is_zero() -> None:
    rate = Throughput(clock=Clock()).window()
    assert rate.tokens_per_second == rate.seconds_per_step == 0


def test_no_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="num_devices is 0; a run has at least 1"):
        Throughput(num_devices=0)


def test_what_takes_time_has_its_share_of_all_of_it() -> None:
    clock = Clock()
    meter = Throughput(clock=clock)
    assert meter.share("evaluation") == 0
    for _ in range(2):
        clock.now += 6
        with meter.pause("evaluation"):
            clock.now += 3
        with meter.pause("checkpoint"):
            clock.now += 1
        meter.window()
    assert meter.share("evaluation") == pytest.approx(0.3)
    assert meter.share("checkpoint") == pytest.approx(0.1)
    assert meter.share("tea") == 0
