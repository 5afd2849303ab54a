"""Prepare a run: find, read and check what it needs, before its processes meet."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.checkpoint.details import BEFORE, TARGET_SHAPE
from megashear.checkpoint.history import made_before
from megashear.checkpoint.saver import name_latest
from megashear.checkpoint.store import agree_on_iteration
from megashear.config import (
    Constraint,
    DistillConfig,
    FinetuneRun,
    MaskConfig,
    ModelConfig,
    ParallelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
    TrainingRun,
)
from megashear.masks.target_flags import target_shape
from megashear.models import loadable
from megashear.models.llama import check_layout
from megashear.monitor.sinks import check_sinks
from megashear.parallel import cpu_megatron
from megashear.parallel.agree import check_same, raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape, read_shape
from megashear.tasks.find import LoadedTasks
from megashear.tokenizer.choice import load_tokenizer
from megashear.tokenizer.models import Tokenizer
from megashear.train.inputs import Inputs, check_vocabulary, read_inputs
from megashear.train.objectives import InstructionTuning, LanguageModelling
from megashear.train.optim import check_schedule
from megashear.train.pruning import StructuredPruning
from megashear.train.start import (
    Start,
    check_precision,
    check_weights,
    find_start,
    start_from_older,
    tokenizer_directory,
)
from megashear.train.stored_model import StoredModel, find_model
from megashear.train.target import check_layers, check_masks, check_target_layout
from megashear.train.task_scores import load_run_tasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRun:
    """A run as far as files and flags make it, read once and checked."""

    config: TrainingRun
    start: Start
    inputs: Inputs
    target: ModelShape | None
    """Shape that pruning works towards; None of a run that does not prune."""
    lineage: dict[str, Any]
    """Plain values about pruning, past or to come, that every checkpoint of the run keeps."""
    tokenizer: Tokenizer | None = None
    """The model's, or the data's if the model has none; None of a run that asks its model no
    text."""
    teacher: StoredModel | None = None
    """What --distill-from names."""
    tasks: LoadedTasks | None = None
    """What --eval-tasks names."""
    then: PreparedRun | None = None
    """Continued pretraining that follows in the same job."""


def prepare(
    config: TrainingRun,
    *,
    cut_for: PretrainRun | None = None,
    is_dry_run: bool = False,
) -> PreparedRun:
    """Find, read and check what a run needs, before its processes meet.

    Args:
        config: the run.
        cut_for: the run that resumes with the cut model in the same job, where there is one: the
            model is cut for its tensor ranks.
        is_dry_run: whether nothing will be started; without WORLD_SIZE in the environment, one
            replica is taken then.

    Raises:
        ValueError: anything a user can correct; equal on every rank, before any of them waits for
            another.
    """
    if not isinstance(config, PruneRun):
        return prepare_from(_start_of_training(config), config, is_dry_run=is_dry_run)
    check_layers(config.model)
    start = find_start(
        config.train,
        stage=StructuredPruning.stage,
        without="--load is not given; pruning starts from a checkpoint that `megashear convert` "
        "wrote, or from a Hugging Face directory with --load-hf",
    )
    config = dataclasses.replace(config, masks=_with_constraint(config.masks, start))
    target = target_shape(config.masks, start.shape)
    prepared = prepare_from(start, config, target=target, is_dry_run=is_dry_run)
    check_target_layout(target, start.shape, config, cut_for)
    return prepared


def _with_constraint(masks: MaskConfig, start: Start) -> MaskConfig:
    """Return the settings of masks with the constraint of the run that is resumed, or the default.

    Earlier versions had the Lagrangian alone, and their checkpoints name none.
    """
    if masks.constraint is not None:
        return masks
    saved: Constraint = "projection"
    if start.resumes and start.description is not None:
        has_projection = start.description.known.flags.constraint == "projection"
        saved = "projection" if has_projection else "lagrangian"
    return dataclasses.replace(masks, constraint=saved)


def prepare_from(
    start: Start,
    config: TrainingRun,
    *,
    target: ModelShape | None = None,
    is_dry_run: bool = False,
) -> PreparedRun:
    """Read and check what a run needs besides its beginning, which is known; see `prepare`."""
    _check_flags(config, start, is_dry_run=is_dry_run)
    inputs = read_inputs(config, start)
    lineage = {} if start.description is None else start.description.lineage
    if start.description is not None and not start.resumes:
        lineage |= made_before(start.description)
    if isinstance(config, PruneRun):
        assert target is not None
        check_masks(config.masks, config.train, start, target)
        lineage = {name: lineage[name] for name in BEFORE if name in lineage}
        lineage[TARGET_SHAPE] = target.to_dict()
    return PreparedRun(
        config=config,
        start=start,
        inputs=inputs,
        target=target,
        lineage=lineage,
        teacher=_find_teacher(config, start, inputs),
        tokenizer=_load_tokenizer(
            config.train, tokenizer_directory(start, inputs.manifest.tokenizer_directory)
        ),
        tasks=load_run_tasks(config.train, is_dry_run=is_dry_run),
    )


def _load_tokenizer(train: TrainConfig, directory: Path) -> Tokenizer | None:
    """Load the tokenizer where the run reads or writes text; None where it cannot, or need not.

    Raises:
        ValueError: it cannot be loaded, and --eval-tasks need it.
    """
    if not train.eval_tasks and not train.text_samples:
        return None
    try:
        return load_tokenizer(directory)
    except ValueError as error:
        if train.eval_tasks:
            raise
        logger.warning("there will be no --text-samples at the end of the run: %s", error)
        return None


def settle(prepared: PreparedRun, groups: ParallelGroups) -> PreparedRun:
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
    then = prepared.then
    # before anything that some ranks would enter and others not
    check_same(
        {
            "flags": dataclasses.asdict(prepared.config),
            "flags of --then-pretrain": then and dataclasses.asdict(then.config),
            "teacher": _facts(prepared.teacher),
            "teacher of --then-pretrain": then and _facts(then.teacher),
            "documents of --eval-tasks": _documents(prepared),
            "documents of --then-pretrain's --eval-tasks": then and _documents(then),
        }
    )
    prepared = settle_teacher(_settle_start(prepared, groups), groups)
    return dataclasses.replace(prepared, then=then and settle_teacher(then, groups))


def settle_teacher(prepared: PreparedRun, groups: ParallelGroups) -> PreparedRun:
    """Settle which iteration of its checkpoint the teacher is, where there is one.

    Collective over the world.

    Raises:
        ValueError: on every rank: none is whole, or it is one that this run cannot learn from.
    """
    if prepared.teacher is None:
        return prepared
    teacher = prepared.teacher.settle(groups, verify=prepared.config.train.verify_checkpoint)
    with raise_together():
        _check_teacher(teacher, prepared.config, prepared.start, prepared.inputs)
    return dataclasses.replace(prepared, teacher=teacher)


def _documents(prepared: PreparedRun) -> object:
    """Return the number of documents of each task, which other hosts must find too."""
    return prepared.tasks and prepared.tasks.sizes()


def _facts(teacher: StoredModel | None) -> object:
    """Return what must be equal on all hosts of a teacher."""
    return teacher and {
        "shape": teacher.shape.to_dict(),
        "iteration": teacher.description.iteration,
        "files": sorted(
            (path.name, path.stat().st_size)
            for path in teacher.directory.iterdir()
            if path.suffix in (".safetensors", ".bin", ".distcp")
        ),
    }


def _settle_start(prepared: PreparedRun, groups: ParallelGroups) -> PreparedRun:
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
        if start.is_own and groups.rank == 0:
            assert start.description is not None
            name_latest(Path(start.source or ""), start.description.iteration)
    return prepared


def _find_teacher(config: TrainingRun, start: Start, inputs: Inputs) -> StoredModel | None:
    """Find what --distill-from names.

    Raises:
        ValueError: it is no model, or one that this run cannot learn from.
    """
    _warn_of_other_flags(config, start)
    name = config.distill.distill_from
    if name is None:
        return None
    # every Hugging Face model has this file
    is_hf = (Path(name) / "config.json").is_file()
    try:
        teacher = find_model(load=None if is_hf else name, load_hf=name if is_hf else None)
    except ValueError as error:
        raise ValueError(f"--distill-from {name}: {error}") from None
    _check_teacher(teacher, config, start, inputs)
    return teacher


def _warn_of_other_flags(config: TrainingRun, start: Start) -> None:
    """Warn that a resumed run learns from a teacher in another way than before."""
    if not start.resumes or start.description is None:
        return
    saved = start.description.known.run.get("distill", {})
    was, now = (dataclasses.asdict(each) for each in (DistillConfig(), config.distill))
    for name, value in now.items():
        if (before := saved.get(name, was[name])) != value:
            logger.warning(
                "--%s is %s, and was %s when %s was saved",
                *(name.replace("_", "-"), value, before, start.checkpoint),
            )


def _check_teacher(teacher: StoredModel, config: TrainingRun, start: Start, inputs: Inputs) -> None:
    """Refuse a teacher of another vocabulary, layout or text than the student's.

    Raises:
        ValueError: with what differs.
    """
    shape, own, length = teacher.shape, start.shape.vocab_size, config.train.seq_length
    found, saved = teacher.description.iteration, None
    if start.resumes and start.description is not None:
        saved = start.description.known.teacher_iteration
    try:
        if saved is not None and saved != found:
            raise ValueError(
                f"the saved run learned from iteration {saved}, and this is iteration {found}; "
                f"name the directory of iteration {saved}"
            )
        if shape.vocab_size != own:
            raise ValueError(
                f"the teacher has a vocabulary of {shape.vocab_size} tokens and the model one of "
                f"{own}; a teacher must have the same tokens"
            )
        check_vocabulary(inputs.manifest, shape, teacher.tokenizer)
        check_layout(shape, config.parallel, role="teacher")
        shape.check_window(length)
    except ValueError as error:
        raise ValueError(f"--distill-from {config.distill.distill_from}: {error}") from None
    if length > shape.max_position_embeddings:
        logger.warning(
            "--seq-length %d is longer than the %d positions the teacher was made for",
            *(length, shape.max_position_embeddings),
        )


def _stage(config: TrainingRun) -> str:
    if isinstance(config, PruneRun):
        return StructuredPruning.stage
    return (InstructionTuning if isinstance(config, FinetuneRun) else LanguageModelling).stage


def _start_of_training(config: PretrainRun | FinetuneRun) -> Start:
    fresh, ways = None, "name a checkpoint, or a Hugging Face directory with --load-hf"
    if isinstance(config, PretrainRun):
        ways = (
            "name a checkpoint, a Hugging Face directory with --load-hf, or --init-shape for fresh "
            "weights"
        )
        fresh = None if config.init_shape is None else read_shape(config.init_shape)
    start = find_start(
        config.train, stage=_stage(config), without=f"--load is not given; {ways}", fresh=fresh
    )
    loadable.warn(start.shape)
    return start


def _check_flags(config: TrainingRun, start: Start, *, is_dry_run: bool) -> None:
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
