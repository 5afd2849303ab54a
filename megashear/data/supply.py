"""Reports of domains whose text does not last: before a run, during it, and at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from megashear.data.mixture import DataExhausted, DomainMixture
from megashear.data.sequences import DomainSequences

logger = logging.getLogger(__name__)


def warn_of_short_domains(
    domains: Sequence[DomainSequences], mixture: DomainMixture, num_samples: int, batch_size: int
) -> None:
    """Warn of each domain that has less text than ``num_samples`` more samples need.

    Args:
        domains: sequences of every domain.
        mixture: as it stands.
        num_samples: samples still to draw, over all domains.
        batch_size: samples in a step, over all replicas.
    """
    way_out = {
        "repeat": "repeats from there",
        "redistribute": "then leaves its share to the others (--data-exhausted redistribute)",
        "stop": "ends the run there (--data-exhausted stop)",
    }[mixture.when_exhausted]
    for domain, share, drawn in zip(domains, mixture.shares, mixture.drawn):
        size = domain.samples_per_epoch
        drawn_here = int(drawn) - domain.origin[0]
        wanted = drawn_here + share * num_samples
        left = size - drawn_here
        if wanted > size and left >= 0:
            logger.warning(
                "domain %s: at its weight %.3f the run wants %.1f times its %d sequences "
                "(%d tokens); it is read after about %d steps and %s",
                *(domain.name, share, wanted / size, size, domain.num_tokens),
                *(left / share / batch_size, way_out),
            )


def report_ends(
    domains: Sequence[DomainSequences], before: DomainMixture, now: DomainMixture
) -> None:
    """Log each domain whose text was read to its end between two states of a mixture."""
    if now.when_exhausted == "repeat":
        for domain, old, new in zip(domains, before.drawn.tolist(), now.drawn.tolist()):
            _report_epoch(domain, old, new)
        return
    for number in np.flatnonzero(now.exhausted & ~before.exhausted).tolist():
        domain = domains[number]
        logger.warning(
            "domain %s: its %d sequences (%d tokens) are read, at sample %d of the run%s",
            *(domain.name, domain.samples_per_epoch, domain.num_tokens, now.num_drawn),
            "; its share goes to the others in proportion"
            if now.when_exhausted == "redistribute"
            else "",
        )


def _report_epoch(domain: DomainSequences, old: int, new: int) -> None:
    """Log that a domain's text repeats, where its drawn samples grew into another epoch."""
    size, origin = domain.samples_per_epoch, domain.origin[0]
    # The epoch of the sample drawn last; epoch 0 is not worth a line.
    first, last = (domain.place(max(drawn - 1, origin))[0] for drawn in (old, new))
    first += 1
    if last < first:
        return
    # A warning whenever the number of epochs doubles: a tiny domain starts thousands.
    doubled = any((epoch + 1).bit_count() == 1 for epoch in range(first, last + 1))
    logger.log(
        logging.WARNING if doubled else logging.INFO,
        "domain %s: in epoch %d from here on, its %d sequences (%d tokens) repeat; "
        "lower its weight or add text to see no token twice",
        *(domain.name, last + 1, size, domain.num_tokens),
    )


def reason_for_end(
    end: DataExhausted, domains: Sequence[DomainSequences], mixture: DomainMixture
) -> str:
    """Return why no further batch can be drawn, for people."""
    what = "the domains with a weight are all read"
    if end.domain is not None:
        domain = domains[end.domain]
        what = (
            f"domain {domain.name} is read: sample {end.sample + 1} of the run would be "
            f"number {domain.samples_per_epoch + 1} of its {domain.samples_per_epoch} "
            f"sequences"
        )
    return f"{what}, and --data-exhausted is {mixture.when_exhausted}"
