"""A plan as text for people, and as values for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megashear.planning.activations import streams_under_way
from megashear.planning.hardware import GB
from megashear.planning.layouts import Candidate, Job
from megashear.planning.memory import checkpoint_bytes
from megashear.planning.time import Cluster, forward_seconds
from megashear.planning.work import GIB, Work
from megashear.text_table import text_table

HOUR = 3600.0
"""Seconds of an hour."""
_COLUMNS = (
    *("tp", "pp", "vpp", "dp", "sp", "distopt", "micro", "recompute", "GiB/GPU", "s/step"),
    *("tokens/s/GPU", "MFU", "bubble", "hours", "GPU-hours"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A job and the layouts that fit it, fastest first."""

    job: Job
    cluster: Cluster
    candidates: Sequence[Candidate]

    def evaluation_seconds(self, found: Candidate) -> float:
        """Return the seconds of evaluations per step."""
        return self.job.held_out_per_step * forward_seconds(found.work, found.time)

    def hours(self, found: Candidate) -> float:
        """Return the hours of the whole job with evaluations, but without checkpoints."""
        return self.job.steps * (found.time.total + self.evaluation_seconds(found)) / HOUR

    def tokens_per_second(self, found: Candidate) -> float:
        """Return the tokens per second of one GPU, training alone."""
        batch = self.job.global_batch_size * self.job.seq_length
        return batch / found.time.total / self.cluster.num_gpus

    def utilisation(self, found: Candidate) -> float:
        """Return the share of the peak that the model's arithmetic reaches over a whole step."""
        flops = self.job.shape.training_flops(self.job.seq_length)
        return flops * self.tokens_per_second(found) / self.cluster.gpu.peak_flops


def disk(job: Job) -> str:
    """Return the line about the disk space of the job's checkpoints."""
    size = checkpoint_bytes(job.shape, job.masks) / GB
    kept = f"with --keep {job.keep}" if job.keep else "all kept"
    return (
        f"Disk: {job.saves} checkpoints of {size:.1f} GB; {kept}, {job.saves_on_disk} at once, "
        f"{size * job.saves_on_disk:,.0f} GB"
    )


