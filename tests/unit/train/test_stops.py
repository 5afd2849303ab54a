"""Requests to stop: signals, time, intervals; what ranks agree on, and what the process returns."""

from __future__ import annotations

import os
import signal
import time

import pytest

from megashear.config import TrainConfig
from megashear.train import stops
from megashear.train.stops import Stops, exit_status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_while_the_run_listens(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    asked = Stops(TrainConfig())
    with asked.listening():
        assert asked.reason(asked.request(), 1) is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher sends more; the first counts
        request = asked.request()
    assert asked.reason(request, 1) == f"{number.name} was received"
    assert exit_status(request) == 128 + number
    assert signal.getsignal(number) is before


def test_signals_are_left_alone_where_the_flag_says_so() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stops(TrainConfig(exit_signal_handler=False)).listening():
        assert signal.getsignal(signal.SIGTERM) is before


def test_time_is_over_after_the_minutes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(stops.time, "monotonic", lambda: now[0])
    asked = Stops(TrainConfig(exit_duration_in_mins=2), started=1000.0)
    now[0] += 119
    assert asked.request() == 0
    now[0] += 1
    assert asked.reason(asked.request(), 7) == "--exit-duration-in-mins 2 is over"
    assert exit_status(asked.request()) == 0


def test_a_clock_that_jumps_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Stops(TrainConfig(exit_duration_in_mins=60))
    day = time.time() + 86400
    monkeypatch.setattr(stops.time, "time", lambda: day)
    assert asked.request() == 0


def test_a_signal_of_any_rank_outranks_the_time_of_all() -> None:
    over, signalled = Stops(TrainConfig()), Stops(TrainConfig())
    signalled.received = signal.SIGTERM
    request = max(stops._OVER, signalled.request(), over.request())
    assert over.reason(request, 3) == "SIGTERM was received"


def test_an_interval_ends_the_run_at_its_multiples() -> None:
    asked = Stops(TrainConfig(exit_interval=5))
    assert [asked.reason(0.0, step) is not None for step in (4, 5, 6, 10)] == [0, 1, 0, 1]
    every = Stops(TrainConfig(exit_interval=1))
    assert every.reason(0.0, 1) is not None
    assert every.reason(0.0, None) is None  # what is at its end is not stopped: a cut may follow
    assert every.reason(float(signal.SIGTERM), None) == "SIGTERM was received"
