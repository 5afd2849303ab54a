"""Phases: weights of the domains that change at samples fixed before the run."""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.config import WhenExhausted
from megashear.data.mixture import DomainMixture, normalise_weights
from megashear.data.shares import ShareLimits, Vector, weights_of
from megashear.files.structured import read_yaml

logger = logging.getLogger(__name__)

STARTS = ("start_step", "start_sample", "start_token")
"""Keys that say where a phase begins; all phases of a file use the same key."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Phases:
    """Weights that hold from where a phase begins until the next one does."""

    unit: str
    """One of ``STARTS``: the unit of ``starts``, over all replicas."""
    starts: tuple[int, ...]
    """Beginning of each phase: 0, then rising."""
    weights: tuple[Vector, ...]
    """Weights of each phase."""

    def changes(
        self, *, seq_length: int, global_batch_size: int, first_step: int, first_sample: int
    ) -> dict[int, Vector]:
        """Return weights by the first sample they hold for, from the present phase on.

        A phase that starts at a token starts with the first sample that lies wholly after it.

        Args:
            seq_length: tokens per sample.
            global_batch_size: samples per step, from here on.
            first_step: steps done.
            first_sample: samples drawn so far. Later steps are counted from here with the present
                batch size, whatever it was before.
        """
        found = {}
        for start, weights in zip(self.starts, self.weights):
            if self.unit == "start_step":
                sample = first_sample + (start - first_step) * global_batch_size
            elif self.unit == "start_token":
                sample = -(-start // seq_length)
            else:
                sample = start
            found[max(sample, first_sample)] = weights  # of the phases that began, the last holds
        return found


class PhasedMixture(DomainMixture):
    """A mixture whose weights are those of the phase that a sample's number falls in.

    The number of samples drawn is part of the mixture's state, so a resumed run is in the right
    phase, and the change falls on the promised sample however far ahead a loader draws.
    """

    def __init__(
        self,
        changes: Mapping[int, Vector],
        *,
        available: Sequence[int] | None = None,
        when_exhausted: WhenExhausted = "repeat",
    ) -> None:
        """Take weights by the first sample of each phase; drawing begins at the least of these.

        The other arguments are those of DomainMixture.
        """
        self._samples = sorted(changes)
        self._weights = [changes[sample] for sample in self._samples]
        self._place = 0  # the next sample's number
        super().__init__(self._weights[0], available=available, when_exhausted=when_exhausted)

    def draw(self) -> tuple[int, int]:
        """Return (domain, index within the domain) of the next sample."""
        phase = bisect.bisect_right(self._samples, self._place) - 1
        if self._place == self._samples[phase]:
            self.set_weights(self._weights[phase])
        drawn = super().draw()  # where it raises, nothing was drawn
        self._place += 1
        return drawn

    def load_state_dict(self, state: Any) -> None:
        """Resume as DomainMixture does, but with the weights of the phase, not of the state."""
        super().load_state_dict(state)
        self._place = self.num_drawn
        phase = bisect.bisect_right(self._samples, self._place) - 1
        self.set_weights(self._weights[max(phase, 0)])


def read_phases(path: str | Path, domains: Sequence[str], limits: ShareLimits) -> Phases:
    """Read phases from a YAML list of ``{start_...: number, weights: {domain: weight}}``.

    Raises:
        ValueError: the file is missing or holds something else, phases overlap or do not begin at
            0, a domain is unknown or left out, weights do not sum to 1 or lie outside the limits.
    """
    entries = _read(Path(path))
    units = {key for entry in entries for key in entry if key in STARTS}
    if len(units) != 1:
        raise ValueError(
            f"{path}: phases begin by {sorted(units) or 'nothing'}; wanted one of "
            f"{', '.join(STARTS)}, the same in every phase"
        )
    (unit,) = units
    starts: list[int] = []
    weights: list[Vector] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, phase {number}"
        if set(entry) != {unit, "weights"}:
            raise ValueError(f"{where} has {sorted(entry)}; wanted just {unit} and weights")
        start = _whole(entry[unit], f"{where}: {unit}")
        if not starts and start:
            raise ValueError(
                f"{where} begins at {unit} {start}; the first phase begins at 0, or the weights "
                f"before it would be unknown"
            )
        if starts and start <= starts[-1]:
            raise ValueError(
                f"{where} begins at {unit} {start} and the phase before it at {starts[-1]}, so "
                f"they overlap; every phase begins after the one before it"
            )
        starts.append(start)
        weights.append(_weights(entry["weights"], where, domains, limits))
    return Phases(unit=unit, starts=tuple(starts), weights=tuple(weights))


def _weights(found: object, where: str, domains: Sequence[str], limits: ShareLimits) -> Vector:
    flag = f"{where}: weights"
    if isinstance(found, dict):
        words: list[float | str] = [f"{name}={value}" for name, value in found.items()]
    elif isinstance(found, list):
        words = [str(value) for value in found]
    else:
        raise ValueError(f"{flag} are {found!r}; wanted `domain: weight`, a line for each domain")
    try:
        weights = normalise_weights(weights_of(words, domains, flag="weights"), len(domains))
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).replace('--domain-weights', 'weights')}") from None
    if outside := limits.violations(weights, domains):
        raise ValueError(
            f"{where}: {'; '.join(outside)}, its --domain-floor or --domain-cap; change one of "
            f"the two"
        )
    return weights


def _whole(value: object, what: str) -> int:
    """Return a whole number, also from 2e9, which YAML reads as a float or as text."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not (number >= 0 and number.is_integer()):
        raise ValueError(f"{what} is {value!r}; wanted a whole number, 0 or more")
    return int(value) if isinstance(value, int) else int(number)


def _read(path: Path) -> list[dict[str, Any]]:
    entries = read_yaml(path, f"--domain-phases {path}")
    if (
        not isinstance(entries, list)
        or not entries
        or not all(isinstance(entry, dict) for entry in entries)
    ):
        raise ValueError(
            f"--domain-phases {path} holds no list of phases; wanted `- start_step: 0` with "
            f"`weights:` under it, and so on"
        )
    return entries
