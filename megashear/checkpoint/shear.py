"""Cut a pruning run's checkpoint to its target: fold its masks in and drop closed units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megashear.checkpoint.cut import cut
from megashear.checkpoint.description import Description, find_iteration
from megashear.checkpoint.details import PRUNED_FOR, ROUNDING, RUN, SOURCE_SHAPE
from megashear.checkpoint.store import read_log_alpha
from megashear.checkpoint.weights import CheckpointWeights, write_weights
from megashear.files.aside import check_absent
from megashear.masks.census import take_census
from megashear.masks.mask_set import exact_gates, expected_gates
from megashear.masks.targets import target_units
from megashear.models import loadable


def check_cut(load: Path | str) -> None:
    """Refuse a path that is no checkpoint with masks, without reading weights.

    Raises:
        ValueError: ``load`` is no such checkpoint.
    """
    read_log_alpha(find_iteration(load))


def cut_checkpoint(
    load: Path | str, output: Path | str, *, exact_target: bool = False
) -> dict[str, Any]:
    """Write the smaller model that the run's masks describe, as a checkpoint of its own.

    Args:
        load: checkpoint directory of a pruning run, or one iteration's.
        output: checkpoint directory to make.
        exact_target: keep the target's number of most open units in every row, whatever the masks
            expect to keep.

    Returns:
        Parameters before and after, and for each kind how many gates rounding to the target's
        counts changed.

    Raises:
        ValueError: ``output`` exists; no masks there; without ``exact_target``, a row of the masks
            keeps another number of units than the target.
    """
    check_absent(output)
    weights = CheckpointWeights(find_iteration(load, contents=True))
    log_alpha = read_log_alpha(weights.directory)
    known = weights.description.known
    source, target = weights.shape, known.target
    loadable.warn(target, "target ")
    targets = target_units(source, target)
    counts = take_census(log_alpha, targets)
    gates = exact_gates(log_alpha, targets) if exact_target else expected_gates(log_alpha)
    written = write_weights(
        output,
        cut(weights, gates, source, target),
        Description(
            shape=target,
            iteration=0,
            stage="cut",
            token_ids=weights.description.token_ids,
            details={
                SOURCE_SHAPE: source.to_dict(),
                PRUNED_FOR: weights.description.iteration,
                ROUNDING: {kind: found.num_changed for kind, found in counts.items()},
                # `megashear evaluate` asks for the length of sequences and the borders of documents
                **({RUN: known.run} if known.run else {}),
                **weights.description.hf_config,
            },
        ),
        tokenizer=weights.tokenizer,
    )
    return {
        "written": str(output),
        "bytes": written,
        "parameters before": source.num_params(),
        "parameters after": target.num_params(),
        "gates that rounding to the target changed": {
            kind: f"{found.num_changed} of {found.num_gates}" for kind, found in counts.items()
        },
    }
