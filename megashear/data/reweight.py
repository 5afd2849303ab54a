"""New weights of the domains from how far their losses are above what they should be."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from megashear.data.mixture import normalise_weights
from megashear.data.shares import ShareLimits, Vector

logger = logging.getLogger(__name__)

DOMINANT_SHARE = 0.6
"""Share of the mixture from which one domain is said to swallow it unless the user sets another;
with the reference implementation it was 60 to 94 %, unnoticed."""


class Policy:
    """How weights follow losses; a subclass says it in :meth:`scores` and has a name in POLICIES.

    What is common to all (missing losses, smoothing, limits, warnings) is ``Reweighting``'s. A
    policy that remembers something between evaluations gives it in :meth:`state_dict`, which is
    part of every checkpoint: plain values, fit for JSON.
    """

    follows_losses = True
    """Whether evaluations move the weights at all."""

    def __init__(self, *, eta: float = 1.0) -> None:
        """Take the step size.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not (np.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta is {eta}; wanted a finite step size >= 0")
        self.eta = eta

    def scores(self, weights: Vector, excess: Vector) -> Vector:
        """Logarithm of each domain's new share, but for a number common to all.

        Args:
            weights: current ones; sum to 1.
            excess: loss - reference, nats per token; NaN where there is no finite loss, and what
                is said of such a domain is not used.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what the policy that gave ``state`` did."""


class Signed(Policy):
    """softmax(ln w + eta * excess); the published runs."""

    def scores(self, weights: Vector, excess: Vector) -> Vector:
        """See Policy."""
        with np.errstate(divide="ignore"):  # ln 0: a domain of weight 0 comes back by smoothing
            scores: Vector = np.log(weights) + self.eta * excess
        return scores


class Clipped(Signed):
    """The same with excess below 0 taken as 0; the published text."""

    def scores(self, weights: Vector, excess: Vector) -> Vector:
        """See Policy."""
        return super().scores(weights, np.maximum(excess, 0))  # NaN stays NaN


class Bandit(Policy):
    """softmax(w + eta * excess), which forgets the weights but for their value."""

    def scores(self, weights: Vector, excess: Vector) -> Vector:
        """See Policy."""
        return weights + self.eta * excess


class Constant(Policy):
    """The weights as they are."""

    follows_losses = False


class Schedule(Policy):
    """The weights of the phase that a sample falls in; ``data/phases.py`` moves them."""

    follows_losses = False


POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {
        "signed": Signed,
        "clipped": Clipped,
        "bandit": Bandit,
        "constant": Constant,
        "schedule": Schedule,
    }
)
"""Policies by the name that ``--reweight`` takes."""


def make_policy(name: str, *, eta: float = 1.0) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: there is none, or eta is no step size.
    """
    if name not in POLICIES:
        nearest = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown reweighting policy {name!r}; {hint}known: {list(POLICIES)}")
    return POLICIES[name](eta=eta)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reweighting:
    """Weights after an evaluation: more for the domains that lag behind their reference.

    With c the smoothing, a policy's shares then keep every domain in play with (1 - c) w + c / n,
    and are brought within the limits last.

    A domain whose loss is missing, infinite or not a number keeps its share, and the others divide
    what remains as above: it neither gains nor loses by what is not known. With no loss at all the
    weights stay as they are. Both are logged as warnings, and so is a domain that comes to pass
    ``dominant_share``.

    Raises:
        ValueError: references of another number than the domains or not finite, or smoothing
            outside its range.

    Source: Xia et al. 2023 (arXiv:2310.06694), Algorithm 1, and its implementation; Xie et al.
    2023 (arXiv:2305.10429). The treatment of missing losses and the limits are megashear's.
    """

    policy: Policy
    references: Vector
    """Loss that each domain should have, nats per token."""
    domains: Sequence[str]
    """Their names."""
    smoothing: float = 1e-4
    """c above, in [0, 1)."""
    limits: ShareLimits | None = None
    """Floors and caps; none unless given."""
    dominant_share: float = DOMINANT_SHARE
    """Share from which one domain is warned of."""

    def __post_init__(self) -> None:
        references = np.array(self.references, dtype=np.float64)
        if len(references) != len(self.domains):
            raise ValueError(
                f"{len(references)} references for {len(self.domains)} domains; one each is wanted"
            )
        if not np.isfinite(references).all():
            raise ValueError(
                f"reference losses are {references.tolist()}; wanted finite numbers, one for each "
                f"domain"
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; wanted a share in [0, 1)")
        object.__setattr__(self, "references", references)

    def __call__(
        self, weights: Sequence[float] | Vector, losses: Sequence[float | None] | Vector
    ) -> Vector:
        """New weights, float64, summing to 1.

        Args:
            weights: current weights, one for each domain; sum to 1.
            losses: loss of each domain at this evaluation, nats per token; None where there is
                none.

        Raises:
            ValueError: vectors of another length than the domains, or weights that are none.
        """
        current = normalise_weights(weights, len(self.domains))
        loss = np.array([np.nan if x is None else x for x in losses], dtype=np.float64)
        if len(loss) != len(current):
            raise ValueError(
                f"{len(loss)} losses for {len(current)} domain weights; one each is wanted"
            )
        if not self.policy.follows_losses:
            return current
        with np.errstate(over="ignore", invalid="ignore"):
            excess = loss - self.references
            known = np.isfinite(self.policy.eta * excess)
        if not known.all():
            lacking = ", ".join(
                f"{self.domains[i]} ({loss[i]:g})" for i in np.flatnonzero(~known).tolist()
            )
            logger.warning("no finite loss for %s: the weights there stay as they are", lacking)
        if not known.any():
            return current
        scores = self.policy.scores(current, np.where(known, excess, np.nan))
        assert not np.isnan(scores[known]).any(), (type(self.policy).__name__, scores)
        new = current.copy()
        new[known] = current[known].sum() * _softmax(scores[known])
        new = (1 - self.smoothing) * new + self.smoothing / len(new)
        new /= new.sum()
        if self.limits is not None and self.limits.bind:
            new = self.limits.project(new)
        self._warn_of_a_leader(current, new, loss)
        return new

    def state_dict(self) -> dict[str, Any]:
        """What its policy remembers, by whose it is."""
        return {"policy": type(self.policy).__name__, "state": self.policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what the saved run's policy remembered, unless this is another one."""
        if state.get("policy") == type(self.policy).__name__:
            self.policy.load_state_dict(state["state"])

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
