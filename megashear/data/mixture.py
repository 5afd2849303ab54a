"""Choice of the domain that the next sample comes from, under weights that change."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from megashear.config import WhenExhausted

SUM_TOLERANCE = 1e-6
"""Largest distance of a sum of weights from 1: what seven decimals per weight can leave."""


class MixtureState(TypedDict):
    """State of a mixture as plain numbers; floats survive repr and JSON bit for bit."""

    weights: list[float]
    owed: list[float]
    drawn: list[int]


class DataExhausted(Exception):  # noqa: N818  # an end, not an error
    """No further sample can be drawn.

    Attributes:
        domain: domain that is owed the next sample and has none left; None where all are read.
        sample: number of the sample that could not be drawn, over all domains, from 0.
    """

    def __init__(self, domain: int | None, sample: int) -> None:
        super().__init__(domain, sample)
        self.domain = domain
        self.sample = sample


class DomainMixture:
    """Chooses the domain of each next sample so that counts follow changing weights.

    Every rank runs the same instance from the same state, so no rank need communicate.
    Invariant: when a domain is chosen, none is a whole sample ahead of what it was owed, nor more
    than 1 + 1/2 + ... + 1/D samples behind (the cup-emptying bound; 2.6 for D = 7); after the
    choice, none is more than 1/2 + ... + 1/D behind. A domain of weight 0 from the start is never
    drawn.

    Where exhausted domains hand over their share, the invariant still holds for the others, with
    the same D: an exhausted domain is owed nothing more, and what it was owed (less than 1.6
    samples for 7 domains) is levelled out over the others: a surplus raises those owed least, a
    deficit lowers those owed most. Levelling keeps every sum of the k largest below its bound, for
    these bounds are concave in k.
    """

    def __init__(
        self,
        weights: Sequence[float] | npt.NDArray[np.float64],
        *,
        available: Sequence[int] | None = None,
        when_exhausted: WhenExhausted = "repeat",
    ) -> None:
        """Begin with nothing drawn.

        Args:
            weights: share of each domain; see ``normalise_weights``.
            available: samples that each domain has; needed unless domains repeat.
            when_exhausted: what happens once all samples of a domain are drawn.
        """
        assert (available is None) == (when_exhausted == "repeat")
        self.owed = np.zeros(len(weights))  # samples promised minus samples drawn; sums to 0
        self.drawn = np.zeros(len(weights), dtype=np.int64)
        self.when_exhausted = when_exhausted
        self._available = None if available is None else np.array(available, dtype=np.int64)
        assert self._available is None or len(self._available) == len(weights)
        self.set_weights(weights)

    @property
    def num_drawn(self) -> int:
        """Number of samples drawn so far, over all domains."""
        return int(self.drawn.sum())

    @property
    def exhausted(self) -> npt.NDArray[np.bool_]:
        """True for each domain that has no sample left; all False where domains repeat."""
        if self._available is None:
            return np.zeros(len(self.owed), dtype=np.bool_)
        return self.drawn >= self._available

    def set_weights(self, weights: Sequence[float] | npt.NDArray[np.float64]) -> None:
        """Take the next samples in other proportions; keep what is owed and drawn.

        Raises:
            ValueError: see ``normalise_weights``.
        """
        self.weights = normalise_weights(weights, len(self.owed))
        self._share_out()

    def draw(self) -> tuple[int, int]:
        """Return (domain, index within the domain) of the next sample.

        Raises:
            DataExhausted: there is no next sample; the mixture is unchanged.
        """
        if self._available is not None and not self.shares.any():
            raise DataExhausted(None, self.num_drawn)
        owed = self.owed + self.shares
        domain = int(owed.argmax())
        sample = int(self.drawn[domain])
        if self._available is not None and sample >= self._available[domain]:
            raise DataExhausted(domain, self.num_drawn)
        owed[domain] -= 1
        self.owed = owed
        self.drawn[domain] += 1
        if self._available is not None and sample + 1 == self._available[domain]:
            self._share_out()
        return domain, sample

    def _share_out(self) -> None:
        """Set the shares in which samples are promised from here on."""
        self.shares = self.weights
        """Weights of the domains that have text left, in proportion; they sum to 1, or to 0 where
        no domain has any."""
        out = self.exhausted
        if self.when_exhausted != "redistribute" or not out.any():
            return
        left = ~out
        total = self.weights[left].sum()
        self.shares = np.where(left, self.weights, 0.0) / (total or 1.0)
        if left.any() and self.owed[out].any():
            residue = self.owed[out].sum()
            self.owed[out] = 0.0
            self.owed[left] = levelled(self.owed[left], residue)

    def copy(self) -> DomainMixture:
        """Return a copy, which draws on independently."""
        return copy.deepcopy(self)

    def state_dict(self) -> MixtureState:
        """Return the whole state: three numbers per domain."""
        return {
            "weights": self.weights.tolist(),
            "owed": self.owed.tolist(),
            "drawn": self.drawn.tolist(),
        }

    def load_state_dict(self, state: MixtureState | Mapping[str, list[float]]) -> None:
        """Resume where the mixture that gave ``state`` stood.

        Raises:
            ValueError: the state has another number of domains.
        """
        found = {key: len(state[key]) for key in ("weights", "owed", "drawn")}
        if set(found.values()) != {len(self.owed)}:
            raise ValueError(
                f"the saved mixture has {found['weights']} domains, this run has "
                f"{len(self.owed)}; resume with the domains of the saved run"
            )
        # Checked, then taken unchanged: dividing by the sum again could change the last bit.
        normalise_weights(state["weights"], len(self.owed))
        self.weights = np.array(state["weights"], dtype=np.float64)
        self.owed = np.array(state["owed"], dtype=np.float64)
        self.drawn = np.array(state["drawn"], dtype=np.int64)
        self._share_out()


def levelled(fills: npt.NDArray[np.float64], amount: float) -> npt.NDArray[np.float64]:
    """Pour an amount into cups so that the lowest rise to one level; a negative amount lowers the
    highest."""
    sign = 1.0 if amount >= 0 else -1.0
    rising = np.sort(sign * fills)
    # The level that the n lowest would reach alone falls with n until the next cup is above it.
    levels = (rising.cumsum() + abs(amount)) / np.arange(1, len(fills) + 1)
    poured: npt.NDArray[np.float64] = sign * np.maximum(sign * fills, levels.min())
    return poured


def normalise_weights(
    weights: Sequence[float] | npt.NDArray[np.float64], num_domains: int
) -> npt.NDArray[np.float64]:
    """Return weights as float64 that sum to 1.

    Raises:
        ValueError: the weights are not ``num_domains`` finite numbers >= 0 with a sum of 1 to 1e-6.
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
