"""Scores that lm-evaluation-harness found, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megashear.text_table import text_table


def scores_table(results: Mapping[str, Any]) -> str:
    """Return a row for each metric of each task and group.

    Args:
        results: of `lm_eval.evaluate`.
    """
    head = ["task", "metric", "filter", "examples", "score", "standard error"]
    return text_table([head, *_rows(results)], left=3)


def _rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, comma, behind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{behind}")
            shots = results["n-shot"].get(name, "")
            yield [
                *(name, metric, "" if behind == "none" else behind, str(shots), _shown(value)),
                _shown(error) if isinstance(error, int | float) else "",
            ]


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
