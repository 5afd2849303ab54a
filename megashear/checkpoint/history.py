"""Which runs made a model, the first one first, as its checkpoint knows them."""

from __future__ import annotations

import dataclasses
from typing import Any

from megashear.checkpoint.description import Description
from megashear.checkpoint.details import HISTORY, ORIGIN
from megashear.checkpoint.run_summary import RunSummary


def own_run(description: Description) -> RunSummary | None:
    """Return what the run did that saved a checkpoint; None where no run did."""
    known = description.known
    if known.scheduler is None or not known.run:  # a conversion or a cut
        return None
    loader = known.loader or {}
    drawn = (loader.get("mixture") or {}).get("drawn") or []
    names = loader.get("domains") or []
    return RunSummary(
        stage=description.stage,
        steps=description.iteration,
        samples=known.consumed_samples,
        # conversations do not fill their sequences, so these do not count tokens
        seq_length=None if description.stage == "finetune" else known.flags.seq_length,
        drawn=dict(zip(names, drawn)),
        constraint=known.flags.constraint if description.stage == "prune" else None,
        distill_from=known.flags.distill_from,
        held_out_loss=known.held_out_loss,
        held_out_standard_error=known.held_out_standard_error,
    )


def runs_of(description: Description) -> list[RunSummary]:
    """Return the runs that made a model, the first one first, its own last."""
    own = own_run(description)
    earlier = description.known.history
    return earlier if own is None else [*earlier, own]


def made_before(description: Description) -> dict[str, Any]:
    """Return the details about origin and runs for a stage that starts from a checkpoint anew.

    The checkpoint's own run joins the history.
    """
    runs = [dataclasses.asdict(run) for run in runs_of(description)]
    origin = description.known.origin
    return ({ORIGIN: origin} if origin else {}) | ({HISTORY: runs} if runs else {})
