"""What a run resumes from: tensors of model, optimizer and objective, and parts by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megashear.checkpoint.description import Description
from megashear.checkpoint.details import GUARD, REWEIGHTING
from megashear.checkpoint.store import load_run, run_state
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.objectives import Objective

_SINCE = frozenset({GUARD, REWEIGHTING})
"""Parts that older releases did not save, or that a run may begin to have when it is resumed."""


class Stateful(Protocol):
    """A part of a run that knows what it must resume from."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return plain values, fit for JSON."""

    def load_state_dict(self, state: Any) -> None:
        """Resume where the part that gave ``state`` stood."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that a checkpoint of a run holds; whoever has state gives and takes it."""

    shape: ModelShape
    """Of the model that is trained."""
    chunks: Sequence[DistributedDataParallel]
    """This rank's model chunks."""
    optimizer: MegatronOptimizer
    """Of the weights."""
    objective: Objective
    """Keeps tensors and plain values of its own."""
    groups: ParallelGroups
    """Where this rank stands."""
    parts: Mapping[str, Stateful]
    """Whatever else has state, by its name in a checkpoint; plain values."""
    facts: Mapping[str, Any]
    """Plain values that are the same in every checkpoint of the run: its flags, its target."""
    counts: Callable[[], Mapping[str, Any]]
    """Gives plain values for those who read checkpoints, not for resuming: samples read."""
    token_ids: Mapping[str, Any]
    """Special tokens as the source's config.json has them."""

    def description(self, step: int) -> Description:
        """Return the description of a checkpoint of ``step`` steps done."""
        return Description(
            shape=self.shape,
            iteration=step,
            stage=self.objective.stage,
            token_ids=dict(self.token_ids),
            details={
                **self.facts,
                **{name: part.state_dict() for name, part in self.parts.items()},
                **self.counts(),
                **self.objective.details(),
            },
        )

    def tensors(self, description: Description) -> dict[str, Any]:
        """Return this rank's share of all tensors, as `Saver.save` takes it."""
        return run_state(
            description, self.chunks, self.optimizer, self.groups, masks=self.objective.state()
        )

    def load_tensors(self, checkpoint: Path) -> Description:
        """Fill model, optimizer and objective. Collective over the world.

        Args:
            checkpoint: one iteration's directory.

        Returns:
            What the checkpoint says of itself.

        Raises:
            ValueError: as `load_run`.
        """
        return load_run(
            checkpoint, self.chunks, self.optimizer, self.groups, masks=self.objective.state()
        )

    def load_parts(self, description: Description) -> None:
        """Fill the parts from what a checkpoint says of itself.

        Raises:
            ValueError: equal on every rank: a part is not there.
        """
        saved = description.details
        if missing := sorted(self.parts.keys() - saved.keys() - _SINCE):
            raise ValueError(
                f"the checkpoint of step {description.iteration} has no state of its "
                f"{', '.join(missing)}, so that no run can resume from it; add --finetune to start "
                f"again from its weights"
            )
        for name, part in self.parts.items():
            if name in saved:
                part.load_state_dict(saved[name])