def lines(plan: Plan, *, top: int) -> Iterator[str]:
    """Yield the lines of a job's plan: the job, a table of layouts, and the first layout in full.

    Args:
        plan: the job.
        top: layouts in the table.
    """
    job, cluster = plan.job, plan.cluster
    yield (
        f"{job.name}: {job.steps:,} steps of {job.global_batch_size} x {job.seq_length:,} tokens "
        f"({job.steps * job.global_batch_size * job.seq_length / 1e9:.2f} B), "
        f"{job.shape.num_params():,} parameters, {cluster.num_gpus} {cluster.gpu.name}, "
        f"{100 * job.mfu:.3g} % of the peak while computing"
        + (f" ({job.mfu_source})" if job.mfu_source else "")
    )
    if job.teacher:
        yield f"teacher: {job.teacher.num_params():,} parameters, {job.teacher_source}"
    yield ""
    table = [_COLUMNS, *(_row(plan, found) for found in plan.candidates[:top])]
    yield text_table(table, left=0, rule=False)
    left = len(plan.candidates) - top
    if left > 0:
        yield f"and {left} more that fit; --top {len(plan.candidates)} shows all"
    yield ""
    first = plan.candidates[0]
    yield f"The first: {first.flags(job)}"
    yield disk(job)
    yield ""
    yield from _memory(first, cluster)
    yield ""
    yield from _time(plan, first)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return plain values of every layout, for JSON: bytes, seconds, tokens per second and GPU."""
    job = plan.job
    return {
        "steps": job.steps,
        "global_batch_size": job.global_batch_size,
        "seq_length": job.seq_length,
        "parameters": job.shape.num_params(),
        "shape": job.shape.to_dict(),
        "masks": sorted(job.masks),
        "teacher_parameters": job.teacher and job.teacher.num_params(),
        "teacher_source": job.teacher_source or None,
        "flops_per_token": job.shape.training_flops(job.seq_length),
        "assumed_mfu": job.mfu,
        "mfu_source": job.mfu_source,
        "held_out_sequences_per_step": job.held_out_per_step,
        "checkpoint_bytes": checkpoint_bytes(job.shape, job.masks),
        "checkpoints": job.saves,
        "checkpoints_at_once": job.saves_on_disk,
        "gpu": plan.cluster.gpu.name,
        "gpus": plan.cluster.num_gpus,
        "layouts": [_candidate(plan, found) for found in plan.candidates],
    }


def _candidate(plan: Plan, found: Candidate) -> dict[str, Any]:
    work, time = found.work, found.time
    return {
        "tensor_model_parallel_size": work.tensor,
        "pipeline_model_parallel_size": work.pipeline,
        "num_virtual_stages_per_pipeline_rank": work.virtual,
        "data_parallel_size": work.data_size,
        "sequence_parallel": work.parallel.sequence_parallel,
        "use_distributed_optimizer": work.parallel.use_distributed_optimizer,
        "micro_batch_size": work.micro_batch_size,
        "num_microbatches": work.num_microbatches,
        "recompute_granularity": work.model.recompute_granularity,
        "recompute_method": work.model.recompute_method,
        "recompute_num_layers": work.model.recompute_num_layers,
        "flags": found.flags(plan.job),
        "fullest_stage": found.stage,
        "bytes": found.memory.parts() | {"total": found.memory.total},
        "seconds": {
            "compute": time.compute,
            "bubble": time.bubble,
            "teacher": time.teacher,
            "tensor": time.tensor.exposed,
            "pipeline": time.pipeline.exposed,
            "data": time.data.exposed,
            "step": time.total,
        },
        "evaluation_seconds_per_step": plan.evaluation_seconds(found),
        "sent_bytes": {
            kind: {"bytes": traffic.sent, "link": traffic.link}
            for kind, traffic in (
                ("tensor", time.tensor),
                ("pipeline", time.pipeline),
                ("data", time.data),
            )
        },
        "tokens_per_second_per_gpu": plan.tokens_per_second(found),
        "model_flops_utilisation": plan.utilisation(found),
        "hours": plan.hours(found),
        "gpu_hours": plan.hours(found) * plan.cluster.num_gpus,
    }


def _row(plan: Plan, found: Candidate) -> tuple[str, ...]:
    work, time = found.work, found.time
    hours = plan.hours(found)
    return (
        str(work.tensor),
        str(work.pipeline),
        str(work.virtual),
        str(work.data_size),
        "yes" if work.parallel.sequence_parallel else "-",
        "yes" if work.parallel.use_distributed_optimizer else "-",
        str(work.micro_batch_size),
        _recompute(found),
        f"{found.needed_gib:.1f}",
        f"{time.total:.2f}",
        f"{plan.tokens_per_second(found):,.0f}",
        f"{100 * plan.utilisation(found):.1f} %",
        f"{100 * time.bubble / time.total:.1f} %",
        f"{hours:,.1f}",
        f"{hours * plan.cluster.num_gpus:,.0f}",
    )


def _recompute(found: Candidate) -> str:
    work = found.work
    if work.model.recompute_granularity is None:
        return "none"
    if work.model.recompute_method == "uniform":
        return "all"
    return f"{work.model.recompute_num_layers} of {work.chunk_layers}"


def _memory(found: Candidate, cluster: Cluster) -> Iterator[str]:
    memory, work = found.memory, found.work
    where = f"a rank of stage {found.stage}" if work.pipeline > 1 else "a rank"
    yield f"Memory of {where}, GiB:"
    masks = [
        ("folded", memory.folded, _folded(work, found.stage)),
        ("masks", memory.masks, "gates and their gradients"),
    ]
    teacher = [("teacher", memory.teacher, "its weights, and hidden states that wait")]
    rows = [
        ("weights", memory.weights, "bfloat16"),
        ("gradients", memory.gradients, "float32"),
        ("masters", memory.masters, f"float32, over {work.data_size} replicas"),
        ("moments", memory.moments, f"two of float32, over {work.data_size} replicas"),
        *masks * bool(work.masks),
        *teacher * (work.teacher is not None),
        ("activations", memory.activations, "kept for backward passes"),
        ("buffers", memory.buffers, "what one pass needs for a moment"),
    ]
    for name, size, what in rows:
        yield f"  {name:12} {size / GIB:8.3f}  {what}"
    yield (
        f"  {'at most':12} {memory.total / GIB:8.3f}  of {cluster.gpu.memory_gib:.1f} on "
        f"{cluster.gpu.name}"
    )


def _folded(work: Work, stage: int) -> str:
    of = "of the weights that masks act on, bfloat16"
    if work.own_streams == 1:
        return f"one copy {of}"
    copies = streams_under_way(work, stage)  # of each chunk
    fewest, most = min(copies), max(copies)
    number = f"{most} copies" if fewest == most else f"{fewest} to {most} copies"
    number = "one copy" if most == 1 else f"{number} at once"
    return f"{number} {of}; one gradient of each, float32"


def _time(plan: Plan, found: Candidate) -> Iterator[str]:
    time, work = found.time, found.work
    yield f"One step, seconds ({work.num_microbatches} microbatches a replica), and GB a GPU sends:"
    yield f"  {'compute':12} {time.compute:8.3f}"
    yield f"  {'bubble':12} {time.bubble:8.3f}"
    if work.teacher is not None:
        yield f"  {'teacher':12} {time.teacher:8.3f}  its forward pass"
    for name, traffic in (
        ("tensor", time.tensor),
        ("pipeline", time.pipeline),
        ("data", time.data),
    ):
        sent = f"  {traffic.sent / GB:8.2f} GB over the {traffic.link}" if traffic.sent else ""
        yield f"  {name:12} {traffic.exposed:8.3f}{sent}"
    yield f"  {'step':12} {time.total:8.3f}"
    yield (
        f"  {'evaluation':12} {plan.evaluation_seconds(found):8.3f}  a step, "
        f"{plan.job.held_out_per_step:.2f} sequences forward"
    )
