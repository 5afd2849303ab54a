"""evaluate --tasks: from a model on disk and names of tasks to scores."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.config import EvaluateRun
from megashear.files import durable
from megashear.files.output import check_new_file, writing
from megashear.parallel.agree import check_same
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.tasks.find import FoundTasks, LoadedTasks, find_tasks
from megashear.tasks.sheared import TASKS, sheared_table
from megashear.tasks.table import scores_table
from megashear.tokenizer.models import Tokenizer
from megashear.train.environment import environment
from megashear.train.stored_model import StoredModel, find_model


def evaluate_tasks(config: EvaluateRun, *, command: Sequence[str] = ()) -> str:
    """Ask a model all tasks of --tasks, and write --output. Collective over the processes torchrun
    started.

    Args:
        config: the run.
        command: words of the command line, which the file keeps.

    Returns:
        A table of scores.

    Raises:
        ValueError: anything a user can correct.
    """
    prepared = prepare_tasks(config)
    tasks = prepared.found.load(num_shots=config.num_fewshot)
    with distributed(config.parallel, config.model) as groups:
        results = prepared.measure(tasks, groups, command)
        if config.output is not None and groups.rank == 0:
            with writing("--output", config.output):
                Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                durable.replace(Path(config.output), _json(results))
    return _tables(results, prepared)


@dataclass(frozen=True, kw_only=True)
class PreparedTasks:
    """A model and tasks, found and checked."""

    config: EvaluateRun
    model: StoredModel
    tokenizer: Tokenizer
    found: FoundTasks

    def measure(
        self,
        tasks: LoadedTasks,
        groups: ParallelGroups,
        command: Sequence[str] = (),
        *,
        has_samples: bool = False,
    ) -> dict[str, Any]:
        """Load the model and ask it all tasks. Collective over the world.

        Args:
            tasks: loaded from ``found``.
            groups: where this rank stands.
            command: words of the command line.
            has_samples: see `run_tasks`.

        Returns:
            What the harness writes: its results and how they were found.
        """
        # Imported here, because the harness may not be installed.
        from megashear.train.harness import ReadingModel, run_tasks

        config = self.config
        check_same({"documents of the tasks": tasks.sizes(), "model": self.model.shape.to_dict()})
        model, reader = self.model.open_reader(groups, config)
        lm = ReadingModel(
            *(reader, self.tokenizer, model.end_tokens(self.tokenizer)),
            prepend_bos=config.prepend_bos,
        )
        results = run_tasks(lm, tasks, limit=config.limit, has_samples=has_samples)
        return results | {
            "config": {
                "model": "megashear",
                "model_args": {
                    "directory": str(model.directory),
                    "stage": model.description.stage,
                    "masks": model.masks,
                    "prepend_bos": config.prepend_bos,
                    "bf16": config.model.bf16,
                },
                "batch_size": config.micro_batch_size,
                "limit": config.limit,
            },
            "model_name": str(model.directory),
            "max_length": reader.longest,
            "date": time.time(),
            "environment": environment(groups.world_size, command),
        }


def prepare_tasks(config: EvaluateRun) -> PreparedTasks:
    """Prepare `evaluate --tasks` before processes meet; no document of a task is read.

    Raises:
        ValueError: anything a user can correct.
    """
    if config.output is not None:
        check_new_file("--output", config.output)
    model = find_model(load=config.load, load_hf=config.load_hf, masks=config.masks)
    model.check_runnable(config.parallel, config.model)
    return PreparedTasks(
        config=config,
        model=model,
        tokenizer=model.open_tokenizer(config.tokenizer_model),
        found=find_tasks(config.tasks, include_path=config.include_path),
    )


def _json(results: dict[str, Any]) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, indent=2, default=handle_non_serializable) + "\n"


def _tables(results: dict[str, Any], prepared: PreparedTasks) -> str:
    tables = [scores_table(results)]
    if prepared.found.shots.keys() >= TASKS.keys():
        tables.append(sheared_table(results, prepared.model.directory.name))
    return "\n\n".join(tables)
