"""Where one job goes over from pruning to continued pretraining: what must fit, and a check."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from megashear.checkpoint.description import holds_iterations
from megashear.config import PretrainRun, PruneRun, TrainConfig
from megashear.data.held_out import HeldOutSet
from megashear.parallel.groups import ParallelGroups
from megashear.train.evaluate import evaluate_domains
from megashear.train.objectives import Objective
from megashear.train.start import check_events

logger = logging.getLogger(__name__)

_SEAM = 1e-4
"""Relative; law 2 holds logits to 1e-5 in float32, and a loss is a mean of many."""
SEAM_BF16 = 3e-2
"""Relative; bfloat16 keeps 8 bits, and replicas that share masters fold rounded weights."""


def check_then(config: PruneRun, then: PretrainRun) -> None:
    """Refuse continued pretraining that this job cannot go over to.

    Raises:
        ValueError: another precision, a beginning of its own, or the same --save.
    """
    where = f"--then-pretrain {config.then_pretrain}"
    if then.model.bf16 != config.model.bf16:
        raise ValueError(
            f"{where}: bf16 is {then.model.bf16}, pruning has {config.model.bf16}, and what is "
            f"carried along keeps its precision; set it to {config.model.bf16}, or end the job, "
            f"`megashear cut` and pretrain in another"
        )
    config.parallel.check_sequence(then.train.seq_length)
    if then.model.transformer_impl != "local":
        raise ValueError(
            f"{where}: transformer_impl is {then.model.transformer_impl}; the model is cut into "
            f"local layers: set it to local, or `megashear cut` and pretrain in a job of its own"
        )
    begins = {
        "load": then.train.load,
        "load_hf": then.train.load_hf,
        "init_shape": then.init_shape,
        "finetune": then.train.finetune or None,
    }
    for name, value in begins.items():
        if value is not None:
            raise ValueError(
                f"{where}: {name} is {value}, but it begins with the model that was pruned; "
                f"leave {name} out"
            )
    if config.train.save is None:
        raise ValueError(
            f"{where} needs --save: a job that is stopped while it pretrains must find pruning "
            f"finished"
        )
    if then.train.save is not None and _same(then.train.save, config.train.save):
        raise ValueError(
            f"{where}: save is {then.train.save}, the directory of pruning; choose another"
        )
    for name, what in (("tensorboard_dir", "curves begin"), ("jsonl_log", "lines begin")):
        own, other = getattr(then.train, name), getattr(config.train, name)
        if own is not None and other is not None and _same(own, other):
            raise ValueError(
                f"{where}: {name} is {own}, that of pruning, whose {what} at the same steps; "
                f"choose another"
            )
    if not config.train.resume:
        check_events(then.train)
    if not config.train.resume and holds_iterations(then.train.save):
        raise ValueError(
            f"{where}: save {then.train.save} holds a run already; add --resume to go on with it, "
            f"or choose another directory"
        )


def resuming(train: TrainConfig) -> TrainConfig:
    """Return the settings of the same run, resumed."""
    return dataclasses.replace(train, resume=True)


def losses_at_seam(
    objective: Objective,
    mode: str,
    held_out: Sequence[HeldOutSet],
    train: TrainConfig,
    groups: ParallelGroups,
    *,
    num_sequences: int,
) -> dict[str, float]:
    """Loss by domain, nats per token, on the text that the run behind the seam is evaluated on.

    Collective over the world.

    Args:
        objective: whose model is evaluated.
        mode: of its evaluation modes.
        held_out: sets of the run behind the seam.
        train: of the run behind the seam.
        groups: where this rank stands.
        num_sequences: held-out sequences of each domain to read.
    """
    return evaluate_domains(
        objective,
        mode,
        [part.name for part in held_out],
        held_out,
        [part.subsample(num_sequences, train.seed) for part in held_out],
        groups,
        micro_batch_size=train.eval_micro_batch_size or train.micro_batch_size,
    ).losses


def check_seam(masked: dict[str, float], cut: dict[str, float], *, bf16: bool) -> None:
    """Hold the cut model's losses to those of the masked one.

    Args:
        masked: by domain, under exact masks; equal on every rank.
        cut: by domain, of the cut model; likewise.
        bf16: whether both compute in bfloat16.

    Raises:
        RuntimeError: on every rank, if they differ by more than rounding.
    """
    tolerance = SEAM_BF16 if bf16 else _SEAM
    for name, before in masked.items():
        after = cut[name]
        logger.info("cut in flight: %s loss %.6f masked, %.6f cut", name, before, after)
        if not abs(after - before) <= tolerance * abs(before):
            # losses are equal on all ranks, so that all of them stop here
            raise RuntimeError(
                f"the loss of {name} is {before:.6f} under exact masks and {after:.6f} after the "
                f"cut: the cut model is not the one that was trained. Pruning is saved: cut it "
                f"with `megashear cut`, and report this"
            )


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
