"""The jobs of a plan, pruning and continued pretraining, from flags and recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megashear.config import (
    DEFAULT_EVAL_SEQUENCES,
    DataConfig,
    MaskConfig,
    ModelConfig,
    PlanConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
)
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.targets import target_units, whole_parts
from megashear.planning.hardware import GB, find_gpu
from megashear.planning.layouts import Choices, Job
from megashear.planning.search import fitting_layouts
from megashear.planning.shares import MfuShare, planned_share
from megashear.planning.tables import Plan
from megashear.planning.time import FORWARD_SHARE, Cluster
from megashear.shape import ModelShape

PRUNING = "pruning"
CONTINUED = "continued pretraining"
MASKED_MODES = 2
"""Passes of a pruning run over its held-out text: with expected masks, and with exact masks."""
BITS = 8
"""Bits of a byte."""
PUBLISHED_DOMAINS = 7
"""Domains of RedPajama."""
PUBLISHED_PRUNE = PruneRun(
    data=DataConfig(data_path=""),
    masks=MaskConfig(mask_noise_streams=8),
    train=TrainConfig(
        train_iters=3200,
        global_batch_size=32,
        seq_length=4096,
        eval_interval=50,
        eval_sequences=32,
        save_interval=800,
        keep=2,
    ),
)
PUBLISHED_PRETRAIN = PretrainRun(
    data=DataConfig(data_path=""),
    train=TrainConfig(
        train_iters=48000,
        global_batch_size=256,
        seq_length=4096,
        eval_interval=400,
        eval_sequences=500,
        save_interval=3200,
        keep=2,
    ),
)
"""The recipe of Sheared LLaMA, as in examples/llama2_7b_to_2.7b, which is planned where neither
flags nor a recipe say otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """Shape of the model that a job learns from, and where the shape comes from."""

    shape: ModelShape
    source: str


