"""Hand a pruned model over to continued pretraining in the same job, cut where it lies."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from megashear.checkpoint.description import holds_iterations
from megashear.checkpoint.details import LINEAGE, PRUNED_FOR, ROUNDING, SOURCE_SHAPE
from megashear.checkpoint.history import made_before
from megashear.config import PretrainRun, PruneRun
from megashear.masks.census import take_census
from megashear.masks.mask_set import exact_gates
from megashear.parallel.groups import ParallelGroups
from megashear.train.build import assemble
from megashear.train.evaluate import evaluate_domains
from megashear.train.in_flight import ModelAndOptimizer, cut_in_flight
from megashear.train.inputs import check_vocabulary
from megashear.train.loop import Trainer
from megashear.train.objectives import LOSS, Objective
from megashear.train.prepare import PreparedRun, prepare, prepare_from, settle_teacher
from megashear.train.pruning import EXACT, StructuredPruning
from megashear.train.start import Start, check_events

logger = logging.getLogger(__name__)

_SAME_LOSS = 1e-4
"""Relative; law 2 holds logits to 1e-5 in float32, and a loss is a mean of many."""
SAME_LOSS_BF16 = 3e-2
"""Relative; bfloat16 keeps 8 bits, and replicas that share masters fold rounded weights."""


def prepare_both(config: PruneRun, then: PretrainRun, *, is_dry_run: bool = False) -> PreparedRun:
    """Prepare what is left of a job that prunes and then pretrains.

    Args:
        config: the pruning.
        then: continued pretraining of the cut model, with the moments that pruning's optimizer
            holds; see `in_flight`.
        is_dry_run: as for `prepare`.

    Returns:
        The pruning with what follows; continued pretraining alone, to resume, where the job is
        past its pruning.

    Raises:
        ValueError: anything a user can correct in either.
    """
    _check_then(config, then)
    if config.train.resume and holds_iterations(then.train.save):
        logger.info("pruning is done: resuming continued pretraining")
        train = dataclasses.replace(then.train, resume=True)
        return prepare(dataclasses.replace(then, train=train), is_dry_run=is_dry_run)
    pruning = prepare(config, cut_for=then, is_dry_run=is_dry_run)
    assert pruning.target is not None
    start = Start(shape=pruning.target, checkpoint=None, description=None, resumes=False)
    following = prepare_from(start, then, is_dry_run=is_dry_run)
    check_vocabulary(following.inputs.manifest, pruning.target, pruning.start.tokenizer)
    return dataclasses.replace(pruning, then=following)


def hand_over(pruned: Trainer, pruning: PreparedRun, *, command: Sequence[str]) -> Trainer:
    """Cut the model where it lies, and build the run that follows. Collective over the world.

    Args:
        pruned: done; its groups are gone when this returns.
        pruning: what ``pruned`` was assembled from, with the run that follows.
        command: words of the command line, which checkpoints keep.

    Raises:
        ValueError: on every rank, if a row of masks keeps more or fewer units than the target.
        RuntimeError: on every rank, if the cut model's losses are not the masked one's.
    """
    start, target, following = pruning.start, pruning.target, pruning.then
    objective, groups = pruned.objective, pruned.groups
    assert target is not None
    assert following is not None
    assert isinstance(objective, StructuredPruning)
    # the masked model
    masked = _losses(objective, EXACT, following, groups)
    log_alpha = objective.binding.gather_log_alpha()
    counts = take_census(log_alpha, objective.targets)
    made = made_before(pruned.state.description(pruned.train.train_iters))
    # the smaller model
    # megatron-core knows one layout at a time; the old groups still serve the old model
    groups.destroy()
    new_groups = ParallelGroups.create(following.config.parallel)
    following = dataclasses.replace(
        following,
        start=dataclasses.replace(start, shape=target, resumes=False),
        # a checkpoint may carry another than the data of the second run
        tokenizer=following.tokenizer and (pruning.tokenizer or following.tokenizer),
        lineage={
            SOURCE_SHAPE: start.shape.to_dict(),
            PRUNED_FOR: pruned.train.train_iters,
            ROUNDING: {kind: found.num_changed for kind, found in counts.items()},
            **{name: pruning.lineage[name] for name in LINEAGE if name in pruning.lineage},
            **made,
        },
    )
    objective.terms.clear()  # the teacher of the masked model is not needed any more
    following = settle_teacher(following, new_groups)
    trainer = assemble(following, new_groups, command=command, has_weights=False)
    # the cut
    cut_in_flight(
        ModelAndOptimizer(pruned.chunks, pruned.optimizer, start.shape, groups),
        ModelAndOptimizer(trainer.chunks, trainer.optimizer, target, new_groups),
        exact_gates(log_alpha, objective.targets),
    )
    cut = _losses(trainer.objective, LOSS, following, new_groups)
    _check_losses(masked, cut, bf16=following.config.model.bf16)
    return trainer


def _check_then(config: PruneRun, then: PretrainRun) -> None:
    """Refuse continued pretraining that cannot follow in this job.

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
            f"{where}: save {then.train.save} holds a run already; add --resume to resume it, "
            f"or choose another directory"
        )


def _check_losses(masked: dict[str, float], cut: dict[str, float], *, bf16: bool) -> None:
    """Compare the cut model's losses with those of the masked one.

    Args:
        masked: loss by domain under exact masks, equal on every rank.
        cut: loss by domain of the cut model, equal on every rank.
        bf16: whether both compute in bfloat16.

    Raises:
        RuntimeError: on every rank, if they differ by more than rounding.
    """
    tolerance = SAME_LOSS_BF16 if bf16 else _SAME_LOSS
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


def _losses(
    objective: Objective, mode: str, following: PreparedRun, groups: ParallelGroups
) -> dict[str, float]:
    """Return the loss by domain, nats per token, on the text that the run that follows is
    evaluated on. Collective over the world."""
    inputs, train = following.inputs, following.config.train
    with objective.evaluating(mode) as measure:
        return evaluate_domains(
            measure,
            inputs.manifest.names,
            inputs.held_out,
            [part.subsample(inputs.eval_sequences, train.seed) for part in inputs.held_out],
            groups,
            micro_batch_size=train.eval_micro_batch_size or train.micro_batch_size,
            what=f"evaluation ({mode})",
        ).losses


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
