"""Scores in downstream tasks while a model is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megashear.config import TrainConfig
from megashear.monitor import tags
from megashear.monitor.sinks import Sink
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.tasks.find import LoadedTasks, find_tasks
from megashear.tokenizer.choice import load_tokenizer
from megashear.tokenizer.models import Tokenizer
from megashear.train.evaluations import Moment, is_due
from megashear.train.objectives import Objective
from megashear.train.pruning import EXACT
from megashear.train.reading import Reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunTasks:
    """Tasks that a run asks now and then."""

    tasks: LoadedTasks
    tokenizer: Tokenizer


def load_run_tasks(
    train: TrainConfig, tokenizer: Path, *, is_dry_run: bool = False
) -> RunTasks | None:
    """Load the tasks of --eval-tasks; None where there are none, or where nothing is started.

    Args:
        train: has the flags.
        tokenizer: directory of the run's tokenizer.
        is_dry_run: only look whether the tasks exist.

    Raises:
        ValueError: anything a user can correct.
    """
    if not train.eval_tasks:
        return None
    found = find_tasks(train.eval_tasks, include_path=train.include_path, flag="--eval-tasks")
    if is_dry_run:
        return None
    return RunTasks(tasks=found.load(), tokenizer=load_tokenizer(tokenizer))


class TaskScores:
    """Asks tasks at every interval, and at the end.

    While masks are learned, the model that would be cut is asked.

    Args:
        objective: whose model is asked.
        asked: the tasks.
        train: interval, batch sizes.
        shape: of the model.
        groups: where this rank stands.
        beat: is told of every few batches, see `Watchdog`.
    """

    def __init__(
        self,
        objective: Objective,
        asked: RunTasks,
        train: TrainConfig,
        shape: ModelShape,
        groups: ParallelGroups,
        beat: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self._objective, self._asked, self._train = objective, asked, train
        self._shape, self._groups, self._beat = shape, groups, beat

    def due(self, moment: Moment) -> bool:
        """Return whether tasks are to be asked, once at every step at most."""
        # at the end of the run the interval may just have been over
        return is_due(self._train.eval_tasks_interval, moment.step) != moment.is_end

    def run(self, moment: Moment, sink: Sink) -> dict[str, float]:
        """Ask all tasks, log a line, and return scores by tag."""
        # Imported here, because the harness may not be installed.
        from megashear.train.harness import ReadingModel, run_tasks

        modes, train = self._objective.modes(), self._train
        mode = EXACT if EXACT in modes else modes[0]
        tokenizer, tasks = self._asked.tokenizer, self._asked.tasks
        with self._objective.evaluating(mode) as model:
            reader = Reader(
                model=model,
                shape=self._shape,
                groups=self._groups,
                micro_batch_size=train.eval_micro_batch_size or train.micro_batch_size,
                beat=self._beat,
            )
            ends = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
            found = run_tasks(
                ReadingModel(reader, tokenizer, ends, prepend_bos=True),
                tasks,
                limit=train.eval_tasks_limit,
                has_errors=False,
            )
        scores = tasks.scores_of(found)
        label = self._objective.label(mode)
        line = " | ".join(f"{name} {score:.4g}" for name, score in scores.items())
        logger.info("step %d: %s%s", moment.step, line, f" [{label}]" if label else "")
        return {tags.task_score(name): score for name, score in scores.items()}
