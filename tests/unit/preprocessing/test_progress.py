"""The bar and the log say how far it is, not counting what an earlier run did."""

import itertools
import logging

import pytest

from megashear.preprocessing import progress
from megashear.preprocessing.progress import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute passes from one look to the next."""
    monkeypatch.setattr(progress.time, "monotonic", itertools.count(step=30.0).__next__)


def test_the_log_counts_rate_and_time_left(clock, caplog) -> None:
    with caplog.at_level(logging.INFO), Meter(100_000_000, bar=False, log=True) as meter:
        meter.domain = "wiki"
        meter.skip(40_000_000)
        for position in range(2_000_000, 14_000_000, 2_000_000):
            meter.add(100, position)
        meter.end_file(20_000_000)
        meter.add(100, 1_000_000)
    # two looks at the clock a call: 2 MB and 100 documents in the first minute, 58 MB are left
    assert caplog.messages[0] == (
        "preprocess wiki: 42.0 of 100.0 MB | 0.03 MB/s | 2 docs/s | 29 min left"
    )
    assert "61.0 of 100.0 MB" in caplog.messages[-1]


def test_what_is_left_is_never_no_time(clock, caplog) -> None:
    with caplog.at_level(logging.INFO), Meter(1000, bar=False, log=True) as meter:
        for position in (400, 800, 990, 999):
            meter.add(1, position)
    assert "less than a minute left" in caplog.messages[-1]


@pytest.mark.parametrize("bar", [False, True])
def test_a_long_document_is_told_of_before_it_is_tokenised(caplog, capsys, bar: bool) -> None:
    with caplog.at_level(logging.INFO), Meter(1000, bar=bar, log=True) as meter:
        meter.domain = "wiki"
        meter.begin("x.jsonl, line 2", 15_000_000)
        meter.begin("x.jsonl, line 3", 200_000_000)
    told = capsys.readouterr().err if bar else "".join(caplog.messages)
    assert "x.jsonl, line 3: 200 MB in one piece, counted when it is tokenised" in told
    assert "line 2" not in told


def test_no_log_where_none_is_asked_for(clock, caplog) -> None:
    with caplog.at_level(logging.INFO), Meter(100, bar=False, log=False) as meter:
        for position in range(1, 10):
            meter.add(1, position)
    assert caplog.messages == []


def test_the_bar_has_rate_time_left_and_documents(capsys) -> None:
    with Meter(1000, bar=True, log=True) as meter:
        meter.domain = "wiki"
        meter.skip(400)
        meter.add(7, 100)
        meter.end_file(600)
    *_, shown = capsys.readouterr().err.split("\r")
    assert "1.00k/1.00k" in shown
    assert "B/s" in shown
    assert "wiki, " in shown
    assert "docs/s" in shown
