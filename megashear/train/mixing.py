"""The domains of a run: what is read from which, and how their weights move."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megashear.data.held_out import HeldOutSet
from megashear.data.loader import MixtureLoader
from megashear.data.manifest import DataManifest
from megashear.data.reweight import Reweighting
from megashear.data.shares import Vector
from megashear.monitor import tags
from megashear.monitor.sinks import Sink

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The domains of a run."""

    manifest: DataManifest
    """What was preprocessed."""
    loader: MixtureLoader
    """Gives the batches of this replica."""
    held_out: Sequence[HeldOutSet]
    """Held-out text of each domain."""
    references: Vector | None
    """Reference loss of each domain, where one is known."""
    reweighting: Reweighting | None
    """Moves the weights after evaluations; None leaves them alone."""
    phase_changes: Mapping[int, Vector]
    """Weights by the sample from which a phase has them, for the log; the mixture has them too."""
    eval_sequences: int
    """Held-out sequences per domain in an evaluation within the run."""


class Mixing:
    """Moves the weights of the domains, and logs them.

    Args:
        data: the domains.
        sink: where points go.
    """

    def __init__(self, data: RunData, sink: Sink) -> None:
        self._data, self._sink = data, sink
        self._mixture = data.loader.mixture
        self._logged = self._mixture.shares.tolist()
        self._logged_at = -1

    def reweight(self, step: int, losses: Mapping[str, float]) -> None:
        """Move the weights by held-out losses, where the run does so.

        Args:
            step: steps done.
            losses: by domain, nats per token; equal on every rank.
        """
        if self._data.reweighting is None:
            return
        names = self._data.manifest.names
        weights = self._data.reweighting(self._mixture.weights, [losses[name] for name in names])
        self._mixture.set_weights(weights)
        self._log_weights(f"step {step}", weights)

    def log_phases(self, step: int, samples: range) -> None:
        """Log the phases that began within a step.

        Args:
            step: steps done before it.
            samples: numbers of the samples that the step read.
        """
        for sample in sorted(set(samples) & self._data.phase_changes.keys()):
            when = f"step {step + 1}: from sample {sample} on"
            self._log_weights(when, self._data.phase_changes[sample])

    def log(self, step: int, *, always: bool) -> None:
        """Write points of what is read from here on, and of what was read.

        Args:
            step: steps done.
            always: even where weights are as they were when they were written last.
        """
        shares = self._mixture.shares.tolist()
        if step == self._logged_at or not (always or shares != self._logged):
            return
        self._logged, self._logged_at = shares, step
        points = {}
        for number, name in enumerate(self._data.manifest.names):
            points[tags.mixture_weight(name)] = shares[number]
            if step:
                drawn = int(self._mixture.drawn[number])
                points[tags.mixture_share(name)] = drawn / self._mixture.num_drawn
                epochs = self._data.loader.domains[number].epochs(drawn)
                points[tags.mixture_epoch(name)] = epochs
        self._sink.scalars(step, points)

    def samples_since(self, before: npt.NDArray[np.int64]) -> str:
        """Name the samples that were drawn since ``before``, samples drawn of each domain."""
        after, domains = self._mixture.drawn, self._data.loader.domains
        return ", ".join(
            f"{domain.name} {first} to {last - 1}"
            for domain, first, last in zip(domains, before.tolist(), after.tolist())
            if last > first
        )

    def _log_weights(self, when: str, weights: Vector) -> None:
        shares = zip(self._data.manifest.names, weights)
        logger.info("%s: domain weights %s", when, " ".join(f"{n} {w:.3f}" for n, w in shares))
