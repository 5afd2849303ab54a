"""Scores in results of lm-evaluation-harness, which names a metric by ``metric,filter``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_ERROR = "_stderr"
_NO_METRICS = frozenset({"alias", "sample_len", "samples"})
"""Keys beside the metrics of a task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One metric of one task or group."""

    task: str
    metric: str
    behind: str
    """Filter that answers went through first; empty without one."""
    value: float
    error: float | None
    """Standard error; None where it is not known."""
    shots: int | None
    """Examples before each question; None where they are not known, or differ in a group."""


def scores_of(results: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the score of each metric of each task and group.

    Args:
        results: of `lm_eval.evaluate`, or what a file has of them.
    """
    all_shots = results.get("n-shot") or {}
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, name = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or metric.endswith(_ERROR) or metric in _NO_METRICS:
                continue
            error = found.get(f"{metric}{_ERROR}" + (f",{name}" if name else ""))
            shots = all_shots.get(task)
            yield Score(
                task=str(task),
                metric=metric,
                behind="" if name == "none" else name,
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                shots=shots if isinstance(shots, int) else None,
            )
