"""Where a loader stands, and what a run that resumes there may change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypedDict

from megashear.data.mixture import DomainMixture, MixtureState
from megashear.data.sequences import DomainSequences

logger = logging.getLogger(__name__)


class LoaderState(TypedDict):
    """Where a loader stands: plain numbers and names, a few for each domain."""

    domains: list[str]
    samples_per_epoch: list[int]
    sequence_length: int
    seed: int
    pack: bool
    """`DomainSequences.is_packed`."""
    mixture: MixtureState
    origins: list[list[int]]
    """`DomainSequences.origin` of every domain."""


def state_of(domains: Sequence[DomainSequences], mixture: DomainMixture) -> LoaderState:
    """Return where the next batch begins, for any data-parallel size; fit for JSON."""
    return {
        "domains": [domain.name for domain in domains],
        "samples_per_epoch": [domain.samples_per_epoch for domain in domains],
        "sequence_length": domains[0].sequence_length,
        "seed": domains[0].seed,
        "pack": domains[0].is_packed,
        "mixture": mixture.state_dict(),
        "origins": [list(domain.origin) for domain in domains],
    }


def restore(state: LoaderState, domains: Sequence[DomainSequences], mixture: DomainMixture) -> None:
    """Bring domains and mixture to a saved state.

    The sequence length may differ from the saved run's where domains repeat: another length cuts
    and shuffles the text anew, so a domain whose epoch is partly read begins its next epoch, which
    a warning says.

    Raises:
        ValueError: the text, packing or the seed differ, or the sequence length where domains do
            not repeat, so that the run would repeat some samples and skip others.
    """
    # Checkpoints from before sequence lengths could change have no origins.
    origins = state.get("origins", [[0, 0] for _ in domains])
    length = domains[0].sequence_length
    is_other_length = length != state["sequence_length"]
    _check_same_text(state, domains)
    if (is_other_length or any(first for first, _ in origins)) and (
        mixture.when_exhausted != "repeat"
    ):
        raise ValueError(
            f"cannot resume the data: --seq-length is {length} and samples of another length "
            f"({state['sequence_length']} last) were read, so what is left of an epoch is not "
            f"known, and --data-exhausted {mixture.when_exhausted} needs it; resume with "
            f"the saved --seq-length and --data-exhausted, or start a new run from its weights"
        )
    for domain, (first, epoch) in zip(domains, origins):
        domain.origin = (first, epoch)
    if is_other_length:
        _begin_epochs(state, domains)
    mixture.load_state_dict(state["mixture"])


def _check_same_text(state: LoaderState, domains: Sequence[DomainSequences]) -> None:
    # Sequences as the saved run would have counted those of this text.
    sizes = [domain.count(state["sequence_length"]) for domain in domains]
    pack = domains[0].is_packed
    for key, saved, now, way_out in (
        ("domains", state["domains"], [d.name for d in domains], "the data of the saved run"),
        # checkpoints from before it was kept have none
        ("pack", state.get("pack", pack), pack, "the saved --pack"),
        (
            *("samples_per_epoch", state["samples_per_epoch"], sizes),
            "the data of the saved run, and its --pack if it is of `megashear finetune`",
        ),
        ("seed", state["seed"], domains[0].seed, "the saved --seed"),
    ):
        if saved != now:
            raise ValueError(
                f"cannot resume the data: {key} was {saved} in the saved run and is {now} now, "
                f"which would repeat and skip samples; resume with {way_out}, or start a new run "
                f"from its weights"
            )


def _begin_epochs(state: LoaderState, domains: Sequence[DomainSequences]) -> None:
    """Have every domain resume at the beginning of an epoch of its new sequences."""
    old = state["sequence_length"]
    logger.warning(
        "--seq-length was %d in the saved run and is %d now: steps are counted on, and samples "
        "whatever their length; earlier held-out losses do not compare with later ones",
        *(old, domains[0].sequence_length),
    )
    for domain, drawn, size in zip(domains, state["mixture"]["drawn"], state["samples_per_epoch"]):
        first, epoch = domain.origin
        later, place = divmod(drawn - first, size)
        epoch += later + (place > 0)
        if place:
            logger.warning(
                "domain %s: %d of the %d tokens of its epoch %d are read; it begins epoch %d, "
                "in which these come again among all others",
                *(domain.name, place * old, domain.num_tokens, epoch - 1, epoch),
            )
        domain.origin = (drawn, epoch)
