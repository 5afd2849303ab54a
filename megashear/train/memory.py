"""Log what the ranks of a run are about to hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from megashear.config import FinetuneRun, TrainingRun
from megashear.parallel.groups import ParallelGroups
from megashear.planning.memory import Memory, evaluation_memory, fullest_stage
from megashear.planning.work import GIB, Work
from megashear.shape import ModelShape
from megashear.train.objectives import Objective

logger = logging.getLogger(__name__)


def tell_memory(
    config: TrainingRun,
    shape: ModelShape,
    objective: Objective,
    groups: ParallelGroups,
) -> None:
    """Log what the fullest rank will hold, as `megashear plan` counts it, and what is left out."""
    work = Work(
        shape=shape,
        parallel=config.parallel,
        model=config.model,
        seq_length=config.train.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        num_microbatches=config.train.num_microbatches(groups.data_size),
        data_size=groups.data_size,
        **objective.planned(),
    )
    stage, memory = fullest_stage(work)
    when = ""
    for other, evaluation in _evaluations(config, work):
        if evaluation.total > memory.total:
            stage, memory, when = other, evaluation, " in an evaluation"
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.parts().items() if size)
    logger.info(
        "planned memory of the fullest rank, in stage %d: %.2f GiB%s: %s%s",
        *(stage, memory.total / GIB, when, parts, _not_counted(config)),
    )


def _evaluations(config: TrainingRun, work: Work) -> Iterator[tuple[int, Memory]]:
    """Yield each stage with what it holds while it evaluates."""
    train = config.train
    size = train.eval_micro_batch_size or train.micro_batch_size
    for stage in range(work.pipeline):
        yield stage, evaluation_memory(work, stage, micro_batch_size=size)


def _not_counted(config: TrainingRun) -> str:
    """Return what is set and no part of the plan."""
    model = config.model
    foreign = model.transformer_impl != "local"
    found = ["--pack"] * (isinstance(config, FinetuneRun) and config.data.pack)
    found += ["--reset-attention-mask"] * model.reset_attention_mask
    found += [f"--transformer-impl {model.transformer_impl}"] * foreign
    return f"; not counted: {', '.join(found)}" if found else ""
