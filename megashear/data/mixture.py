"""Which domain the next sample comes from, under weights that change."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

SUM_TOLERANCE = 1e-6
"""How far from 1 a sum of weights may lie: what writing them with seven decimals leaves."""


class MixtureState(TypedDict):
    """A mixture as plain numbers; floats survive repr and JSON bit for bit."""

    weights: list[float]
    owed: list[float]
    drawn: list[int]


class DomainMixture:
    """Chooses the domain of each next sample so that counts follow changing weights.

    Every rank runs the same instance from the same state, so no rank need communicate.
    Invariant: when a domain is chosen, none is a whole sample ahead of what it was owed, nor more
    than 1 + 1/2 + ... + 1/D samples behind (the cup-emptying bound; 2.6 for D = 7); after the
    choice, none is more than 1/2 + ... + 1/D behind. A domain of weight 0 from the start is never
    drawn.
    """

    def __init__(self, weights: Sequence[float] | npt.NDArray[np.float64]) -> None:
        self.owed = np.zeros(len(weights))  # samples promised minus samples drawn; sums to 0
        self.drawn = np.zeros(len(weights), dtype=np.int64)
        self.set_weights(weights)

    @property
    def num_drawn(self) -> int:
        """Samples drawn so far, over all domains."""
        return int(self.drawn.sum())

    def set_weights(self, weights: Sequence[float] | npt.NDArray[np.float64]) -> None:
        """Take the next samples in other proportions; what is owed and drawn stays.

        Raises:
            ValueError: see ``normalise_weights``.
        """
        self.weights = normalise_weights(weights, len(self.owed))

    def draw(self) -> tuple[int, int]:
        """Return (domain, index within the domain) of the next sample."""
        self.owed += self.weights
        domain = int(self.owed.argmax())
        self.owed[domain] -= 1
        self.drawn[domain] += 1
        return domain, int(self.drawn[domain]) - 1

    def copy(self) -> DomainMixture:
        """Another mixture that stands where this one does."""
        return copy.deepcopy(self)

    def state_dict(self) -> MixtureState:
        """All there is to the mixture: three numbers a domain."""
        return {
            "weights": self.weights.tolist(),
            "owed": self.owed.tolist(),
            "drawn": self.drawn.tolist(),
        }

    def load_state_dict(self, state: MixtureState | Mapping[str, list[float]]) -> None:
        """Go on where the mixture that gave ``state`` stood.

        Raises:
            ValueError: the state is of another number of domains.
        """
        found = {key: len(state[key]) for key in ("weights", "owed", "drawn")}
        if set(found.values()) != {len(self.owed)}:
            raise ValueError(
                f"the saved mixture has {found['weights']} domains, this run has "
                f"{len(self.owed)}; resume with the domains of the saved run"
            )
        # Checked, then taken as they are: dividing by the sum again could change the last bit.
        normalise_weights(state["weights"], len(self.owed))
        self.weights = np.array(state["weights"], dtype=np.float64)
        self.owed = np.array(state["owed"], dtype=np.float64)
        self.drawn = np.array(state["drawn"], dtype=np.int64)


def normalise_weights(
    weights: Sequence[float] | npt.NDArray[np.float64], num_domains: int
) -> npt.NDArray[np.float64]:
    """Weights as float64 that sum to 1.

    Raises:
        ValueError: they are not ``num_domains`` finite numbers >= 0 whose sum is 1 to 1e-6.
    """
    values = np.array(weights, dtype=np.float64)
    if values.shape != (num_domains,) or not num_domains:
        raise ValueError(
            f"--domain-weights has {values.size} numbers, wanted one for each of the "
            f"{num_domains} domains"
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"--domain-weights are {values.tolist()}; wanted finite numbers >= 0")
    total = math.fsum(values)
    if abs(total - 1) > SUM_TOLERANCE:
        shares = ", ".join(f"{value / total:.9g}" for value in values) if total else "positive ones"
        raise ValueError(
            f"--domain-weights sum to {total:.8g}, wanted 1; in the same proportions: {shares}"
        )
    normal: npt.NDArray[np.float64] = values / total
    return normal
