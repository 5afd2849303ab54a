"""Read scores of tasks from a results file of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.files.structured import read_json_object

_ERROR = "_stderr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    """Name of the metric, with its filter where it has one: "acc", "exact_match (strict-match)"."""
    value: float
    error: float | None
    """Standard error; None where it is not known."""
    shots: int | None
    """Examples in the prompt; None where the file does not say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResults:
    """Scores of a results file."""

    scores: tuple[Score, ...]
    harness: str
    """What scored, with its version where the file has it."""


def read_results(path: Path | str, flag: str) -> TaskResults:
    """Read a results file in the format of lm-evaluation-harness 0.4.

    Args:
        path: the file.
        flag: flag that named it, for messages.

    Raises:
        ValueError: it is not there, or no such file.
    """
    values = read_json_object(Path(path), f"{flag} {path}")
    try:
        scores = tuple(
            score
            for task, found in values["results"].items()
            for score in _scores(str(task), found, values.get("n-shot") or {})
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{flag} {path} is no results file of lm-evaluation-harness ({error!r}); give the JSON "
            f'that it wrote, with "results" by task'
        ) from None
    if not scores:
        raise ValueError(f"{flag} {path} has no score of any task; give a file with results")
    version = values.get("lm_eval_version")
    harness = "lm-evaluation-harness" + (f" {version}" if isinstance(version, str) else "")
    return TaskResults(scores=scores, harness=harness)


def _scores(task: str, found: Mapping[str, Any], shots: Mapping[str, Any]) -> list[Score]:
    scores = []
    for key, value in found.items():
        metric, _, name = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or metric.endswith(_ERROR):
            continue
        if metric in ("alias", "sample_len", "samples"):
            continue
        error = found.get(f"{metric}{_ERROR}" + (f",{name}" if name else ""))
        number = shots.get(task)
        scores.append(
            Score(
                task=task,
                metric=metric if name in ("", "none") else f"{metric} ({name})",
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                shots=number if isinstance(number, int) else None,
            )
        )
    return scores
