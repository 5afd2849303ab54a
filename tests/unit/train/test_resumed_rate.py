"""A resumed run whose learning rate jumps warns with both rates."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import pytest

from megashear.checkpoint.description import Description
from megashear.commands.settings import build
from megashear.config import PretrainRun
from megashear.train.fill import _warn_of_rate
from tests.text_run import SHAPE

SAVED = build(PretrainRun, {"data_path": "data", "train_iters": 120, "lr": 1e-3})
AT_120 = Description(
    shape=SHAPE, iteration=120, stage="pretrain", token_ids={}, details={"run": asdict(SAVED)}
)


def told(caplog: pytest.LogCaptureFixture, config: PretrainRun, before: float, now: float) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        _warn_of_rate(AT_120, config, before, now)
    return caplog.text


def test_a_rate_that_jumps_is_told_with_the_flags_that_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    longer = replace(SAVED, train=replace(SAVED.train, train_iters=240))
    line = told(caplog, longer, 1e-4, 5.5e-4)
    assert (
        "the learning rate jumps at step 120 from 0.0001, where the saved run left it, to 0.00055: "
        "--train-iters was 120 and is 240; --lr-decay-iters 120 keeps the decay that" in line
    )


def test_the_decay_is_named_only_where_its_length_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    higher = replace(SAVED, optimizer=replace(SAVED.optimizer, lr=1e-2))
    line = told(caplog, higher, 1e-4, 1e-3)
    assert line.rstrip().endswith("to 0.001: --lr was 0.001 and is 0.01")
    shorter = replace(SAVED, optimizer=replace(SAVED.optimizer, lr_decay_iters=60))
    assert "; --lr-decay-iters 120 keeps the decay" in told(caplog, shorter, 1e-4, 1e-5)


def test_a_rate_that_stays_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, SAVED, 1e-4, 1.0001e-4) == ""
    assert told(caplog, SAVED, 0.0, 0.0) == ""
