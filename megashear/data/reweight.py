"""New weights of the domains from how far their losses are above what they should be."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megashear.data.mixture import normalise_weights

logger = logging.getLogger(__name__)

POLICIES = ("signed", "clipped", "bandit", "constant")
"""How weights follow losses; ``reweight`` says what each does."""
DOMINANT_SHARE = 0.6
"""Share of the mixture from which one domain is said to swallow it, as seen with the reference
implementation (60 to 94 %, unnoticed)."""


def reweight(
    weights: Sequence[float] | npt.NDArray[np.float64],
    losses: Sequence[float | None] | npt.NDArray[np.float64],
    references: Sequence[float] | npt.NDArray[np.float64],
    *,
    policy: str,
    eta: float = 1.0,
    smoothing: float = 1e-4,
    domains: Sequence[str] | None = None,
) -> npt.NDArray[np.float64]:
    """Weights after an evaluation: more for the domains that lag behind their reference.

    With excess = loss - reference, in nats per token:

    - ``signed``: softmax(ln w + eta * excess); the published runs.
    - ``clipped``: the same with excess below 0 taken as 0; the published text.
    - ``bandit``: softmax(w + eta * excess), which forgets the weights but for their value.
    - ``constant``: the weights as they are.

    All but ``constant`` then keep every domain in play with (1 - c) w + c / n.

    A domain whose loss is missing, infinite or not a number keeps its share, and the others divide
    what remains as above: it neither gains nor loses by what is not known. With no loss at all the
    weights stay as they are. Both are logged as warnings.

    Args:
        weights: current weights, one for each domain; sum to 1.
        losses: loss of each domain at this evaluation, nats per token; None where there is none.
        references: loss that each domain should have, nats per token.
        policy: one of ``POLICIES``.
        eta: step size, >= 0.
        smoothing: c above, in [0, 1).
        domains: names for messages.

    Returns:
        New weights, float64, summing to 1.

    Raises:
        ValueError: an unknown policy, vectors of different lengths, weights that are none, a
            reference that is not finite, eta or smoothing outside their range.

    Source: Xia et al. 2023 (arXiv:2310.06694), Algorithm 1, and its implementation; Xie et al.
    2023 (arXiv:2305.10429). The treatment of missing losses is megashear's.
    """
    current = normalise_weights(weights, len(weights))
    names = [f"domain {i}" for i in range(len(current))] if domains is None else list(domains)
    loss = np.array([np.nan if x is None else x for x in losses], dtype=np.float64)
    reference = np.array(references, dtype=np.float64)
    _check(len(current), loss, reference, names, policy, eta, smoothing)
    if policy == "constant":
        return current
    with np.errstate(over="ignore", invalid="ignore"):
        excess = eta * (loss - reference)
    if policy == "clipped":
        excess = np.maximum(excess, 0)  # NaN stays NaN
    known = np.isfinite(excess)
    if not known.all():
        lacking = ", ".join(f"{names[i]} ({loss[i]:g})" for i in np.flatnonzero(~known))
        logger.warning("no finite loss for %s: the weights there stay as they are", lacking)
    if not known.any():
        return current
    new = current.copy()
    with np.errstate(divide="ignore"):  # ln 0: a domain of weight 0 comes back by smoothing only
        start = current[known] if policy == "bandit" else np.log(current[known])
    new[known] = current[known].sum() * _softmax(start + excess[known])
    new = (1 - smoothing) * new + smoothing / len(new)
    new /= new.sum()
    leader = int(new.argmax())
    if new[leader] > DOMINANT_SHARE >= current[leader]:
        logger.warning(
            "%s now takes %.1f %% of the mixture (%.1f %% before); compare its loss %.4f with its "
            "reference %.4f",
            *(names[leader], 100 * new[leader], 100 * current[leader]),
            *(loss[leader], reference[leader]),
        )
    return new


def _softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if np.isneginf(x).all():  # nothing but weights 0: no share to divide
        return np.zeros_like(x)
    exponentials = np.exp(x - x.max())
    shares: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    return shares


def _check(
    num_domains: int,
    loss: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64],
    names: Sequence[str],
    policy: str,
    eta: float,
    smoothing: float,
) -> None:
    if policy not in POLICIES:
        nearest = difflib.get_close_matches(policy, POLICIES, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown reweighting policy {policy!r}; {hint}known: {list(POLICIES)}")
    for what, found in (
        ("losses", len(loss)),
        ("references", len(reference)),
        ("domains", len(names)),
    ):
        if found != num_domains:
            raise ValueError(f"{found} {what} for {num_domains} domain weights; one each is wanted")
    if not np.isfinite(reference).all():
        raise ValueError(
            f"reference losses are {reference.tolist()}; wanted finite numbers, one for each domain"
        )
    if not (np.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta is {eta}; wanted a finite step size >= 0")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; wanted a share in [0, 1)")
