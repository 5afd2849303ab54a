"""Assemble a run that is prepared: model, optimizer, loader, and all that checkpoints keep."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megashear.checkpoint.details import (
    CONSUMED_SAMPLES,
    ENVIRONMENT,
    EVAL_SEQUENCES,
    GUARD,
    LOADER,
    ORIGIN,
    REWEIGHTING,
    RUN,
    SCHEDULER,
    TEACHER_ITERATION,
)
from megashear.config import PretrainRun, PruneRun
from megashear.config.defaults import INIT_METHOD_STD
from megashear.data.loader import MixtureLoader
from megashear.data.manifest import DataManifest
from megashear.models.llama import build_llama
from megashear.parallel.agree import check_same
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.watchdog import make_watchdog
from megashear.tokenizer.chat_template import TEMPLATE_NAME, chat_template, template_of
from megashear.tokenizer.choice import load_tokenizer
from megashear.tokenizer.tokenizer_files import end_tokens
from megashear.tokenizer.turns import end_of_turn
from megashear.train.distillation import Distillation, Teacher
from megashear.train.environment import environment
from megashear.train.fill import fill
from megashear.train.guard import StepGuard
from megashear.train.inputs import borders_of
from megashear.train.loop import Trainer
from megashear.train.memory import tell_memory
from megashear.train.mixing import RunData
from megashear.train.objectives import InstructionTuning, LanguageModelling, Objective
from megashear.train.optim import build_optimizer, build_schedule
from megashear.train.prepare import PreparedRun
from megashear.train.pruning import StructuredPruning
from megashear.train.start import Start, tokenizer_of
from megashear.train.state import RunState, Stateful
from megashear.train.step import TrainStep
from megashear.train.terms import CrossEntropy, LossTerm
from megashear.train.text_samples import beginnings

logger = logging.getLogger(__name__)


def assemble(
    prepared: PreparedRun,
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
    _check_same(prepared)
    objective = _build_objective(prepared, groups)
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
        tokenizer_files=_tokenizer_files(start, inputs.manifest),
        tokenizer=prepared.tokenizer,
        tasks=prepared.tasks,
        watchdog=make_watchdog(
            groups.rank, groups.world_size, 60 * train.distributed_timeout_minutes
        ),
        source=start.checkpoint,
        bf16=config.model.bf16,
    )


def _check_same(prepared: PreparedRun) -> None:
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
            RUN: dataclasses.asdict(prepared.config),
            "shape of the model": start.shape.to_dict(),
            # a host's copy of --load-hf may lack a card
            "target of the run": {k: v for k, v in prepared.lineage.items() if k != ORIGIN},
            **prepared.inputs.replicated(),
            **_text_samples(prepared),
        }
    )


def _text_samples(prepared: PreparedRun) -> dict[str, object]:
    """Return what ranks must agree on to continue texts together, by name."""
    start, inputs, tokenizer = prepared.start, prepared.inputs, prepared.tokenizer
    if tokenizer is None:
        return {"text samples": None}
    texts = beginnings(inputs.manifest.names, inputs.held_out, prepared.config.train.text_samples)
    return {
        "text samples": [text.prompt for text in texts],
        "end tokens": sorted(end_tokens(_token_ids(start, inputs.manifest), tokenizer)),
    }


def _build_objective(prepared: PreparedRun, groups: ParallelGroups) -> Objective:
    """Build the model, with weights that are drawn from the seed, and what it is trained for."""
    config, shape, train = prepared.config, prepared.start.shape, prepared.config.train
    if not isinstance(config, PruneRun):
        is_text = isinstance(config, PretrainRun)
        std = config.init_method_std if isinstance(config, PretrainRun) else INIT_METHOD_STD
        chunks = build_llama(
            shape,
            groups,
            config.parallel,
            config.model,
            variant=config.model.transformer_impl,
            init_method_std=std,
            seed=train.seed,
            tokens_count_alike=not is_text,
        )
        objective_type = LanguageModelling if is_text else InstructionTuning
        return objective_type(chunks, terms=_build_terms(prepared, groups))
    assert prepared.target is not None
    chunks = build_llama(
        shape, groups, config.parallel, config.model, variant="local", seed=train.seed
    )
    objective = StructuredPruning(
        chunks,
        groups,
        source=shape,
        target=prepared.target,
        config=config.masks,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sequence_parallel=config.parallel.sequence_parallel,
        adam=config.optimizer,
        terms=_build_terms(prepared, groups),
    )
    return objective


def _build_terms(prepared: PreparedRun, groups: ParallelGroups) -> list[LossTerm] | None:
    """Build the terms of the loss, and a teacher where one is named; None for the usual one."""
    config, flags, teacher = prepared.config, prepared.config.distill, prepared.teacher
    if teacher is None:
        return None
    chunks = teacher.build(
        # nothing of a teacher is computed again: it has no backward pass
        *(groups, config.parallel, dataclasses.replace(config.model, recompute_granularity=None))
    )
    divergence = Distillation(
        Teacher(chunks, teacher.shape),
        groups.tensor,
        weight=flags.distill_weight,
        last_weight=flags.last_weight,
        num_steps=config.train.train_iters,
        temperature=flags.distill_temperature,
    )
    own = flags.lm_loss_weight
    return [CrossEntropy(weight=own), divergence] if own else [divergence]


def _build_loader(prepared: PreparedRun, groups: ParallelGroups) -> MixtureLoader:
    """Build the loader at its first sample; its state is yet to be filled in."""
    config, inputs = prepared.config, prepared.inputs
    borders = borders_of(config)
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
    prepared: PreparedRun, step: TrainStep, loader: MixtureLoader, command: Sequence[str]
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
            RUN: dataclasses.asdict(prepared.config),
            ENVIRONMENT: environment(step.groups.world_size, command),
            EVAL_SEQUENCES: inputs.eval_sequences,
        }
        | (
            {}
            if prepared.teacher is None
            else {TEACHER_ITERATION: prepared.teacher.description.iteration}
        )
        | (start.description.hf_config if start.description else {}),
        counts=lambda: {CONSUMED_SAMPLES: loader.consumed_samples},
        token_ids=_token_ids(start, inputs.manifest),
    )


def _token_ids(start: Start, manifest: DataManifest) -> dict[str, Any]:
    """Return the special tokens as config.json has them; what ends the assistant's turns ends texts
    of a model that learned conversations, beside what ended them before."""
    ids = dict(start.description.token_ids) if start.description else {}
    if manifest.chat_format is None:
        return ids
    tokenizer = load_tokenizer(manifest.tokenizer_directory)
    text = template_of(tokenizer)
    assert text is not None, "preprocess writes it"
    ending = end_of_turn(tokenizer, chat_template(tokenizer, text))
    known = ids.get("eos_token_id", tokenizer.eos_id)
    ends = [
        number for number in (known if isinstance(known, list) else [known]) if number is not None
    ]
    if ending is not None and ending not in ends:
        ids["eos_token_id"] = [*ends, ending] if ends else ending
    return ids


def _tokenizer_files(start: Start, manifest: DataManifest) -> list[Path]:
    """Return the tokenizer files that checkpoints carry; of a model that learns conversations with
    the template that the data were written by."""
    files = tokenizer_of(start, manifest.tokenizer_directory)
    if manifest.chat_format is None:
        return files
    others = [file for file in files if file.name != TEMPLATE_NAME]
    return [*others, manifest.tokenizer_directory / TEMPLATE_NAME]
