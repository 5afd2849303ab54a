"""What people and scripts see of a run's result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megashear.train.result import RunResult

DONE = RunResult(
    step=7,
    stopped=None,
    exit_status=0,
    skipped_last=0,
    held_out={"loss": {"c": 4.5}},
    held_out_errors={"loss": {"c": None}},
    eval_sequences=8,
    evaluation_share=0.12345,
    checkpoint=Path("saved/iter_0000007"),
    tensorboard="events",
)


def test_a_summary_has_the_keys_that_scripts_read() -> None:
    assert DONE.summary() == {
        "step": 7,
        "stopped": None,
        "exit status": 0,
        "steps skipped at the end": 0,
        "held-out loss": {"loss": {"c": 4.5}},
        "standard error": {"loss": {"c": None}},
        "evaluation": {"sequences per domain": 8, "share of wall time": 0.1235},
        "checkpoint": "saved/iter_0000007",
        "tensorboard": "events",
    }
    early = replace(DONE, ended_early="c has no more text").summary()
    assert early == DONE.summary() | {"ended early": "c has no more text"}


def test_a_job_of_both_has_a_summary_of_each_and_one_exit_status() -> None:
    found = replace(DONE, step=9, exit_status=143, pruning=DONE).summary()
    assert list(found) == ["pruning", "continued pretraining", "exit status"]
    assert found["exit status"] == 143
    without = {key: value for key, value in DONE.summary().items() if key != "exit status"}
    assert found["pruning"] == without
    assert found["continued pretraining"] == without | {"step": 9}
