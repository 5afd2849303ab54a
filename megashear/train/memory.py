"""What the ranks of a run are about to hold, for the log."""

from __future__ import annotations

import logging

from megashear.config import PretrainRun, PruneRun
from megashear.parallel.groups import ParallelGroups
from megashear.planning.memory import fullest
from megashear.planning.work import GIB, Work
from megashear.shape import ModelShape
from megashear.train.objectives import LanguageModelling, StructuredPruning

logger = logging.getLogger(__name__)


def tell_memory(
    config: PruneRun | PretrainRun,
    shape: ModelShape,
    objective: LanguageModelling,
    groups: ParallelGroups,
) -> None:
    """Log what the fullest rank will hold, as `megashear plan` counts it."""
    masks, streams = frozenset[str](), 1
    if isinstance(objective, StructuredPruning):
        masks, streams = frozenset(objective.masks.parts), objective.config.mask_noise_streams
    work = Work(
        shape=shape,
        parallel=config.parallel,
        model=config.model,
        seq_length=config.train.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        num_microbatches=config.train.num_microbatches(groups.data_size),
        data_size=groups.data_size,
        masks=masks,
        noise_streams=-(-streams // groups.data_size),
    )
    stage, memory = fullest(work)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.parts().items() if size)
    logger.info(
        "a rank of stage %d is planned to hold most, %.2f GiB at its fullest: %s",
        *(stage, memory.total / GIB, parts),
    )
