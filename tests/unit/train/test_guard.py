"""Steps that are not taken: not finite, or a spike; counted, and given up after too many."""

from __future__ import annotations

import math

import pytest

from megashear.config import TrainConfig
from megashear.train.guard import StepGuard

FINE = {"weights": 1.0, "masks": 0.0}


def guard(**flags: float) -> StepGuard:
    return StepGuard(TrainConfig(**flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_skipped(loss: float) -> None:
    assert guard().judge(loss, FINE) == f"the loss is {loss}"


@pytest.mark.parametrize("what", ["weights", "masks"])
def test_a_gradient_that_is_not_finite_is_skipped(what: str) -> None:
    assert guard().judge(2.0, FINE | {what: math.inf}) == f"the gradient norm of {what} is inf"


def test_a_spike_is_skipped_once_there_is_a_mean_to_compare_with() -> None:
    judge = guard(loss_spike_factor=2.0)
    assert judge.judge(100.0, FINE) is None  # the first loss is the mean
    for _ in range(60):
        assert judge.judge(3.0, FINE) is None
    reason = judge.judge(6.5, FINE)
    assert reason is not None
    assert "6.5000 is above --loss-spike-factor 2 times the mean 3." in reason
    assert (judge.in_a_row, judge.not_finite) == (1, 0)  # finite, so that the weights are
    assert judge.judge(5.9, FINE) is None
    assert guard().judge(1e9, FINE) is None  # off unless asked for


def test_too_many_in_a_row_give_up_and_one_taken_starts_again() -> None:
    judge = guard(max_skipped_steps=2)
    for _ in range(2):
        judge.judge(math.nan, FINE)
        assert not judge.gives_up
    judge.judge(3.0, FINE)
    for _ in range(2):
        judge.judge(math.nan, FINE)
    assert not judge.gives_up
    judge.judge(math.nan, FINE)
    assert judge.gives_up
    assert judge.skipped == 5
    assert judge.not_finite == 3
    again = guard(max_skipped_steps=2)
    again.load_state_dict(judge.state_dict())
    assert (again.in_a_row, again.not_finite) == (3, 0)  # this process has seen none


def test_none_is_skipped_where_none_is_allowed() -> None:
    judge = guard(max_skipped_steps=0)
    judge.judge(math.nan, FINE)
    assert judge.gives_up


def test_a_guard_goes_on_where_another_stood() -> None:
    one, other = guard(loss_spike_factor=1.2), guard(loss_spike_factor=1.2)
    losses = [4.0 - 0.1 * step for step in range(20)]
    for loss in losses:
        one.judge(loss, FINE)
    other.load_state_dict(one.state_dict())
    assert [one.judge(4.0, FINE), one.state_dict()] == [other.judge(4.0, FINE), other.state_dict()]
    assert one.skipped == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss_spike_factor": 0.5}, r"--loss-spike-factor is 0.5: .* wanted more than 1"),
        ({"loss_spike_factor": math.nan}, r"--loss-spike-factor is nan; wanted 0 to 1e"),
        ({"max_skipped_steps": -1}, r"--max-skipped-steps is -1"),
        ({"distributed_timeout_minutes": 0.0}, r"--distributed-timeout-minutes is 0.0; wanted"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guard(**flags)
