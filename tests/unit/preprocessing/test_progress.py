"""The bar and the log say how far it is, not counting what an earlier run did."""

import itertools
import logging
from contextlib import closing

import pytest
import tqdm.std

from megashear.preprocessing.progress import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute passes from one look to the next."""
    monkeypatch.setattr(tqdm.std, "time", itertools.count(step=30.0).__next__)


def test_the_log_counts_rate_and_time_left(clock, caplog) -> None:
    with caplog.at_level(logging.INFO), closing(Meter(100_000_000, None)) as meter:
        meter.domain = "wiki"
        meter.skip(40_000_000)
        for position in range(2_000_000, 14_000_000, 2_000_000):
            meter.add(100, position)
        meter.end_file(20_000_000)
        meter.add(100, 1_000_000)
    # four looks at the clock a call: 2 MB and 100 documents in two minutes, 58 MB are left
    assert caplog.messages[0] == (
        "preprocess: 42.0MB of 100MB | 16.7kB/s | 57:59 left, wiki, 3 docs/s"
    )
    assert "61.0MB of 100MB" in caplog.messages[-1]


def test_the_log_has_a_line_a_minute(clock, caplog) -> None:
    with caplog.at_level(logging.INFO), closing(Meter(1000, None)) as meter:
        for position in range(1, 10):
            meter.end_file(position)
    assert 2 < len(caplog.messages) < 9


@pytest.mark.parametrize("show", [None, True])
def test_a_long_document_is_named_before_it_is_tokenised(caplog, capsys, show) -> None:
    with caplog.at_level(logging.INFO), closing(Meter(1000, show)) as meter:
        meter.begin("x.jsonl, line 2", 15_000_000)
        meter.begin("x.jsonl, line 3", 200_000_000)
    told = capsys.readouterr().err if show else "".join(caplog.messages)
    assert "x.jsonl, line 3: 200 MB in one piece, counted when it is tokenised" in told
    assert "line 2" not in told


def test_no_log_where_none_is_asked_for(clock, caplog) -> None:
    with caplog.at_level(logging.INFO), closing(Meter(100, False)) as meter:
        meter.skip(10)
        meter.begin("x.jsonl, line 3", 200_000_000)
        for position in range(1, 10):
            meter.add(1, position)
    assert caplog.messages == []


def test_the_bar_has_rate_time_left_and_documents(capsys) -> None:
    with closing(Meter(1000, True)) as meter:
        meter.domain = "wiki"
        meter.skip(400)
        meter.add(7, 100)
        meter.end_file(600)
    *_, shown = capsys.readouterr().err.split("\r")
    assert "1.00k/1.00k" in shown
    assert "B/s" in shown
    assert "wiki, " in shown
    assert "docs/s" in shown
