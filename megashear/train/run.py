"""prune and pretrain: from a configuration to a finished run."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megashear.checkpoint.description import ENVIRONMENT, Description, holds_iterations
from megashear.checkpoint.hold import held_together
from megashear.checkpoint.store import load_weights
from megashear.config import PretrainRun, PruneRun, TrainConfig
from megashear.conversion.sharded_hf import load_hf
from megashear.data.batch import DocumentBorders
from megashear.data.loader import MixtureLoader
from megashear.data.manifest import DataManifest
from megashear.masks.census import take_census
from megashear.masks.mask_set import exact_gates
from megashear.masks.target_flags import target_shape
from megashear.models import loadable
from megashear.models.llama import build_llama
from megashear.parallel.agree import check_same
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.parallel.watchdog import collective_timeout_s, make_watchdog
from megashear.shape import ModelShape, read_shape
from megashear.tokenizer import tokenizer_files
from megashear.train.environment import environment
from megashear.train.guard import StepGuard
from megashear.train.in_flight import Optimized, cut_in_flight
from megashear.train.inputs import (
    EVAL_SEQUENCES,
    Inputs,
    check_inputs,
    check_vocabulary,
    held_out_sets,
    training_sequences,
)
from megashear.train.loop import Trainer
from megashear.train.memory import tell_memory
from megashear.train.mixing import RunData
from megashear.train.objectives import LOSS, LanguageModelling, Objective
from megashear.train.optim import apply_flags, build_optimizer, build_schedule
from megashear.train.pruning import EXACT, StructuredPruning
from megashear.train.result import RunResult
from megashear.train.seam import (
    check_seam,
    check_then,
    losses_at_seam,
    resuming,
)
from megashear.train.start import (
    Start,
    check_layers,
    check_masks,
    check_target_layout,
    find_start,
    settle,
)
from megashear.train.state import GUARD, LOADER, REWEIGHTING, SCHEDULER, RunState, Stateful
from megashear.train.step import TrainStep

logger = logging.getLogger(__name__)


def prune(
    config: PruneRun, then: PretrainRun | None = None, *, command: Sequence[str] = ()
) -> RunResult:
    """Learn masks and weights together. Collective over the processes torchrun started.

    Args:
        config: the run.
        then: continued pretraining of the cut model, in the same job, with the moments that
            pruning's optimizer holds; see `in_flight`.
        command: words of the command line, which checkpoints keep.

    Returns:
        What was reached.

    Raises:
        ValueError: anything a user can mend, found before processes meet where it can be.
    """
    train = config.train
    if (left := _after_pruning(config, then)) is not None:
        logger.info("pruning is done: going on with continued pretraining")
        return pretrain(left, command=command)
    ready = _ReadyToPrune.check(config, then)
    start, target, inputs, behind = ready.start, ready.target, ready.inputs, ready.behind

    def check(older: Start) -> None:
        check_inputs(config, older)
        check_masks(config.masks, train, older, target)

    timeout_s = collective_timeout_s(config.train.distributed_timeout_minutes)
    saves = [train.save, None if then is None else then.train.save]
    with (
        distributed(config.parallel, config.model, timeout_s=timeout_s) as groups,
        held_together(saves, groups),
    ):
        start = settle(start, train, groups, stage=StructuredPruning.stage, check=check)
        trainer = _pruning_trainer(config, start, target, inputs, groups, command)
        reached = trainer.run(start.first_step)
        reached_end = reached.step == train.train_iters and reached.stopped is None
        done = reached_end and not reached.exit_status
        if behind is not None and not done:
            logger.warning(
                "pruning ended at step %d of %d: neither the cut nor what --then-pretrain %s "
                "describes was begun",
                *(reached.step, train.train_iters, config.then_pretrain),
            )
        if behind is None or not done:
            return reached
        following = behind.take_over(trainer, start, target, groups, command)
        del trainer  # the larger model is not needed any more
        gc.collect()
        return dataclasses.replace(following.run(0), pruning=reached)


def check_prune(config: PruneRun, then: PretrainRun | None = None) -> None:
    """Refuse what `prune` refuses before processes meet, where no device is needed to tell.

    Raises:
        ValueError: anything a user can mend.
    """
    if (left := _after_pruning(config, then)) is not None:
        check_pretrain(left)
    else:
        _ReadyToPrune.check(config, then, is_dry_run=True)


def check_pretrain(config: PretrainRun) -> None:
    """Refuse what `pretrain` refuses before processes meet, where no device is needed to tell.

    Raises:
        ValueError: anything a user can mend.
    """
    check_inputs(config, _start_of_pretraining(config), is_dry_run=True)


def _after_pruning(config: PruneRun, then: PretrainRun | None) -> PretrainRun | None:
    """Return the continued pretraining to resume, where a job of both is past its pruning."""
    if then is None:
        return None
    check_then(config, then)
    if config.train.resume and holds_iterations(then.train.save):
        return dataclasses.replace(then, train=resuming(then.train))
    return None


@dataclass(frozen=True, kw_only=True)
class _ReadyToPrune:
    """A pruning run, checked as far as files and flags alone can tell."""

    start: Start
    target: ModelShape
    inputs: Inputs
    behind: _Behind | None

    @classmethod
    def check(
        cls, config: PruneRun, then: PretrainRun | None, *, is_dry_run: bool = False
    ) -> _ReadyToPrune:
        """Refuse what need not wait for other processes.

        Raises:
            ValueError: as `prune`.
        """
        check_layers(config.model)
        start = find_start(
            config.train,
            stage=StructuredPruning.stage,
            without="--load is not given; pruning starts from a checkpoint that `megashear "
            "convert` wrote, or from a Hugging Face directory with --load-hf",
        )
        target = target_shape(config.masks, start.shape)
        inputs = check_inputs(config, start, is_dry_run=is_dry_run)
        check_masks(config.masks, config.train, start, target)
        check_target_layout(target, start.shape, config, then)
        behind = None
        if then is not None:
            behind = _Behind.check(then, start, target, is_dry_run=is_dry_run)
        return cls(start=start, target=target, inputs=inputs, behind=behind)


def _pruning_trainer(
    config: PruneRun,
    start: Start,
    target: ModelShape,
    inputs: Inputs,
    groups: ParallelGroups,
    command: Sequence[str],
) -> Trainer:
    train = config.train
    chunks = build_llama(
        start.shape, groups, config.parallel, config.model, variant="local", seed=train.seed
    )
    objective = StructuredPruning(
        chunks,
        groups,
        source=start.shape,
        target=target,
        config=config.masks,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sequence_parallel=config.parallel.sequence_parallel,
        adam=config.optimizer,
    )
    details = {"target_shape": target.to_dict()}
    return _trainer(config, start, objective, inputs, groups, details, command=command)


@dataclass(frozen=True, kw_only=True)
class _Behind:
    """Continued pretraining behind the pruning of the same job, checked before it starts."""

    config: PretrainRun
    inputs: Inputs

    @classmethod
    def check(
        cls, config: PretrainRun, start: Start, target: ModelShape, *, is_dry_run: bool = False
    ) -> _Behind:
        """Refuse what would only be found when pruning is over.

        Raises:
            ValueError: as `pretrain`.
        """
        fresh = Start(shape=target, checkpoint=None, description=None, continues=False)
        inputs = check_inputs(config, fresh, is_dry_run=is_dry_run)
        check_vocabulary(inputs.manifest, target, start.tokenizer)
        return cls(config=config, inputs=inputs)

    def take_over(
        self,
        pruned: Trainer,
        start: Start,
        target: ModelShape,
        groups: ParallelGroups,
        command: Sequence[str],
    ) -> Trainer:
        """Cut the model where it lies and hand it on. Collective over the world."""
        config, objective = self.config, pruned.objective
        assert isinstance(objective, StructuredPruning)
        held_out = held_out_sets(self.inputs.manifest, config.train.seq_length, config.model)
        size = self.inputs.eval_sequences
        masked = losses_at_seam(
            objective, EXACT, held_out, config.train, groups, num_sequences=size
        )
        whole = objective.binding.gather_log_alpha()
        counts = take_census(whole, objective.targets)
        # megatron-core knows one layout at a time; the old groups go on serving the old model
        groups.destroy()
        new_groups = ParallelGroups.create(config.parallel)
        chunks = build_llama(
            target,
            new_groups,
            config.parallel,
            config.model,
            variant=config.model.transformer_impl,
            seed=config.train.seed,
        )
        trainer = _trainer(
            config,
            dataclasses.replace(start, shape=target, continues=False),
            LanguageModelling(chunks),
            self.inputs,
            new_groups,
            {
                "source_shape": start.shape.to_dict(),
                "pruned_for": pruned.train.train_iters,
                "rounding": {kind: found.num_changed for kind, found in counts.items()},
            },
            command=command,
            fill=False,
        )
        cut_in_flight(
            Optimized(pruned.chunks, pruned.optimizer, start.shape, groups),
            Optimized(trainer.chunks, trainer.optimizer, target, new_groups),
            exact_gates(whole, objective.targets),
        )
        smaller = losses_at_seam(
            trainer.objective, LOSS, held_out, config.train, new_groups, num_sequences=size
        )
        check_seam(masked, smaller, bf16=config.model.bf16)
        return trainer


def pretrain(config: PretrainRun, *, command: Sequence[str] = ()) -> RunResult:
    """Language modelling from a checkpoint or from fresh weights. Collective over the processes
    torchrun started.

    Args:
        config: the run.
        command: words of the command line, which checkpoints keep.

    Returns:
        What was reached.

    Raises:
        ValueError: anything a user can mend, found before processes meet where it can be.
    """
    start = _start_of_pretraining(config)
    inputs = check_inputs(config, start)
    timeout_s = collective_timeout_s(config.train.distributed_timeout_minutes)
    with (
        distributed(config.parallel, config.model, timeout_s=timeout_s) as groups,
        held_together([config.train.save], groups),
    ):
        start = settle(
            start,
            config.train,
            groups,
            stage=LanguageModelling.stage,
            check=lambda older: check_inputs(config, older),
        )
        chunks = build_llama(
            start.shape,
            groups,
            config.parallel,
            config.model,
            variant=config.model.transformer_impl,
            init_method_std=config.init_method_std,
            seed=config.train.seed,
        )
        objective = LanguageModelling(chunks)
        lineage = {} if start.description is None else start.description.lineage
        trainer = _trainer(config, start, objective, inputs, groups, lineage, command=command)
        return trainer.run(start.first_step)


def _start_of_pretraining(config: PretrainRun) -> Start:
    fresh = None if config.init_shape is None else read_shape(config.init_shape)
    start = find_start(
        config.train,
        stage=LanguageModelling.stage,
        without="--load is not given; name a checkpoint, a Hugging Face directory with --load-hf, "
        "or --init-shape for fresh weights",
        fresh=fresh,
    )
    loadable.warn(start.shape)
    return start


def _tell_batch(description: Description, train: TrainConfig) -> None:
    """Say what a changed global batch does to what is counted."""
    before = description.details["run"]["train"]["global_batch_size"]
    if before != train.global_batch_size:
        left = train.train_iters - description.iteration
        logger.warning(
            "--global-batch-size was %d in the saved run and is %d now: steps are counted, by "
            "--train-iters and by the schedule of the rate, and go on from %d; %d samples are "
            "read, %d more will be in the %d steps to come",
            *(before, train.global_batch_size, description.iteration),
            *(description.details["consumed_samples"], left * train.global_batch_size, left),
        )


def _rate(optimizer: MegatronOptimizer) -> float | None:
    """Return the learning rate of the next step; None on a rank that steps nothing."""
    return next((float(group["lr"]) for group in optimizer.param_groups), None)


def _tell_rate(
    description: Description,
    config: PruneRun | PretrainRun,
    before: float | None,
    now: float | None,
) -> None:
    """Warn of a learning rate that jumps where the run is resumed, by flags that have changed."""
    if before is None or now is None or abs(now - before) <= _SAME_RATE * max(now, before):
        return
    saved = description.details["run"]
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
"""Relative; a smaller change is none that a loss shows."""
_OF_SCHEDULE = (
    *("train_iters", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_decay_iters"),
)


def _trainer(
    config: PruneRun | PretrainRun,
    start: Start,
    objective: Objective,
    inputs: Inputs,
    groups: ParallelGroups,
    details: dict[str, Any],
    *,
    command: Sequence[str],
    fill: bool = True,
) -> Trainer:
    """Build what is left, and fill it from the checkpoint. Collective over the world.

    Args:
        command: words of the command line.
        fill: whether weights come from ``start``; else the caller brings them.

    Raises:
        ValueError: on every rank, where ranks see other files or flags than each other.
    """
    check_same(
        {
            "first step": start.first_step,
            "stage of the checkpoint": start.description and start.description.stage,
            "files of --load-hf": start.hf
            and sorted(
                (path.name, path.stat().st_size)
                for path in start.hf.iterdir()
                if path.suffix in (".safetensors", ".bin")
            ),
            "run": dataclasses.asdict(config),
            "shape of the model": start.shape.to_dict(),
            "target of the run": details,
            **inputs.replicated(),
        }
    )
    train, chunks, manifest = config.train, objective.chunks, inputs.manifest
    optimizer = build_optimizer(
        chunks,
        config.optimizer,
        bf16=config.model.bf16,
        sharded=config.parallel.use_distributed_optimizer,
    )
    tell_memory(config, start.shape, objective, groups)
    schedule = build_schedule(optimizer, config.optimizer, train.train_iters)
    domains = training_sequences(manifest, train)
    borders = DocumentBorders.of(config.model)
    loader = MixtureLoader(
        domains,
        inputs.mixture(
            train,
            start,
            available=[domain.samples_per_epoch for domain in domains],
            when_exhausted=config.data.data_exhausted,
        ),
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
        num_workers=config.data.num_workers,
        borders=borders,
        is_read=groups.is_first_stage or groups.is_last_stage or borders.part_attention,
    )
    guard = StepGuard(train)
    parts: dict[str, Stateful] = {SCHEDULER: schedule, LOADER: loader, GUARD: guard}
    if inputs.reweighting is not None:
        parts[REWEIGHTING] = inputs.reweighting
    state = RunState(
        shape=start.shape,
        chunks=chunks,
        optimizer=optimizer,
        objective=objective,
        groups=groups,
        parts=parts,
        facts=details
        | {
            "run": dataclasses.asdict(config),
            ENVIRONMENT: environment(groups.world_size, command),
            EVAL_SEQUENCES: inputs.eval_sequences,
        }
        | (start.description.hf_config if start.description else {}),
        counts=lambda: {"consumed_samples": loader.consumed_samples},
        token_ids=start.description.token_ids if start.description else {},
    )
    if start.continues:
        _resume(state, start, config)
    elif fill and (start.checkpoint is not None or start.hf is not None):
        if start.hf is not None:
            load_hf(start.hf, chunks, groups, optimizer)
        elif start.checkpoint is not None:
            load_weights(start.checkpoint, chunks, optimizer)
        logger.info("starting from the weights of %s", start.hf or start.checkpoint)
    elif fill:
        logger.info("starting from fresh weights, seed %d", train.seed)
    loader.warn_of_short_domains((train.train_iters - start.first_step) * train.global_batch_size)
    return Trainer(
        train_step=TrainStep(
            chunks=chunks,
            objective=objective,
            optimizer=optimizer,
            schedule=schedule,
            peak_lr=config.optimizer.lr,
            groups=groups,
            guard=guard,
        ),
        state=state,
        data=RunData(
            manifest=manifest,
            loader=loader,
            held_out=held_out_sets(manifest, train.seq_length, config.model),
            references=inputs.references,
            reweighting=inputs.reweighting,
            phase_changes=inputs.changes(train, start),
            eval_sequences=inputs.eval_sequences,
        ),
        train=train,
        tokenizer=_tokenizer(start, manifest),
        watchdog=make_watchdog(
            groups.rank, groups.world_size, 60 * train.distributed_timeout_minutes
        ),
        source=start.checkpoint,
        bf16=config.model.bf16,
    )


def _resume(state: RunState, start: Start, config: PruneRun | PretrainRun) -> None:
    """Fill a run from its checkpoint, and log what flags change. Collective over the world."""
    assert start.checkpoint is not None
    description = state.load_tensors(start.checkpoint)
    saved_rate = _rate(state.optimizer)
    apply_flags(state.optimizer, config.optimizer)
    state.load_parts(description)
    _tell_rate(description, config, saved_rate, _rate(state.optimizer))
    if config.data.domain_weights:
        logger.info("--domain-weights are the saved run's from here on, not the flag's")
    _tell_batch(description, config.train)
    logger.info("continuing %s at step %d", start.checkpoint, description.iteration)


def _tokenizer(start: Start, manifest: DataManifest) -> Path:
    """Find the model's own tokenizer files, all of them, where it carries any; else the data's."""
    carried = start.tokenizer
    if carried is not None and carried.is_dir() and tokenizer_files.find(carried):
        return carried
    return manifest.tokenizer_directory
