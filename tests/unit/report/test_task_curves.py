"""Scores in tasks are drawn: shares on one panel, perplexities on another."""

import pytest

pytest.importorskip("matplotlib")

from megashear.report.task_curves import tasks_caption, tasks_figure, tasks_of

POINTS = {
    "train/lm-loss": {1: 4.0},
    "eval/task/piqa/acc": {10: 0.5, 20: 0.625},
    "eval/task/lambada/acc": {10: 0.25, 20: 0.5},
    "eval/task/lambada/perplexity": {10: 90.0, 20: 30.0},
}


def test_every_score_is_a_line_and_perplexities_stand_apart() -> None:
    assert tasks_of(POINTS) == ["lambada/acc", "lambada/perplexity", "piqa/acc"]
    shares, others = tasks_figure(POINTS).get_axes()
    assert [line.get_label() for line in shares.get_lines()] == ["lambada/acc", "piqa/acc"]
    assert [list(line.get_ydata()) for line in others.get_lines()] == [[90.0, 30.0]]
    assert "piqa/acc from 0.5 to 0.625." in tasks_caption(POINTS)


def test_a_run_without_tasks_has_none() -> None:
    assert tasks_of({"train/lm-loss": {1: 4.0}}) == []
