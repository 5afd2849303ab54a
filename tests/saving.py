"""Save a run's state in one call."""

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer

from megashear.checkpoint.description import Description
from megashear.checkpoint.saver import Saver
from megashear.checkpoint.store import MaskState, run_state
from megashear.parallel.groups import ParallelGroups


def save_run(
    root: Path | str,
    description: Description,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    *,
    masks: MaskState | None = None,
    tokenizer: Path | str | None = None,
) -> Path:
    """Write one iteration and wait until it is visible. Collective over the world.

    Args and errors are those of `run_state` and `Saver.save`.

    Returns:
        The iteration's directory.
    """
    state = run_state(description, chunks, optimizer, groups, masks=masks)
    (saved,) = Saver(root, groups).save(description, state, tokenizer=tokenizer)
    return saved.directory
