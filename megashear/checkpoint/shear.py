"""Cut a checkpoint: to a pruning run's target by its masks, or to any by importance scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint.cut import cut
from megashear.checkpoint.description import Description, find_iteration, read_description
from megashear.checkpoint.details import (
    IMPORTANCE_SCORES,
    PRUNED_FOR,
    ROUNDING,
    RUN,
    SOURCE_SHAPE,
)
from megashear.checkpoint.history import made_before
from megashear.checkpoint.scores import ImportanceScores, read_scores
from megashear.checkpoint.store import read_log_alpha
from megashear.checkpoint.weights import CheckpointWeights, write_weights
from megashear.config import TargetConfig
from megashear.files.aside import check_absent
from megashear.masks.census import take_census
from megashear.masks.importance import gates_of_scores
from megashear.masks.kinds import LAYER
from megashear.masks.mask_set import exact_gates, expected_gates
from megashear.masks.target_flags import target_shape
from megashear.masks.targets import target_units
from megashear.models import loadable
from megashear.shape import ModelShape


def check_cut(load: Path | str) -> None:
    """Refuse a path that is no checkpoint with masks, without reading weights.

    Warn of a target that stock runtimes refuse.

    Raises:
        ValueError: ``load`` is no such checkpoint.
    """
    directory = find_iteration(load)
    read_log_alpha(directory)
    description = read_description(directory)
    loadable.warn(description.known.target, "target ", source=description.shape)


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
    loadable.warn(target, "target ", source=source)
    targets = target_units(source, target)
    counts = take_census(log_alpha, targets)
    gates = exact_gates(log_alpha, targets) if exact_target else expected_gates(log_alpha)
    return _write(
        output,
        weights,
        gates,
        target,
        {
            PRUNED_FOR: weights.description.iteration,
            ROUNDING: {kind: found.num_changed for kind, found in counts.items()},
        },
    ) | {
        "gates that rounding to the target changed": {
            kind: f"{found.num_changed} of {found.num_gates}" for kind, found in counts.items()
        },
    }


def check_cut_by_scores(load: Path | str, scores: Path | str, asked: TargetConfig) -> None:
    """Refuse what `cut_by_scores` would refuse, without reading the whole model.

    Raises:
        ValueError: see `cut_by_scores`.
    """
    _gates_by_scores(CheckpointWeights(find_iteration(load)), scores, asked)


def cut_by_scores(
    load: Path | str, output: Path | str, scores: Path | str, asked: TargetConfig
) -> dict[str, Any]:
    """Write the smaller model of the units with the highest importance scores: a one-shot cut.

    The weights that are kept are not changed: gates are 1.

    Args:
        load: checkpoint directory of a model without masks, or one iteration's.
        output: checkpoint directory to make.
        scores: file of `megashear score` of this model.
        asked: flags of the target.

    Returns:
        Parameters before and after, and the layers that are dropped, counted from 0.

    Raises:
        ValueError: ``output`` exists; the checkpoint has masks; the scores are of another model; no
            cut leads to the target.

    Source: Muralidharan et al. 2024 (arXiv:2407.14679), section 2.
    """
    check_absent(output)
    weights = CheckpointWeights(find_iteration(load, contents=True))
    found, target, gates = _gates_by_scores(weights, scores, asked)
    closed = gates.get(LAYER, torch.ones(1, weights.shape.num_layers))[0] == 0
    return _write(output, weights, gates, target, {IMPORTANCE_SCORES: dict(found.measured)}) | {
        "dropped layers": closed.nonzero().flatten().tolist()
    }


def _gates_by_scores(
    weights: CheckpointWeights, file: Path | str, asked: TargetConfig
) -> tuple[ImportanceScores, ModelShape, dict[str, Tensor]]:
    """Return the scores of a model, the target, and gates that lead to it."""
    if weights.description.known.mask_extents is not None:
        raise ValueError(
            f"--load {weights.directory} is of a pruning run, whose masks say what is kept, and "
            f"--scores {file} is for a model without masks; leave --scores out, or load the model "
            f"that was scored"
        )
    source = weights.shape
    scores = read_scores(file, "--scores")
    scores.check_model(
        source, weights, flag=f"--scores {file}", model=f"--load {weights.directory}"
    )
    target = target_shape(asked, source)
    gates = gates_of_scores(scores.values, source, target)
    loadable.check_target(target, source, force=asked.force_unloadable_target)
    return scores, target, gates


def _write(
    output: Path | str,
    weights: CheckpointWeights,
    gates: Mapping[str, Tensor],
    target: ModelShape,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the cut model, and return what to report of it."""
    source, known = weights.shape, weights.description.known
    written = write_weights(
        output,
        cut(weights, gates, source, target),
        Description(
            shape=target,
            iteration=0,
            stage="cut",
            token_ids=weights.description.token_ids,
            details={
                **made_before(weights.description),
                SOURCE_SHAPE: source.to_dict(),
                **origin,
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
    }
