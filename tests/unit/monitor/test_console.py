"""Log lines as people read them; logging on rank 0; a bar on terminals only."""

import io
import logging
from collections.abc import Iterator

import pytest

from megashear.monitor.console import (
    configure_logging,
    format_count,
    format_duration,
    format_evaluation,
    format_masks,
    format_step,
    progress,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    logger = logging.getLogger("megashear")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_a_step_is_one_line() -> None:
    line = format_step(
        120,
        3200,
        loss=2.1141,
        learning_rate=9.8e-5,
        grad_norm=0.912,
        tokens_per_second=41_234,
        eta_seconds=3753,
    )
    assert line == (
        "step 120/3200 | loss 2.114 | lr 9.8e-5 | grad 0.91 | 41.2 k tok/s | ETA 1:02:33"
    )


def test_masks_have_a_line_of_their_own() -> None:
    line = format_masks(0.0123, {"hidden": (0.3121, 0.375), "head": (0.1, 0.25)})
    assert line == "  penalty 0.012 | sparsity hidden .312/.375 head .100/.250"
    assert format_masks(None, {"head": (0.1, 0.25)}) == "  sparsity head .100/.250"


def test_the_lines_of_a_long_pruning_run_fit_100_columns() -> None:
    kinds = ("hidden", "head", "intermediate", "layer")
    first = format_step(
        48_000,
        48_000,
        loss=2.1141,
        learning_rate=9.8e-5,
        grad_norm=0.912,
        tokens_per_second=1_234_000,
        eta_seconds=4 * 86400 - 1,
    )
    second = format_masks(-10.0123, dict.fromkeys(kinds, (0.3121, 0.375)))
    assert len("03:01:30 INFO " + first) <= 100
    assert len(second) <= 100
    longer = format_step(
        10**7, 10**7, loss=1e9, learning_rate=1, grad_norm=1e9, tokens_per_second=1, eta_seconds=1
    )
    assert len("03:01:30 INFO " + longer) > 100  # numbers are never cut


def test_what_is_not_known_yet_is_a_question_mark() -> None:
    line = format_step(
        1, 2, loss=1, learning_rate=0, grad_norm=0, tokens_per_second=0, eta_seconds=None
    )
    assert line == "step 1/2 | loss 1.000 | lr 0.0e+00 | grad 0.00 | 0 tok/s | ETA ?"


def test_an_evaluation_is_one_line() -> None:
    line = format_evaluation(
        50, {"c": 2.0, "prose": 3.0}, weights={"c": 0.25, "prose": 0.75}, seconds=61
    )
    assert line == (
        "step 50: held-out loss 2.500 | c 2.000 prose 3.000 | weights c 0.250 prose 0.750 | "
        "took 0:01:01"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (41_234, "41.2 k"), (2e6, "2.0 M"), (3e9, "3.0 G")]
)
def test_counts_carry_a_prefix(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3753, "1:02:33"), (90061, "1 d 1:01:01"), (None, "?")],
)
def test_durations_are_hours_minutes_seconds(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_rank_0_logs_from_info_and_others_from_error(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("megashear.anything")
    configure_logging(0)
    logger.info("loss 2")
    configure_logging(1)
    logger.warning("loss 3")
    logger.error("lost")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["INFO loss 2", "[rank 1] ERROR lost"]


def test_configuring_twice_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    configure_logging(0)
    logging.getLogger("megashear").info("loss 2")
    assert capsys.readouterr().err.count("loss 2") == 1


@pytest.mark.parametrize(
    ("stream", "rank", "shown"),
    [(Terminal(), 0, True), (Terminal(), 1, False), (io.StringIO(), 0, False)],
)
def test_a_bar_shows_on_rank_0_of_a_terminal(stream: io.StringIO, rank: int, shown: bool) -> None:
    with progress(10, rank=rank, initial=2, desc="prune", stream=stream) as bar:
        bar.update()
    assert ("prune" in stream.getvalue()) is shown


def test_log_lines_do_not_tear_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    configure_logging(0)
    with progress(10, desc="prune"):
        logging.getLogger("megashear").info("loss 2")
    # The bar is wiped from its line, the record stands there whole, the bar is drawn anew.
    before, after = stream.getvalue().split("INFO loss 2\n")
    wiped = before.split("\r")[-1]
    assert "prune" not in wiped
    assert "prune" in after


def test_a_plain_handler_would_tear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    with progress(10, desc="prune", stream=stream):
        logging.StreamHandler(stream).emit(
            logging.LogRecord("megashear", logging.INFO, "", 0, "INFO loss 2", None, None)
        )
    before, _ = stream.getvalue().split("INFO loss 2\n")
    assert "prune" in before.split("\r")[-1]