def make_plans(
    config: PlanConfig,
    source: ModelShape,
    target: ModelShape | None,
    *,
    prune: PruneRun | None = None,
    pretrain: PretrainRun | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> list[Plan]:
    """Return a plan of pruning ``source`` to ``target``, and one of pretraining the result.

    Args:
        config: flags of the plan.
        source: the model to prune.
        target: the model after pruning; None plans only for pretraining ``source``.
        prune: the run that --prune-config describes.
        pretrain: the run that --pretrain-config describes.
        teachers: teachers by the name of the job, of the jobs that have one.
        measured: content of the file that --measured names.

    Raises:
        ValueError: the GPU is unknown, no masks lead to the target, no layout divides or fits, or
            the measurements are not of this GPU.
    """
    assert config.gpus is not None, "of a budget alone there is no plan"
    gpu, teachers = find_gpu(config.gpu), teachers or {}
    network = config.network_gbit
    cluster = Cluster(
        gpu=gpu,
        num_gpus=config.gpus,
        gpus_per_node=min(config.gpus_per_node, config.gpus),
        network=gpu.network if network is None else network * GB / BITS,
    )
    after = target or source
    for teacher in teachers.values():
        if teacher.shape.vocab_size != after.vocab_size:
            raise ValueError(
                f"the teacher ({teacher.source}) has a vocabulary of {teacher.shape.vocab_size} "
                f"tokens and the model one of {after.vocab_size}; a teacher must have the same "
                f"tokens"
            )
    mfu = planned_share(config, after, gpu, measured, has_masks=False)
    trained = _continued(
        config, after, pretrain or PUBLISHED_PRETRAIN, mfu, teachers.get(CONTINUED)
    )
    jobs: list[tuple[Job, PruneRun | PretrainRun | None]] = [(trained, pretrain)]
    if target is not None:
        mfu = planned_share(config, source, gpu, measured, has_masks=True)
        run = prune or PUBLISHED_PRUNE
        jobs.insert(0, (_pruning(config, source, target, run, mfu, teachers.get(PRUNING)), prune))
    return [
        Plan(
            job=job,
            cluster=cluster,
            candidates=fitting_layouts(
                job,
                cluster,
                _fixed(config, run),
                reserve_gib=config.memory_reserve_gib,
            ),
        )
        for job, run in jobs
    ]


def _fixed(config: PlanConfig, run: PruneRun | PretrainRun | None) -> Choices:
    """Return the layout that flags choose, or else that of a recipe."""
    recompute = None
    if config.recompute_granularity is not None:
        recompute = ModelConfig(
            bf16=True,
            recompute_granularity=config.recompute_granularity,
            recompute_method=config.recompute_method,
            recompute_num_layers=config.recompute_num_layers,
        )
    chosen = Choices(
        tensor=config.tensor_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        virtual=config.num_virtual_stages_per_pipeline_rank,
        micro_batch_size=config.micro_batch_size,
        model=recompute,
    )
    if run is None or config.any_layout or chosen != Choices():
        return chosen
    return Choices.of_run(run)


def _pruning(
    config: PlanConfig,
    source: ModelShape,
    target: ModelShape,
    run: PruneRun,
    mfu: MfuShare,
    teacher: Teacher | None,
) -> Job:
    parts = whole_parts(source, target)
    # refuses a sparsity that masks do not reach, whatever the warm-up
    SparsityConstraint(parts, target_units(source, target), warmup_steps=1)
    return Job(
        name=PRUNING,
        shape=source,
        masks=frozenset(parts),
        target=target,
        noise_streams=config.mask_noise_streams or run.masks.mask_noise_streams,
        mfu=mfu.value,
        mfu_source=mfu.source,
        **_teaches(teacher, run),
        **_reads(
            config,
            run,
            source,
            prefix="pruning",
            recipe=config.prune_config,
            modes=MASKED_MODES + run.masks.eval_relaxed_masks,
        ),
    )


def _continued(
    config: PlanConfig,
    shape: ModelShape,
    run: PretrainRun,
    mfu: MfuShare,
    teacher: Teacher | None,
) -> Job:
    return Job(
        name=CONTINUED,
        shape=shape,
        masks=frozenset(),
        noise_streams=1,
        mfu=mfu.value,
        mfu_source=mfu.source,
        **_teaches(teacher, run),
        **_reads(
            config,
            run,
            shape,
            prefix="pretraining",
            recipe=config.pretrain_config,
            modes=1,
        ),
    )


def _teaches(teacher: Teacher | None, run: PruneRun | PretrainRun) -> dict[str, Any]:
    """Return the fields of a job for its teacher."""
    if teacher is None:
        return {}
    return {
        "teacher": teacher.shape,
        "teacher_source": teacher.source,
        "has_entropy": bool(run.distill.lm_loss_weight),
    }


def _reads(
    config: PlanConfig,
    run: PruneRun | PretrainRun,
    shape: ModelShape,
    *,
    prefix: str,
    recipe: str | None,
    modes: int,
) -> dict[str, Any]:
    """Return the fields of a job for the text that it trains on and evaluates.

    Flags of the plan count first, then the run.

    Args:
        config: flags of the plan.
        run: the recipe, or the published one.
        shape: the model.
        prefix: beginning of this job's flags.
        recipe: the recipe's file, if one was named.
        modes: passes of an evaluation over its text.
    """
    train = run.train

    def asked(name: str) -> Any:
        return getattr(config, f"{prefix}_{name}")

    seq_length = config.seq_length or train.seq_length
    shape.check_window(seq_length)
    batch = asked("global_batch_size") or train.global_batch_size
    interval = train.eval_interval if asked("eval_interval") is None else asked("eval_interval")
    sequences = asked("eval_sequences")
    if sequences is None and train.eval_share is not None:
        held_out = train.eval_share * batch / FORWARD_SHARE if interval else 0.0
    else:
        if sequences is None:
            sequences = train.eval_sequences or DEFAULT_EVAL_SEQUENCES
            if train.eval_tokens is not None:
                sequences = train.eval_tokens // train.seq_length
        domains = config.eval_domains or len(run.data.domain_weights) or PUBLISHED_DOMAINS
        held_out = modes * domains * sequences / interval if interval else 0.0
    in_file = recipe is not None and asked("global_batch_size") is None
    return {
        "tokens": asked("tokens") or train.train_iters * train.global_batch_size * train.seq_length,
        "global_batch_size": batch,
        "batch_flag": (
            f"global_batch_size in {recipe}" if in_file else f"--{prefix}-global-batch-size"
        ),
        "seq_length": seq_length,
        "held_out_per_step": held_out,
        "save_interval": train.save_interval,
        "keep": train.keep,
    }
