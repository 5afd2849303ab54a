"""Spoiled weights: never saved where they are not finite, never in the place of good ones, and a
run that ends with them says which checkpoint is good and ends with a code of its own."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint.description import latest_iteration
from megashear.commands import outcome
from megashear.commands.outcome import user_errors
from megashear.config import PretrainRun, PruneRun
from megashear.train import checkpoints, run
from megashear.train import step as train_step
from megashear.train.stops import DIVERGED
from tests.distributed.test_resume import WHOLE, configuration, differences, finished
from tests.ranks import run_ranks
from tests.text_run import TextRun
from tests.tiny import layout

GOOD = 2
"""Steps before the one that spoils the weights."""
SPLIT = layout(tp=2)
Config = PruneRun | PretrainRun


def steps_that_spoil(step: int, spoil: Callable[[Any], None]) -> None:
    """Spoil the weights as one step, counted from 1, is taken."""
    original, calls = train_step.step_with_norm, [0]

    def step_with_norm(optimizer: Any, norm: float) -> None:
        original(optimizer, norm)
        calls[0] += 1
        if calls[0] == step:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    spoil(parameter.data)

    train_step.step_with_norm = step_with_norm


def far_away(weights: Any) -> None:
    """As a rate of 1e30 does: still finite. Of norms: whatever comes before one is scaled away."""
    if weights.dim() == 1:
        weights.mul_(1e30)


def ended(config: Config, broken: Callable[[int], None]) -> tuple[int, str]:
    """Exit status of a run as a command, equal on both ranks, and the error that rank 0 prints."""

    def body(rank: int) -> tuple[int, list[str]]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        outcome.PATIENCE_S = 0.0  # no torchrun ends the second rank meanwhile
        broken(rank)

        @user_errors("megashear")
        def command(argv: object) -> int:
            (run.prune if isinstance(config, PruneRun) else run.pretrain)(config)  # type: ignore[arg-type]
            return 0

        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = command([])
        return status, [line for line in stderr.getvalue().splitlines() if "error" in line]

    (status, said), (other, same) = run_ranks(2, body)
    assert other == status  # by itself, and alike
    assert [line.replace("error on rank 1:", "error:") for line in same] == said
    return status, said[-1] if said else ""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "saved").glob("iter_*"))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "background", "step"),
    [("prune", False, WHOLE), ("pretrain", True, GOOD + 1)],
    ids=["prune-the-last-step", "pretrain-async"],
)
def test_the_last_good_checkpoint_stays_and_a_resume_begins_there(
    text: TextRun, tmp_path: Path, stage: str, background: bool, step: int
) -> None:
    more = {"save_interval": 1, "keep": 1, "max_skipped_steps": 1, "async_save": background}
    spoiled, whole = tmp_path / "spoiled", tmp_path / "whole"
    config = configuration(text, stage, SPLIT, spoiled, **more)
    status, said = ended(config, lambda rank: steps_that_spoil(step, far_away))
    assert status == DIVERGED == 4
    if step == WHOLE:
        assert f"step {WHOLE}: the held-out loss of" in said
        assert "is nan under " in said
    else:
        assert re.search(r"step \d: the [\w ]+ is \w+; samples of this step: \w+ \d+ to \d+", said)
        assert "--max-skipped-steps 1 in a row are used up" in said
        assert "since the update" not in said  # far away, and finite
    good = spoiled / "saved" / f"iter_{step - 1:07d}"
    assert f"The last checkpoint from before is {good}: lower --lr" in said
    assert said.endswith("and resume from it with --resume")
    assert latest_iteration(spoiled / "saved") == step - 1
    assert names(spoiled)[0] == good.name
    if step == WHOLE:
        return
    # what was saved since is set aside
    resumed = configuration(text, stage, SPLIT, spoiled, resume=True, **more)
    assert ended(resumed, lambda rank: None)[0] == 0
    assert ended(configuration(text, stage, SPLIT, whole, **more), lambda rank: None)[0] == 0
    assert differences(finished(spoiled), finished(whole)) == set()
    assert names(whole) == [f"iter_{WHOLE:07d}"]


def test_a_run_that_trusts_every_checkpoint_loses_the_good_one(
    text: TextRun, tmp_path: Path
) -> None:
    def trusting(rank: int) -> None:
        steps_that_spoil(GOOD + 1, far_away)
        checkpoints.RunCheckpoints._newest_good = lambda self, step: step  # type: ignore[method-assign]

    more = {"save_interval": 1, "keep": 1, "max_skipped_steps": 1}
    config = configuration(text, "pretrain", SPLIT, tmp_path, **more)
    assert ended(config, trusting)[0] == DIVERGED
    assert f"iter_{GOOD:07d}" not in names(tmp_path)


def one_number(weights: Any) -> None:
    weights.view(-1)[-1] = float("inf")


def test_the_first_step_that_is_not_finite_looks_at_the_weights(
    text: TextRun, tmp_path: Path
) -> None:
    def broken(rank: int) -> None:
        if rank == 1:
            steps_that_spoil(GOOD + 1, one_number)

    config = configuration(text, "pretrain", SPLIT, tmp_path, save_interval=GOOD)
    assert config.train.max_skipped_steps > 1  # it waits for no other step
    status, said = ended(config, broken)
    assert status == DIVERGED
    named = r"The weight [\w.]+\[[\d, ]+\] is inf since the update of step"
    assert re.search(rf"step {GOOD + 2}: the loss is nan; .*\. {named} {GOOD + 1}\.", said), said
    assert f"from before is {tmp_path}/saved/iter_{GOOD:07d}: lower --lr" in said


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_of_one_rank_that_are_not_finite_are_not_saved(
    text: TextRun, tmp_path: Path, bf16: bool
) -> None:
    def broken(rank: int) -> None:
        if rank == 1:
            steps_that_spoil(GOOD + 1, one_number)

    config = configuration(text, "pretrain", SPLIT, tmp_path, save_interval=1)
    config = replace(config, model=replace(config.model, bf16=bf16))
    status, said = ended(config, broken)
    assert status == DIVERGED
    assert re.search(rf"step {GOOD + 1} is not saved: [\w.]+\[[\d, ]+\] is inf", said), said
    assert f"from before is {tmp_path}/saved/iter_{GOOD:07d}: lower --lr" in said
    assert names(tmp_path) == ["iter_0000001", f"iter_{GOOD:07d}"]


def test_a_checkpoint_that_is_spoiled_is_refused_with_the_way_to_an_older_one(
    text: TextRun, tmp_path: Path
) -> None:
    def broken(rank: int) -> None:
        steps_that_spoil(GOOD, one_number)
        checkpoints.not_finite_anywhere = lambda state: None  # as before saves were looked at

    more = {"save_interval": 1, "exit_interval": GOOD}
    assert ended(configuration(text, "pretrain", SPLIT, tmp_path, **more), broken)[0] == 0
    resumed = configuration(text, "pretrain", SPLIT, tmp_path, resume=True, **more)
    status, said = ended(resumed, lambda rank: None)
    spoiled = tmp_path / "saved" / f"iter_{GOOD:07d}"
    assert status == 2
    way_out = f"move {spoiled} elsewhere, and the run resumes from the checkpoint before it"
    assert re.search(rf"checkpoint {spoiled}: [\w.]+\[[\d, ]+\] is inf; .*; {way_out}", said), said
    assert "download" not in said  # nobody did
    spoiled.rename(tmp_path / "elsewhere")
    assert ended(resumed, lambda rank: None)[0] == 0
    assert names(tmp_path) == ["iter_0000001", spoiled.name]


def test_a_run_that_ends_while_steps_are_skipped_ends_with_the_code_too(
    text: TextRun, tmp_path: Path
) -> None:
    def broken(rank: int) -> None:
        original, calls = train_step.ready_gradients, [0]

        def ready_gradients(optimizer: Any) -> float:
            calls[0] += 1
            return float("nan") if calls[0] == WHOLE else original(optimizer)

        train_step.ready_gradients = ready_gradients

    def body(rank: int, again: bool = False) -> tuple[int, str]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "1"}
        if not again:
            broken(rank)
        reached = run.pretrain(
            replace(config, train=replace(config.train, resume=again))  # type: ignore[arg-type]
        )
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            outcome.report_stop("megashear pretrain", reached, resumes=False)
        return reached.exit_status, stderr.getvalue()

    more = {"save_interval": 1, "keep": 1}
    config = configuration(text, "pretrain", layout(), tmp_path, **more)
    ((status, said),) = run_ranks(1, body)
    assert status == DIVERGED
    assert said.startswith("megashear pretrain: the last step was skipped, so no later step shows")
    assert said.endswith("; the same command with --resume takes the weights as they are\n")
    # the last weights that a step was taken from
    assert f"iter_{WHOLE - 2:07d}" in names(tmp_path)
    # no dead end: who starts again has read it
    assert run_ranks(1, lambda rank: body(rank, again=True)) == [(0, "")]


def test_a_run_without_good_checkpoints_says_so(text: TextRun, tmp_path: Path) -> None:
    more = {"save_interval": 1, "max_skipped_steps": 0}
    config = configuration(text, "pretrain", SPLIT, tmp_path, **more)
    status, said = ended(config, lambda rank: steps_that_spoil(1, far_away))
    assert status == DIVERGED
    assert "is known to be good: lower --lr" in said
    assert said.endswith("try --resume, or start anew with another --save")
