"""What a run looks at beside its steps: a list, of which each says when it is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megashear.data.mixture import DomainMixture
from megashear.models.llama import unwrap
from megashear.monitor.sinks import Sink
from megashear.parallel.agree import assert_replicated, assert_same_bits
from megashear.parallel.groups import ParallelGroups


class Moment(NamedTuple):
    """When an evaluation happens."""

    step: int
    """Steps done."""
    is_end: bool
    """Whether the run has ended; else training continues afterwards."""


class Evaluation(Protocol):
    """Something that is looked at now and then; its methods are called by all ranks alike."""

    def due(self, moment: Moment) -> bool:
        """Return whether to run at this moment, equal on every rank.

        Called more than once for a moment, so it must change nothing. At the end an evaluation
        whose interval divides the last step has just run: it gives other tags, or is not due.
        """

    def run(self, moment: Moment, sink: Sink) -> dict[str, float]:
        """Look, and return points by tag. Collective over the world.

        Args:
            moment: now.
            sink: where images and histograms go; points are written by the caller.
        """


def is_due(interval: int, step: int) -> bool:
    """Return whether ``interval`` steps, of which 0 means never, divide ``step``."""
    return bool(interval) and step % interval == 0


class EqualCopies:
    """Compares what ranks hold copies of: weights, the mixture, and copies of the objective.

    Args:
        chunks: this rank's model chunks.
        mixture: of the domains.
        replicated: gives what else every rank has a copy of, by name.
        groups: where this rank stands.
        interval: steps between evaluations within the run; 0 for none.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        mixture: DomainMixture,
        replicated: Callable[[], dict[str, Tensor]],
        groups: ParallelGroups,
        interval: int,
    ) -> None:
        self._chunks, self._mixture, self._replicated = chunks, mixture, replicated
        self._groups, self._interval = groups, interval

    def due(self, moment: Moment) -> bool:
        """Return whether the interval of the run's evaluations is over, or the run."""
        return moment.is_end or is_due(self._interval, moment.step)

    def run(self, moment: Moment, sink: Sink) -> dict[str, float]:
        """Compare copies; nothing is measured.

        Raises:
            RuntimeError: on every rank, where copies differ.
        """
        when = f"step {moment.step}"
        mixture = {"domain weights": self._mixture.weights, "samples owed": self._mixture.owed}
        assert_replicated({name: torch.from_numpy(each) for name, each in mixture.items()}, when)
        weights = {
            f"chunk {number} {name}": parameter
            for number, chunk in enumerate(self._chunks)
            for name, parameter in unwrap(chunk).named_parameters()
        }
        assert_same_bits(weights, when, self._groups.data, "data-parallel")
        copies = {
            name: parameter
            for name, parameter in weights.items()
            if not getattr(parameter, "tensor_model_parallel", False)
        }
        assert_same_bits(copies, when, self._groups.tensor, "tensor-parallel")
        if copies := self._replicated():
            assert_replicated(copies, when)
        return {}
