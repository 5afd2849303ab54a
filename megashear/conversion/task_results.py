"""Read scores of tasks from a results file of lm-evaluation-harness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megashear.files.structured import read_json_object
from megashear.tasks.scores import Score, scores_of


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
        scores = tuple(score for score in scores_of(values) if math.isfinite(score.value))
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
