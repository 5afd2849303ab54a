"""Build a run: prepare what needs no other process, settle where it begins, assemble it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.checkpoint.description import ENVIRONMENT
from megashear.checkpoint.saver import name_latest
from megashear.checkpoint.store import agree_on_iteration
from megashear.config import ModelConfig, ParallelConfig, PretrainRun, PruneRun
from megashear.data.batch import DocumentBorders
from megashear.data.loader import MixtureLoader
from megashear.masks.target_flags import target_shape
from megashear.models import loadable
from megashear.models.llama import build_llama, check_layout
from megashear.monitor.sinks import check_sinks
from megashear.parallel import cpu_megatron
from megashear.parallel.agree import check_same, raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.watchdog import make_watchdog
from megashear.shape import ModelShape, read_shape
from megashear.tokenizer import tokenizer_files
from megashear.train.environment import environment
from megashear.train.fill import fill
from megashear.train.guard import StepGuard
from megashear.train.inputs import EVAL_SEQUENCES, Inputs, read_inputs
from megashear.train.loop import Trainer
from megashear.train.memory import tell_memory
from megashear.train.mixing import RunData
from megashear.train.objectives import LanguageModelling, Objective
from megashear.train.optim import build_optimizer, build_schedule, check_schedule
from megashear.train.pruning import StructuredPruning
from megashear.train.start import (
    Start,
    check_precision,
    check_weights,
    find_start,
    start_from_older,
)
from megashear.train.state import GUARD, LOADER, REWEIGHTING, SCHEDULER, RunState, Stateful
from megashear.train.step import TrainStep
from megashear.train.target import check_layers, check_masks, check_target_layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A run as far as files and flags make it, read once and checked."""

    config: PruneRun | PretrainRun
    start: Start
    inputs: Inputs
    target: ModelShape | None
    """Shape that pruning works towards; None of a run that does not prune."""
    lineage: dict[str, Any]
    """Plain values about pruning, past or to come, that every checkpoint of the run keeps."""
    then: Prepared | None = None
    """Continued pretraining that follows in the same job."""


def prepare(
    config: PruneRun | PretrainRun,
    *,
    cut_for: PretrainRun | None = None,
    is_dry_run: bool = False,
) -> Prepared:
    """Find, read and check what a run needs, before its processes meet.

    Args:
        config: the run.
        cut_for: the run that resumes with the cut model in the same job, where there is one: the
            model is cut for its tensor ranks.
        is_dry_run: whether nothing will be started; without WORLD_SIZE in the environment, one
            replica is taken then.

    Raises:
        ValueError: anything a user can mend; equal on every rank, before any of them waits for
            another.
    """
    if isinstance(config, PretrainRun):
        return prepare_from(_start_of_pretraining(config), config, is_dry_run=is_dry_run)
    check_layers(config.model)
    start = find_start(
        config.train,
        stage=StructuredPruning.stage,
        without="--load is not given; pruning starts from a checkpoint that `megashear convert` "
        "wrote, or from a Hugging Face directory with --load-hf",
    )
    target = target_shape(config.masks, start.shape)
    prepared = prepare_from(start, config, target=target, is_dry_run=is_dry_run)
    check_target_layout(target, start.shape, config, cut_for)
    return prepared


def prepare_from(
    start: Start,
    config: PruneRun | PretrainRun,
    *,
    target: ModelShape | None = None,
    is_dry_run: bool = False,
) -> Prepared:
    """Read and check what a run needs besides its beginning, which is known; see `prepare`."""
    _check_flags(config, start, is_dry_run=is_dry_run)
    inputs = read_inputs(config, start)
    lineage = {} if start.description is None else start.description.lineage
    if isinstance(config, PruneRun):
        assert target is not None
        check_masks(config.masks, config.train, start, target)
        lineage = {"target_shape": target.to_dict()}
    return Prepared(config=config, start=start, inputs=inputs, target=target, lineage=lineage)


