"""Shares of the mixture as flags give them, by order or by name; floors and caps of shares."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
"""One number for each domain."""

ROUNDING = 1e-12
"""Distance from 1 that sums of floors and caps may have, as that of seven caps of 1/7 has."""


def unknown_domain(name: object, domains: Sequence[str]) -> str:
    """Return a message for a name that is not in ``domains``, with the nearest name that is."""
    nearest = difflib.get_close_matches(str(name), domains, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"no domain {name!r}; {hint}the data have {list(domains)}"


def weights_of(words: Sequence[float | str], domains: Sequence[str], *, flag: str) -> list[float]:
    """Return weights in the order of the domains.

    Args:
        words: a number for each domain in order, or ``name=number`` for each in any order.
        domains: names of the domains of the data.
        flag: what the user typed before the words, for messages.

    Raises:
        ValueError: names and bare numbers are mixed, a name is unknown or given twice, a domain is
            left out, or a word is not a number. ``normalise_weights`` checks the count and the sum
            of bare numbers.
    """
    plain, named = _split(words, domains, flag)
    if not named:
        return plain
    if plain:
        raise ValueError(
            f"{flag} has numbers with a name ({', '.join(named)}) and without ({plain}); name all "
            f"domains, or none and keep to the order {list(domains)}"
        )
    missing = [name for name in domains if name not in named]
    if missing:
        raise ValueError(
            f"{flag} has no weight for {missing}; give one for every domain, 0 for one that is "
            f"not wanted"
        )
    return [named[name] for name in domains]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShareLimits:
    """Least and largest share of each domain."""

    floors: Vector
    """Least share of each domain, between 0 and its cap."""
    caps: Vector
    """Largest share of each domain, at most 1."""

    @property
    def bind(self) -> bool:
        """Whether the limits can change any weights."""
        return bool((self.floors > 0).any() or (self.caps < 1).any())

    def violations(self, weights: Vector, domains: Sequence[str]) -> list[str]:
        """Return a remark for each domain whose weight is below its floor or above its cap."""
        return [
            f"{name} {weight:.6g} is {'below' if weight < floor else 'above'} "
            f"{floor if weight < floor else cap:.6g}"
            for name, weight, floor, cap in zip(domains, weights, self.floors, self.caps)
            if not floor - ROUNDING <= weight <= cap + ROUNDING
        ]

    def project(self, weights: Vector) -> Vector:
        """Return the nearest weights within the limits; they sum to 1, and domains between their
        limits keep their proportions.

        Nearest in relative entropy: w_i = clip(s * weights_i, floor_i, cap_i) with the one s that
        makes the sum 1, found exactly, for the sum is piecewise linear in s. Where all weights
        above 0 are at their caps and leave a rest, domains of weight 0 divide the rest evenly. The
        sum of 1 is exact in float64 unless floors or caps alone fill it.

        Args:
            weights: >= 0, sum to 1.
        """
        floors, caps = self.floors, self.caps
        # Below the smallest normal number a weight cannot be scaled to its floor.
        positive = weights >= np.finfo(np.float64).tiny
        # What is left for the domains that s moves.
        room = 1.0 - math.fsum(floors[~positive])
        new = floors.copy()
        if math.fsum(caps[positive]) <= room:
            new[positive] = caps[positive]
            spare = 1.0 - math.fsum(caps[positive])
            if not positive.all():
                new[~positive] = _scaled(
                    np.ones(int((~positive).sum())), floors[~positive], caps[~positive], spare
                )
        else:
            new[positive] = _scaled(weights[positive], floors[positive], caps[positive], room)
        # The last bits go to the domain farthest from its limits: dividing by the sum instead
        # would lift others over their caps.
        slack = np.minimum(new - floors, caps - new)
        widest = int(slack.argmax())
        if slack[widest] > ROUNDING:
            while residue := 1.0 - math.fsum(new):
                new[widest] += residue
        return new


def limits_of(
    floors: Sequence[float | str], caps: Sequence[float | str], domains: Sequence[str]
) -> ShareLimits:
    """Return the limits that ``--domain-floor`` and ``--domain-cap`` give.

    Args:
        floors: ``name=share`` of some domains, and at most one bare number for all others; without
            one, 0 for all others.
        caps: written like floors; without a bare number, 1 for all other domains.
        domains: names of the domains of the data.

    Raises:
        ValueError: an unknown name, a share outside [0, 1], or floors and caps between which no
            weights sum to 1.
    """
    floor = _limits(floors, domains, "--domain-floor", 0.0)
    cap = _limits(caps, domains, "--domain-cap", 1.0)
    for name, low, high in zip(domains, floor, cap):
        if low > high:
            raise ValueError(
                f"--domain-floor of {name} is {low:g}, above its --domain-cap {high:g}; lower the "
                f"floor or raise the cap"
            )
    for values, flag, is_wrong, way_out in (
        (floor, "--domain-floor", math.fsum(floor) > 1 + ROUNDING, "lower some, at most 1 is to"),
        (cap, "--domain-cap", math.fsum(cap) < 1 - ROUNDING, "raise some, at least 1 must"),
    ):
        if is_wrong:
            terms = " + ".join(f"{value:g}" for value in values)
            raise ValueError(
                f"{flag} allows no weights that sum to 1: {terms} = {math.fsum(values):.6g} over "
                f"{list(domains)}; {way_out} be shared out"
            )
    return ShareLimits(floors=floor, caps=cap)


def _limits(
    words: Sequence[float | str], domains: Sequence[str], flag: str, unsaid: float
) -> Vector:
    plain, named = _split(words, domains, flag)
    if len(plain) > 1:
        raise ValueError(
            f"{flag} has {len(plain)} numbers without a name ({plain}); give one for all domains, "
            f"and name=share where one differs"
        )
    everyone = plain[0] if plain else unsaid
    values = [named.get(name, everyone) for name in domains]
    for name, value in zip(domains, values):
        if not 0 <= value <= 1:  # NaN too
            raise ValueError(f"{flag} of {name} is {value:g}; wanted a share between 0 and 1")
    return np.array(values, dtype=np.float64)


def _split(
    words: Sequence[float | str], domains: Sequence[str], flag: str
) -> tuple[list[float], dict[str, float]]:
    """Split words into bare numbers, and numbers by domain."""
    plain: list[float] = []
    named: dict[str, float] = {}
    for word in words:
        if not isinstance(word, str):
            plain.append(float(word))
            continue
        name, equals, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(
                f"{flag} has {word!r}; wanted a number, or name=number such as {domains[0]}=0.1"
            ) from None
        if not equals:
            plain.append(value)
            continue
        if name not in domains:
            raise ValueError(f"{flag}: {unknown_domain(name, domains)}")
        if name in named:
            raise ValueError(f"{flag} names {name!r} twice; keep one")
        named[name] = value
    return plain, named


def _scaled(weights: Vector, floors: Vector, caps: Vector, total: float) -> Vector:
    """Return clip(s * weights, floors, caps) with the s that makes its sum ``total``."""
    breaks = np.unique(np.concatenate([floors / weights, caps / weights]))

    def clipped(s: float) -> Vector:
        values: Vector = np.clip(s * weights, floors, caps)
        return values

    # The sum rises with s, linearly between two breaks: take the last break that is not too much.
    low = max((s for s in breaks if math.fsum(clipped(s)) <= total), default=0.0)
    high = min((s for s in breaks if s > low), default=math.inf)
    at_floor, at_cap = floors / weights >= high, caps / weights <= low
    free = ~at_floor & ~at_cap
    if not free.any():
        return clipped(float(low))
    fixed = math.fsum(floors[at_floor]) + math.fsum(caps[at_cap])
    new = np.where(at_cap, caps, floors)
    new[free] = np.clip(
        weights[free] / math.fsum(weights[free]) * (total - fixed), floors[free], caps[free]
    )
    return new
