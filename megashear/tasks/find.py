"""Find tasks of lm-evaluation-harness by name, and load their documents."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.tasks.scores import scores_of
from megashear.tasks.sheared import SHEARED, TASKS

logger = logging.getLogger(__name__)

_FEWSHOT_SEED = 1234
"""Draws examples before questions. Source: lm_eval.defaults, so that scores are the harness's."""


@dataclass(frozen=True, kw_only=True)
class LoadedTasks:
    """Tasks with their documents, ready to be asked."""

    tasks: Any
    """The harness's tasks and groups by name."""

    def begin(self) -> Any:
        """Return the tasks for `lm_eval.evaluate`, which will draw the same examples every time."""
        for task in self.tasks["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        return self.tasks

    def scores_of(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Return all scores as ``task/metric``, without standard errors.

        A group that has scores of its own stands for its tasks.

        Args:
            results: of `lm_eval.evaluate` on these tasks.
        """
        of_groups = results.get("groups", {})
        inside = {
            task.task_name
            for name in of_groups
            for task in self.tasks["groups"][name].get_all_tasks()
        }
        alone = [name for name in self.tasks["tasks"] if name not in inside]
        found = {name: results["results"][name] for name in alone} | of_groups
        return {
            f"{score.task}/{score.metric}"
            + (f",{score.behind}" if score.behind else ""): score.value
            for score in scores_of({"results": found})
        }

    def sizes(self) -> dict[str, int]:
        """Return the number of documents of each task."""
        return {name: len(task.eval_docs) for name, task in self.tasks["tasks"].items()}


@dataclass(frozen=True, kw_only=True)
class FoundTasks:
    """Tasks and groups that exist; nothing of their data was read."""

    names: Sequence[str]
    shots: Mapping[str, int]
    """Examples before each question, of tasks that have them by the paper."""
    manager: Any
    """The harness's own, which knows all tasks."""
    flag: str
    """What named the tasks, for messages."""

    def load(self, *, num_shots: int | None = None) -> LoadedTasks:
        """Load the documents of all tasks, from local files or from a hub.

        Args:
            num_shots: examples before each question; those of the paper or of each task unless
                given. A task that says it has none keeps none.

        Raises:
            ValueError: a task cannot be loaded, or two names stand for it.
        """
        import datasets

        tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        named_by: dict[str, str] = {}
        if os.environ.get("RANK", "0") != "0":  # every rank loads, and one shows how far it is
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            datasets.disable_progress_bars()
        for name in self.names:
            try:
                found = self.manager.load([name])
            except Exception as error:  # whatever a task's own code or a hub's client raises
                raise ValueError(self._not_loaded(name, error)) from error
            if twice := sorted(named_by.keys() & found["tasks"].keys()):
                raise ValueError(self._named_twice(twice, named_by[twice[0]], name))
            named_by |= dict.fromkeys(found["tasks"], name)
            for task in found["tasks"].values():
                _set_shots(task, self.shots.get(name), num_shots)
            for part, each in tasks.items():
                each |= found.get(part, {})
        return LoadedTasks(tasks=tasks)

    def _named_twice(self, tasks: Sequence[str], first: str, second: str) -> str:
        others = f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""
        by = [f"{name} of {SHEARED}" if name in self.shots else name for name in (first, second)]
        return (
            f"{self.flag}: task {tasks[0]}{others} is named twice, by {' and by '.join(by)}, and "
            f"has one number of examples in a run; leave one of the two names out, or run the "
            f"command once for each"
        )

    def _not_loaded(self, name: str, error: Exception) -> str:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"{self.flag}: task {name} cannot be loaded: {first}. Data of the harness's own tasks "
            f"come from a hub: load them once where it is reached, and set HF_HOME to the cache "
            f"and HF_HUB_OFFLINE=1 here; or describe the task in a .yaml file of --include-path "
            f"that reads local JSON lines"
        )


def find_tasks(
    names: Sequence[str], *, include_path: str | None, flag: str = "--tasks"
) -> FoundTasks:
    """Find tasks and groups by name.

    Args:
        names: words with names, several in a word between commas; `SHEARED` stands for the tasks
            of the paper.
        include_path: directory of further task files, which are looked at first.
        flag: what named the tasks, for messages.

    Raises:
        ValueError: lm-evaluation-harness is not installed, or a task does not exist.
    """
    require_harness(flag)
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path} is not a directory of task files")
    wanted = [name.strip() for word in names for name in word.split(",") if name.strip()]
    if not wanted:
        raise ValueError(f"{flag} names no task; give names, say {flag} arc_easy,piqa")
    shots = {}
    if SHEARED in wanted:
        at = wanted.index(SHEARED)
        wanted[at : at + 1] = TASKS
        shots = {name: paper.num_shots for name, paper in TASKS.items()}
    wanted = list(dict.fromkeys(wanted))
    manager = None
    if include_path is not None:
        # the harness's own tasks are thousands of files, read only if one of them is wanted
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or _unknown(wanted, manager):
        manager = TaskManager(include_path=include_path)
    if unknown := _unknown(wanted, manager):
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3, cutoff=0.5)
        raise ValueError(
            f"{flag} {unknown[0]} is no task of lm-evaluation-harness"
            f"{'' if include_path is None else f' or of --include-path {include_path}'}; nearest: "
            f"{', '.join(near) or 'none'}; `lm-eval ls tasks` lists all, and --include-path names "
            f"a directory of your own"
        )
    return FoundTasks(names=wanted, shots=shots, manager=manager, flag=flag)


def require_harness(flag: str) -> None:
    """Refuse to begin without lm-evaluation-harness.

    Raises:
        ValueError: it is not installed, or has another interface.
    """
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"{flag} is asked by lm-evaluation-harness, which is not installed: pip install "
            '"megashear[eval]"'
        ) from None
    numbers = [int(number) for number in version.split(".")[:3] if number.isdigit()]
    if not [0, 4, 12] <= numbers < [0, 5]:
        raise ValueError(
            f"{flag} needs lm-evaluation-harness 0.4.12 or later, below 0.5, and {version} is "
            f'installed: pip install "megashear[eval]"'
        )


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    known = frozenset(manager.all_tasks)
    return [name for name in names if name not in known and not Path(name).is_file()]


def _set_shots(task: Any, by_paper: int | None, asked: int | None) -> None:
    """Set the number of examples as the harness's own command does."""
    own = task.get_config("num_fewshot")
    wanted = by_paper if by_paper is not None else own or 0
    if asked is not None and own != 0:
        wanted = asked
    task.set_config(key="num_fewshot", value=wanted)