def settle(prepared: Prepared, groups: ParallelGroups) -> Prepared:
    """Settle where the run begins, once all ranks have held the checkpoint to its checksums.

    An older iteration is taken where the newest is damaged, and the run that is resumed names it
    as its latest. Collective over the world.

    Args:
        prepared: by `prepare`, which looked at small files only.
        groups: where this rank stands.

    Returns:
        The run, prepared again where it begins elsewhere.

    Raises:
        ValueError: on every rank: nothing whole is there, or it is one that this run cannot
            resume or start from.
    """
    config, start = prepared.config, prepared.start
    if start.source is None:
        return prepared
    verify = config.train.verify_checkpoint
    directory = agree_on_iteration(start.source, groups, contents=verify)
    with raise_together():
        if directory != start.checkpoint:
            start = start_from_older(start, directory, config.train, stage=_stage(config))
            again = prepare_from(start, config, target=prepared.target)
            prepared = dataclasses.replace(again, then=prepared.then)
        if start.resumed and groups.rank == 0:
            assert start.description is not None
            name_latest(Path(start.source or ""), start.description.iteration)
    return prepared


def assemble(
    prepared: Prepared,
    groups: ParallelGroups,
    *,
    command: Sequence[str],
    has_weights: bool = True,
) -> Trainer:
    """Build model, optimizer and loader, and fill them. Collective over the world.

    Args:
        prepared: settled.
        groups: where this rank stands.
        command: words of the command line, which checkpoints keep.
        has_weights: whether the weights come from where the run begins; else the caller fills
            them in.

    Raises:
        ValueError: on every rank, where ranks see other files or flags than each other.
    """
    config, start, inputs = prepared.config, prepared.start, prepared.inputs
    train = config.train
    # what is trained
    objective = _build_objective(prepared, groups)
    _check_same(prepared)
    optimizer = build_optimizer(
        objective.chunks,
        config.optimizer,
        bf16=config.model.bf16,
        sharded=config.parallel.use_distributed_optimizer,
    )
    tell_memory(config, start.shape, objective, groups)
    step = TrainStep(
        chunks=objective.chunks,
        objective=objective,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.optimizer, train.train_iters),
        peak_lr=config.optimizer.lr,
        groups=groups,
        guard=StepGuard(train),
    )
    # what it reads
    loader = _build_loader(prepared, groups)
    # where it stands
    state = _build_state(prepared, step, loader, command)
    if has_weights:
        fill(state, start, config)
    loader.warn_of_short_domains((train.train_iters - start.first_step) * train.global_batch_size)
    return Trainer(
        train_step=step,
        state=state,
        data=RunData(
            manifest=inputs.manifest,
            loader=loader,
            held_out=inputs.held_out,
            references=inputs.references,
            reweighting=inputs.reweighting,
            phase_changes=inputs.phase_changes,
            eval_sequences=inputs.eval_sequences,
        ),
        train=train,
        tokenizer=_tokenizer(start, inputs.manifest.tokenizer_directory),
        watchdog=make_watchdog(
            groups.rank, groups.world_size, 60 * train.distributed_timeout_minutes
        ),
        source=start.checkpoint,
        bf16=config.model.bf16,
    )


def _stage(config: PruneRun | PretrainRun) -> str:
    return (StructuredPruning if isinstance(config, PruneRun) else LanguageModelling).stage


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


