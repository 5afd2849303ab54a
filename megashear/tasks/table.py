"""Scores that lm-evaluation-harness found, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megashear.tasks.scores import scores_of
from megashear.text_table import text_table


def scores_table(results: Mapping[str, Any]) -> str:
    """Return a row for each metric of each task and group.

    Args:
        results: of `lm_eval.evaluate`.
    """
    head = ["task", "metric", "filter", "examples", "score", "standard error"]
    rows = [
        [
            *(score.task, score.metric, score.behind),
            "" if score.shots is None else str(score.shots),
            _shown(score.value),
            "" if score.error is None else _shown(score.error),
        ]
        for score in scores_of(results)
    ]
    return text_table([head, *rows], left=3)


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
