"""Scores in downstream tasks while a model is trained."""

from __future__ import annotations

import logging

from megashear.config import TrainConfig
from megashear.monitor import tags
from megashear.monitor.sinks import Sink
from megashear.tasks.find import LoadedTasks, find_tasks
from megashear.train.evaluations import Moment, is_due
from megashear.train.run_reader import RunReader

logger = logging.getLogger(__name__)


def load_run_tasks(train: TrainConfig, *, is_dry_run: bool = False) -> LoadedTasks | None:
    """Load the tasks of --eval-tasks; None where there are none, or where nothing is started.

    Args:
        train: has the flags.
        is_dry_run: only look whether the tasks exist.

    Raises:
        ValueError: anything a user can correct.
    """
    if not train.eval_tasks:
        return None
    found = find_tasks(train.eval_tasks, include_path=train.include_path, flag="--eval-tasks")
    return None if is_dry_run else found.load()


class TaskScores:
    """Asks tasks at every interval, and at the end.

    Args:
        reader: opens the model.
        tasks: the tasks.
    """

    def __init__(self, reader: RunReader, tasks: LoadedTasks) -> None:
        self._reader, self._tasks = reader, tasks

    def due(self, moment: Moment) -> bool:
        """Return whether tasks are to be asked, once at every step at most."""
        # at the end of the run the interval may just have been over
        return is_due(self._reader.train.eval_tasks_interval, moment.step) != moment.is_end

    def run(self, moment: Moment, sink: Sink) -> dict[str, float]:
        """Ask all tasks, log a line, and return scores by tag."""
        # Imported here, because the harness may not be installed.
        from megashear.train.harness import ReadingModel, run_tasks

        run, tasks = self._reader, self._tasks
        with run.reading() as reader:
            found = run_tasks(
                ReadingModel(reader, run.tokenizer, run.ends, prepend_bos=True),
                tasks,
                limit=run.train.eval_tasks_limit,
                has_errors=False,
            )
        scores = tasks.scores_of(found)
        label = run.objective.label(run.mode)
        line = " | ".join(f"{name} {score:.4g}" for name, score in scores.items())
        logger.info("step %d: %s%s", moment.step, line, f" [{label}]" if label else "")
        return {tags.task_score(name): score for name, score in scores.items()}
