"""What a run minimises, and all that the loop asks of it: it answers for itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megashear.checkpoint.store import MaskState
from megashear.data.batch import MicroBatch
from megashear.monitor.charts import Charts
from megashear.train.evaluations import Evaluation
from megashear.train.schedule import ForwardPass, SequenceLosses, run_schedule
from megashear.train.terms import CrossEntropy, LossTerm

LOSS = "loss"
"""Mode of an evaluation of the model as it is."""


class Objective:
    """What is minimised: terms of a loss, and whatever a subclass learns beside the weights.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        terms: terms of the loss; the cross entropy of the next token unless given.
    """

    stage = ""
    """What a checkpoint of such a run says that it is of."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        *,
        terms: Sequence[LossTerm] | None = None,
    ) -> None:
        self.chunks = list(chunks)
        self.terms: list[LossTerm] = [CrossEntropy()] if terms is None else list(terms)
        assert len({term.name for term in self.terms}) == len(self.terms), "terms have names"

    # a step

    def forward_backward(self, batches: Sequence[MicroBatch], step: int) -> list[SequenceLosses]:
        """Add the gradients of one step. Collective over the world.

        Args:
            batches: this replica's microbatches.
            step: counted from 0.

        Returns:
            Losses per microbatch on the last stage; none on others.
        """
        return run_schedule(
            self.chunks, batches, forward_only=False, terms=self.terms_of(batches, step)
        )

    def terms_of(self, batches: Sequence[MicroBatch], step: int) -> list[tuple[LossTerm, float]]:
        """Prepare the terms of a step, and return each with its weight."""
        for term in self.terms:
            term.prepare(batches, step)
        weights = self.weights_at(step)
        return [(term, weights[term.name]) for term in self.terms]

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weight of each term at a step, counted from 0."""
        return {term.name: term.weight_at(step) for term in self.terms}

    @property
    def further_terms(self) -> list[str]:
        """Names of the terms beside the cross entropy, which is measured in any case."""
        return [term.name for term in self.terms if not isinstance(term, CrossEntropy)]

    def norms(self) -> dict[str, float]:
        """Return norms of the gradients that the weights' optimizer does not know, by what they are
        of. Called once a step, before :meth:`update`."""
        return {}

    def update(self, step: int, schedule_fraction: float, *, skip: bool) -> None:
        """Step whatever the weights' optimizer does not know.

        Args:
            step: counted from 0.
            schedule_fraction: the weights' rate over its peak, this step.
            skip: leave everything where it is.
        """

    # reports

    def points(self) -> dict[str, float]:
        """Return the objective's own numbers of the last step, by tag."""
        return {}

    def line(self) -> str | None:
        """Return a line of the log on the last step, below the loop's; None for none."""
        return None

    def charts(self) -> Charts:
        """Return the charts of the objective's own tags."""
        return {}

    # evaluation

    def modes(self) -> list[str]:
        """Return names of the models to evaluate; the loss of the first steers the mixture."""
        return [LOSS]

    @contextlib.contextmanager
    def evaluating(self, mode: str) -> Iterator[ForwardPass]:
        """Prepare the model for evaluations in ``mode``, and give what evaluates it.

        Collective over the replica's model group.
        """
        yield ForwardPass(chunks=self.chunks)

    def mode_points(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return points of what modes say beside each other, by tag.

        Args:
            means: mean held-out loss of each mode.
        """
        return {}

    def label(self, mode: str) -> str:
        """Return how a log line names a mode; nothing for the model as it is."""
        return ""

    def evaluations(self, interval: int) -> list[Evaluation]:
        """Return what is to be looked at beside held-out losses.

        Args:
            interval: steps between evaluations within the run; 0 for none.
        """
        return []

    # state

    def state(self) -> MaskState | None:
        """Return the tensors that a checkpoint keeps beside weights and their optimizer."""
        return None

    def details(self) -> dict[str, Any]:
        """Return plain values that a checkpoint keeps of the objective, fit for JSON."""
        return {}

    def replicated(self) -> dict[str, Tensor]:
        """Return what every rank has a copy of, by name; copies are compared at evaluations."""
        return {}

    # planning

    def planned(self) -> dict[str, Any]:
        """Return fields of `planning.work.Work` that the objective adds."""
        found: dict[str, Any] = {"has_entropy": len(self.further_terms) < len(self.terms)}
        for term in self.terms:
            found |= term.planned()
        return found


class LanguageModelling(Objective):
    """Cross entropy of the next token, or other terms, without masks."""

    stage = "pretrain"


class InstructionTuning(LanguageModelling):
    """Cross entropy of the assistant's tokens alone; all others have a loss mask of 0."""

    stage = "finetune"
