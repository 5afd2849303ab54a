"""Fill a run from the checkpoint that it resumes, or from the weights that it starts with."""

from __future__ import annotations

import logging

from megatron.core.optimizer import MegatronOptimizer

from megashear.checkpoint.description import Description
from megashear.checkpoint.store import load_weights
from megashear.config import TrainConfig, TrainingRun
from megashear.conversion.sharded_hf import load_hf
from megashear.train.optim import apply_flags
from megashear.train.start import Start
from megashear.train.state import RunState

logger = logging.getLogger(__name__)


def fill(state: RunState, start: Start, config: TrainingRun) -> None:
    """Fill a run from where it begins. Collective over the world.

    Raises:
        ValueError: on every rank: the checkpoint cannot be read, or is not of such a run.
    """
    if start.resumes:
        _resume(state, start, config)
    elif start.hf is not None:
        load_hf(start.hf, state.chunks, state.groups, state.optimizer)
        logger.info("starting from the weights of %s", start.hf)
    elif start.checkpoint is not None:
        load_weights(start.checkpoint, state.chunks, state.optimizer)
        logger.info("starting from the weights of %s", start.checkpoint)
    else:
        logger.info("starting from fresh weights, seed %d", config.train.seed)


def _resume(state: RunState, start: Start, config: TrainingRun) -> None:
    """Fill a run from its checkpoint, and log what flags change."""
    assert start.checkpoint is not None
    description = state.load_tensors(start.checkpoint)
    saved_rate = _rate(state.optimizer)
    apply_flags(state.optimizer, config.optimizer)
    state.load_parts(description)
    _warn_of_rate(description, config, saved_rate, _rate(state.optimizer))
    if config.data.domain_weights:
        logger.info("--domain-weights are the saved run's, not the flag's")
    _warn_of_batch(description, config.train)
    logger.info("resuming %s at step %d", start.checkpoint, description.iteration)


def _warn_of_batch(description: Description, train: TrainConfig) -> None:
    """Warn of what a changed global batch does to what is counted."""
    before, read = description.known.flags.global_batch_size, description.known.consumed_samples
    if before != train.global_batch_size:
        left = train.train_iters - description.iteration
        logger.warning(
            "--global-batch-size was %d in the saved run and is %d now: steps are counted, by "
            "--train-iters and by the schedule of the rate, and resume from %d; %d samples are "
            "read, %d more will be in the %d steps to come",
            *(before, train.global_batch_size, description.iteration),
            *(read, left * train.global_batch_size, left),
        )


def _rate(optimizer: MegatronOptimizer) -> float | None:
    """Return the learning rate of the next step; None on a rank that steps nothing."""
    return next((float(group["lr"]) for group in optimizer.param_groups), None)


def _warn_of_rate(
    description: Description,
    config: TrainingRun,
    before: float | None,
    now: float | None,
) -> None:
    """Warn of a learning rate that jumps where the run resumes, and name the flags that changed."""
    if before is None or now is None or abs(now - before) <= _SAME_RATE * max(now, before):
        return
    saved = description.known.run
    changed = [
        f"--{name.replace('_', '-')} was {old} and is {new}"
        for part in ("train", "optimizer")
        for name in _OF_SCHEDULE
        if name in saved[part]
        and (old := saved[part][name]) != (new := getattr(getattr(config, part), name))
    ]
    way_out = ""
    if any(flag.startswith(("--train-iters", "--lr-decay-iters")) for flag in changed):
        decay = saved["optimizer"]["lr_decay_iters"] or saved["train"]["train_iters"]
        way_out = f"; --lr-decay-iters {decay} keeps the decay that the saved run had"
    logger.warning(
        "the learning rate jumps at step %d from %.4g, where the saved run left it, to %.4g%s%s",
        *(description.iteration, before, now),
        f": {', '.join(changed)}" if changed else "",
        way_out,
    )


_SAME_RATE = 0.01
"""Relative; no loss shows a smaller change."""
_OF_SCHEDULE = (
    *("train_iters", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_decay_iters"),
)
