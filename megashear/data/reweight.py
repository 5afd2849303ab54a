"""New weights of the domains from how far their losses are above what they should be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from megashear.data.mixture import normalise_weights
from megashear.data.shares import ShareLimits, Vector

logger = logging.getLogger(__name__)


def _signed(weights: Vector, excess: Vector, eta: float) -> Vector:
    """Return ln w + eta * excess; the published runs."""
    with np.errstate(divide="ignore"):  # ln 0: a domain of weight 0 comes back by smoothing
        scores: Vector = np.log(weights) + eta * excess
    return scores


def _clipped(weights: Vector, excess: Vector, eta: float) -> Vector:
    """Return ln w + eta * max(excess, 0); the published text."""
    return _signed(weights, np.maximum(excess, 0), eta)  # NaN stays NaN


def _bandit(weights: Vector, excess: Vector, eta: float) -> Vector:
    """Return w + eta * excess, which forgets the weights but for their value."""
    return weights + eta * excess


SCORES: Mapping[str, Callable[[Vector, Vector, float], Vector]] = MappingProxyType(
    {"signed": _signed, "clipped": _clipped, "bandit": _bandit}
)
"""Logarithms of the new shares, but for a number common to all, by the name that ``--reweight``
takes; under any other name the losses do not move the weights.

A function takes the weights, which sum to 1, the excess (loss - reference, nats per token; NaN
where there is no finite loss, and the score of such a domain is not used), and the step size.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reweighting:
    """Weights after an evaluation: more for the domains that lag behind their reference.

    With c the smoothing, the softmax of the scores becomes (1 - c) softmax + c / n, which keeps
    every domain in play, and is brought within the limits last.

    A domain whose loss is missing, infinite or not a number keeps its share, and the others divide
    what remains as above: it neither gains nor loses by what is not known. With no loss at all the
    weights stay as they are. Warnings name such domains, and a domain that comes to pass
    ``dominant_share``.

    Source: Xia et al. 2023 (arXiv:2310.06694), Algorithm 1, and its implementation; Xie et al.
    2023 (arXiv:2305.10429). The treatment of missing losses and the limits are megashear's.
    """

    policy: str
    """Name in ``SCORES``."""
    eta: float
    """Step size."""
    references: Vector
    """Loss that each domain should have, nats per token."""
    domains: Sequence[str]
    """Names of the domains."""
    smoothing: float
    """Share c of the uniform distribution in every update, in [0, 1)."""
    limits: ShareLimits | None = None
    """Floors and caps; none unless given."""
    dominant_share: float
    """Share of the mixture above which a warning names the domain. With the reference
    implementation one domain took 60 to 94 %, unnoticed."""

    def __post_init__(self) -> None:
        assert len(self.references) == len(self.domains)
        assert np.isfinite(self.references).all(), self.references

    def __call__(
        self, weights: Sequence[float] | Vector, losses: Sequence[float | None] | Vector
    ) -> Vector:
        """Return new weights, float64, which sum to 1.

        Args:
            weights: current weights, one for each domain; sum to 1.
            losses: loss of each domain at this evaluation, nats per token, or None.

        Raises:
            ValueError: the weights are not one share for each domain.
        """
        current = normalise_weights(weights, len(self.domains))
        loss = np.array([np.nan if x is None else x for x in losses], dtype=np.float64)
        assert len(loss) == len(current), (losses, weights)
        with np.errstate(over="ignore", invalid="ignore"):
            excess = loss - self.references
            known = np.isfinite(self.eta * excess)
        if not known.all():
            lacking = ", ".join(
                f"{self.domains[i]} ({loss[i]:g})" for i in np.flatnonzero(~known).tolist()
            )
            logger.warning("no finite loss for %s: the weights there stay as they are", lacking)
        if not known.any():
            return current
        scores = SCORES[self.policy](current, np.where(known, excess, np.nan), self.eta)
        assert not np.isnan(scores[known]).any(), (self.policy, scores)
        new = current.copy()
        new[known] = current[known].sum() * _softmax(scores[known])
        new = (1 - self.smoothing) * new + self.smoothing / len(new)
        new /= new.sum()
        if self.limits is not None and self.limits.bind:
            new = self.limits.project(new)
        self._warn_of_a_leader(current, new, loss)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints of format 2 hold: the name; no policy remembers anything."""
        return {"policy": self.policy.capitalize(), "state": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing from a checkpoint: no policy remembers anything."""

    def _warn_of_a_leader(self, current: Vector, new: Vector, loss: Vector) -> None:
        leader = int(new.argmax())
        if new[leader] > self.dominant_share >= current[leader]:
            logger.warning(
                "%s now takes %.1f %% of the mixture (%.1f %% before), more than "
                "--dominant-share %g; compare its loss %.4f with its reference %.4f, or set "
                "--domain-cap",
                *(self.domains[leader], 100 * new[leader], 100 * current[leader]),
                *(self.dominant_share, loss[leader], self.references[leader]),
            )


def _softmax(x: Vector) -> Vector:
    if np.isneginf(x).all():  # nothing but weights 0: no share to divide
        return np.zeros_like(x)
    exponentials = np.exp(x - x.max())
    shares: Vector = exponentials / exponentials.sum()
    return shares
