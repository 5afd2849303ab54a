"""The model of a run that is under way, asked about text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megashear.config import TrainConfig
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.tokenizer.models import Tokenizer
from megashear.train.objectives import Objective
from megashear.train.pruning import EXACT
from megashear.train.reading import Reader


@dataclass(frozen=True, kw_only=True)
class RunReader:
    """Opens a run's model for questions; while masks are learned, the one that would be cut."""

    objective: Objective
    shape: ModelShape
    tokenizer: Tokenizer
    ends: frozenset[int]
    """Tokens that end a text."""
    train: TrainConfig
    """Batch sizes."""
    groups: ParallelGroups
    beat: Callable[[str], None]
    """Is told of every few batches, see `Watchdog`."""

    @property
    def mode(self) -> str:
        """Mode of the evaluation that prepares the model."""
        modes = self.objective.modes()
        return EXACT if EXACT in modes else modes[0]

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reader]:
        """Prepare the model. Collective over the replica's model group."""
        with self.objective.evaluating(self.mode) as model:
            yield Reader(
                model=model,
                shape=self.shape,
                groups=self.groups,
                micro_batch_size=self.train.eval_micro_batch_size or self.train.micro_batch_size,
                beat=self.beat,
            )
