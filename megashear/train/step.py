"""One optimizer step, which the loop, the tests of the laws and the benchmarks share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megashear.data.batch import MicroBatch
from megashear.monitor import tags
from megashear.parallel import device
from megashear.parallel.agree import flat_all_reduce
from megashear.parallel.groups import ParallelGroups
from megashear.train.guard import StepGuard
from megashear.train.objectives import Objective
from megashear.train.optim import ready_gradients, schedule_fraction, step_with_norm
from megashear.train.schedule import SequenceLosses
from megashear.train.stops import REQUESTS

_, COMPUTE, _, OPTIMIZER = tags.STEP_PARTS

WEIGHTS = "weights"
"""Name of the norm of the weights' gradients."""


class Step(NamedTuple):
    """What a step gave; all but ``losses`` is equal on every rank."""

    losses: list[SequenceLosses]
    """Of each microbatch on the last stage; none on others."""
    norms: Mapping[str, float]
    """Gradient norms before clipping, by what they are of: the weights, and the objective's own."""
    request: float
    """Request to stop that ranks agreed on, as `Stops` has it; 0 is none."""
    skipped: str | None
    """Why no weight was moved; None where the step was taken."""


def no_part(name: str) -> contextlib.AbstractContextManager[None]:
    """Time nothing: the part of a step that is called ``name`` has no clock."""
    return contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Everything that one step of a rank needs; its methods are collective over the world."""

    chunks: Sequence[DistributedDataParallel]
    """This rank's model chunks."""
    objective: Objective
    """What is minimised."""
    optimizer: MegatronOptimizer
    """Of the weights."""
    schedule: OptimizerParamScheduler
    """Of the learning rate; it moves on with every step, taken or not."""
    peak_lr: float
    """Largest learning rate of the schedule, by which the objective scales rates of its own."""
    groups: ParallelGroups
    """Where this rank stands."""
    guard: StepGuard
    """Judges whether a step is taken."""

    def __call__(
        self,
        batches: Sequence[MicroBatch],
        step: int,
        *,
        asked: float = 0.0,
        part: Callable[[str], contextlib.AbstractContextManager[None]] = no_part,
    ) -> Step:
        """Make a step.

        Args:
            batches: this replica's microbatches.
            step: steps done before.
            asked: this rank's request to stop.
            part: times the parts of a step, by the names of ``tags.STEP_PARTS``.
        """
        with part(COMPUTE):
            losses = self.gradients(batches, step)
        with part(OPTIMIZER):
            return self.apply(losses, step, asked=asked)

    def gradients(self, batches: Sequence[MicroBatch], step: int) -> list[SequenceLosses]:
        """Make the gradients of a step, in place of those of the step before.

        Returns:
            As `Step.losses`.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.objective.forward_backward(batches, step)

    def apply(self, losses: Sequence[SequenceLosses], step: int, *, asked: float = 0.0) -> Step:
        """Move weights, and whatever else the objective learns, unless the guard objects.

        Args:
            losses: what :meth:`gradients` returned.
            step: steps done before.
            asked: this rank's request to stop.
        """
        fraction = schedule_fraction(self.schedule, self.peak_lr)
        # before anything moves: what is not finite would go into every weight
        norms = {WEIGHTS: ready_gradients(self.optimizer), **self.objective.norms()}
        loss, request = self.agree(losses, asked)
        skipped = self.guard.judge(loss, norms)
        if skipped is None:
            step_with_norm(self.optimizer, norms[WEIGHTS])
        self.objective.update(step, fraction, skip=skipped is not None)
        self.schedule.step(1)
        return Step(list(losses), norms, request, skipped)

    def agree(self, losses: Sequence[SequenceLosses], asked: float) -> tuple[float, float]:
        """Return the mean loss of the global batch, and the greatest request of any rank."""
        sums = torch.zeros(2 + len(REQUESTS), dtype=torch.float64, device=device.device())
        for of_batch in losses:  # on the last stage, by all tensor ranks alike
            sums[0] += of_batch.sums.double().sum()
            sums[1] += of_batch.counts.double().sum()
        if asked:
            sums[2 + REQUESTS.index(asked)] = 1.0
        (sums,) = flat_all_reduce([sums], self.groups.world)
        loss, tokens, *askers = sums.tolist()
        requests = [request for request, count in zip(REQUESTS, askers) if count]
        return loss / tokens if tokens else math.nan, max(requests, default=0.0)
