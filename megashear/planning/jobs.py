"""What a plan is asked for: pruning, continued pretraining, and what runs them."""

from __future__ import annotations

from megashear.config import PlanConfig
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.targets import target_units, whole_parts
from megashear.planning.hardware import GB, find_gpu
from megashear.planning.layouts import Fixed, Job
from megashear.planning.search import plan
from megashear.planning.tables import Planned
from megashear.planning.time import Cluster
from megashear.shape import ModelShape

PRUNING = "pruning"
CONTINUED = "continued pretraining"
MASKED_MODES = 2
"""Passes that a pruning run makes over its held-out text: masks as expected, and as cut."""
BITS = 8
"""Bits of a byte."""


def make_plans(config: PlanConfig, source: ModelShape, target: ModelShape | None) -> list[Planned]:
    """Plans of pruning ``source`` to ``target`` and of training that on.

    Args:
        config: what was asked for.
        source: the model there is.
        target: what it shall become; None plans for training ``source`` alone.

    Raises:
        ValueError: an unknown GPU, a target that no masks lead to, or nothing that divides or fits.
    """
    gpu = find_gpu(config.gpu)
    network = config.network_gbit
    cluster = Cluster(
        gpu=gpu,
        num_gpus=config.gpus,
        gpus_per_node=min(config.gpus_per_node, config.gpus),
        network=gpu.network if network is None else network * GB / BITS,
    )
    fixed = Fixed(
        tensor=config.tensor_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        virtual=config.num_virtual_stages_per_pipeline_rank,
        micro_batch_size=config.micro_batch_size,
    )
    return [
        Planned(
            job=job,
            cluster=cluster,
            candidates=plan(
                job,
                cluster,
                fixed,
                reserve_gib=config.memory_reserve_gib,
            ),
        )
        for job in _jobs(config, source, target)
    ]


def _jobs(config: PlanConfig, source: ModelShape, target: ModelShape | None) -> list[Job]:
    source.check_window(config.seq_length)
    trained = source if target is None else target
    jobs = [
        Job(
            name=CONTINUED,
            batch_flag="--pretraining-global-batch-size",
            shape=trained,
            masks=frozenset(),
            tokens=config.pretraining_tokens,
            global_batch_size=config.pretraining_global_batch_size,
            seq_length=config.seq_length,
            noise_streams=1,
            mfu=config.mfu,
            held_out_per_step=_held_out_per_step(
                config,
                interval=config.pretraining_eval_interval,
                sequences=config.pretraining_eval_sequences,
            ),
        )
    ]
    if target is not None:
        parts = whole_parts(source, target)
        # refuses a sparsity that masks do not reach; the warm-up has no part in that
        SparsityConstraint(parts, target_units(source, target), warmup_steps=1)
        jobs.insert(
            0,
            Job(
                name=PRUNING,
                batch_flag="--pruning-global-batch-size",
                shape=source,
                masks=frozenset(parts),
                target=target,
                tokens=config.pruning_tokens,
                global_batch_size=config.pruning_global_batch_size,
                seq_length=config.seq_length,
                noise_streams=config.mask_noise_streams,
                mfu=config.pruning_mfu,
                held_out_per_step=MASKED_MODES
                * _held_out_per_step(
                    config,
                    interval=config.pruning_eval_interval,
                    sequences=config.pruning_eval_sequences,
                ),
            ),
        )
    return jobs


def _held_out_per_step(config: PlanConfig, *, interval: int, sequences: int) -> float:
    """Sequences that one mode of evaluation reads, over the steps between two of them."""
    return config.eval_domains * sequences / interval if interval else 0.0