def _check_flags(config: PruneRun | PretrainRun, start: Start, *, is_dry_run: bool) -> None:
    """Refuse layout, batches, schedule and checkpoint that do not fit each other.

    Raises:
        ValueError: with the way out.
    """
    parallel, train, shape = config.parallel, config.train, start.shape
    alone = parallel.model_parallel_size if is_dry_run else 1
    replicas = parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", alone)))
    cpu_megatron.install()
    check_layout(shape, parallel)
    if start.checkpoint is not None:
        check_weights(start.checkpoint)
    parallel.check_microbatches(train.num_microbatches(replicas))
    parallel.check_sequence(train.seq_length)
    shape.check_window(train.seq_length)
    _check_recompute(parallel, config.model, shape)
    check_sinks(train)
    if train.save is None:
        logger.warning("--save is not given: nothing of this run will be kept")
    if train.seq_length > shape.max_position_embeddings:
        logger.warning(
            "--seq-length %d is longer than the %d positions the model was made for",
            *(train.seq_length, shape.max_position_embeddings),
        )
    check_schedule(config.optimizer, train.train_iters)
    check_precision(start, config.model)


def _check_recompute(parallel: ParallelConfig, model: ModelConfig, shape: ModelShape) -> None:
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    model.check_recompute(shape.num_layers // stages)


def _check_same(prepared: Prepared) -> None:
    """Refuse to begin where ranks see other files or flags than each other.

    Raises:
        ValueError: on every rank.
    """
    start = prepared.start
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
            "run": dataclasses.asdict(prepared.config),
            "shape of the model": start.shape.to_dict(),
            "target of the run": prepared.lineage,
            **prepared.inputs.replicated(),
        }
    )


def _build_objective(prepared: Prepared, groups: ParallelGroups) -> Objective:
    """Build the model, with weights that are drawn from the seed, and what it is trained for."""
    config, shape, train = prepared.config, prepared.start.shape, prepared.config.train
    if isinstance(config, PretrainRun):
        return LanguageModelling(
            build_llama(
                shape,
                groups,
                config.parallel,
                config.model,
                variant=config.model.transformer_impl,
                init_method_std=config.init_method_std,
                seed=train.seed,
            )
        )
    assert prepared.target is not None
    return StructuredPruning(
        build_llama(shape, groups, config.parallel, config.model, variant="local", seed=train.seed),
        groups,
        source=shape,
        target=prepared.target,
        config=config.masks,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sequence_parallel=config.parallel.sequence_parallel,
        adam=config.optimizer,
    )


def _build_loader(prepared: Prepared, groups: ParallelGroups) -> MixtureLoader:
    """Build the loader at its first sample; its state is yet to be filled in."""
    config, inputs = prepared.config, prepared.inputs
    borders = DocumentBorders.of(config.model)
    return MixtureLoader(
        inputs.training,
        inputs.mixture(when_exhausted=config.data.data_exhausted),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
        num_workers=config.data.num_workers,
        borders=borders,
        is_read=groups.is_first_stage or groups.is_last_stage or borders.part_attention,
    )


def _build_state(
    prepared: Prepared, step: TrainStep, loader: MixtureLoader, command: Sequence[str]
) -> RunState:
    """Name all that checkpoints keep; what has state is yet to be filled."""
    start, inputs = prepared.start, prepared.inputs
    parts: dict[str, Stateful] = {SCHEDULER: step.schedule, LOADER: loader, GUARD: step.guard}
    if inputs.reweighting is not None:
        parts[REWEIGHTING] = inputs.reweighting
    return RunState(
        shape=start.shape,
        chunks=step.chunks,
        optimizer=step.optimizer,
        objective=step.objective,
        groups=step.groups,
        parts=parts,
        facts=prepared.lineage
        | {
            "run": dataclasses.asdict(prepared.config),
            ENVIRONMENT: environment(step.groups.world_size, command),
            EVAL_SEQUENCES: inputs.eval_sequences,
        }
        | (start.description.hf_config if start.description else {}),
        counts=lambda: {"consumed_samples": loader.consumed_samples},
        token_ids=start.description.token_ids if start.description else {},
    )


def _tokenizer(start: Start, of_data: Path) -> Path:
    """Find the model's own tokenizer files, all of them, where it carries any; else the data's."""
    carried = start.tokenizer
    if carried is not None and carried.is_dir() and tokenizer_files.find(carried):
        return carried
    return of_data
