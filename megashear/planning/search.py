"""The layouts that fit, fastest first, or an error with the nearest where none does."""

from __future__ import annotations

from dataclasses import replace

from megashear.planning.hardware import GPUS
from megashear.planning.layouts import (
    Candidate,
    Choices,
    DivisionError,
    Job,
    candidate,
    divisions,
    order,
    recompute_choices,
)
from megashear.planning.time import Cluster
from megashear.planning.work import GIB, Work

MOST_GPUS = 4096
"""Most GPUs that are tried where those given are too few."""


class NothingFitsError(ValueError):
    """Error with a way out: no layout divides the job, or none fits."""


def fitting_layouts(
    job: Job, cluster: Cluster, chosen: Choices, *, reserve_gib: float
) -> list[Candidate]:
    """Return the best layout that fits of each tensor, pipeline and virtual size, fastest first.

    Args:
        job: the job.
        cluster: the GPUs.
        chosen: choices of the user.
        reserve_gib: memory of each GPU that tensors may not take, GiB.

    Raises:
        NothingFitsError: no layout divides the job, or none fits.
    """
    room = cluster.gpu.memory_gib - reserve_gib
    divided = list(divisions(job, cluster, chosen))
    if not divided:
        raise NothingFitsError(_nothing_divides(job, cluster, chosen))
    best: dict[tuple[int, int, int], Candidate] = {}
    for work in divided:
        found = _first_that_fits(work, job, cluster, chosen, room)
        if found is None:
            continue
        place = (work.tensor, work.pipeline, work.virtual)
        if place not in best or order(found) < order(best[place]):
            best[place] = found
    if not best:
        raise NothingFitsError(_nothing_fits(job, cluster, chosen, divided, reserve_gib))
    return sorted(best.values(), key=order)


def _first_that_fits(
    work: Work, job: Job, cluster: Cluster, chosen: Choices, room: float
) -> Candidate | None:
    """Return a division with the least recompute that fits, or None."""
    for recompute in recompute_choices(work, chosen.model):
        found = candidate(replace(work, model=recompute), job, cluster)
        if found.needed_gib <= room:
            return found
        if found.memory.lasting / GIB > room:
            return None
    return None


def _nothing_divides(job: Job, cluster: Cluster, chosen: Choices) -> str:
    """Return why the best division is refused, and the nearest numbers of GPUs that divide."""
    refused: list[DivisionError] = []
    list(divisions(job, cluster, chosen, refused))
    why = max(refused, key=lambda error: error.passed)
    others = [
        str(count)
        for count in (_nearest_below(job, cluster, chosen), _nearest_above(job, cluster, chosen))
        if count is not None
    ]
    way_out = f"; a way out: --gpus {' or '.join(others)}" if others else ""
    return (
        f"{job.name}: no layout of {cluster.num_gpus} GPUs divides layers, heads, neurons and "
        f"{job.batch_flag} {job.global_batch_size}: {why}{way_out}"
    )


def _nearest_below(job: Job, cluster: Cluster, chosen: Choices) -> int | None:
    counts = range(cluster.num_gpus - 1, 0, -1)
    return next((n for n in counts if _divides(job, cluster, chosen, n)), None)


def _nearest_above(job: Job, cluster: Cluster, chosen: Choices) -> int | None:
    counts = range(cluster.num_gpus + 1, min(2 * cluster.num_gpus, MOST_GPUS) + 1)
    return next((n for n in counts if _divides(job, cluster, chosen, n)), None)


def _divides(job: Job, cluster: Cluster, chosen: Choices, num_gpus: int) -> bool:
    smaller = replace(chosen, micro_batch_size=chosen.micro_batch_size or 1)
    return any(True for _ in divisions(job, replace(cluster, num_gpus=num_gpus), smaller))


def _nothing_fits(
    job: Job,
    cluster: Cluster,
    chosen: Choices,
    divided: list[Work],
    reserve_gib: float,
) -> str:
    """Return by how much the nearest layout is too large, and ways out, for the message."""
    room = cluster.gpu.memory_gib - reserve_gib
    smallest = (_smallest(work, job, cluster, chosen) for work in divided)
    least = min(smallest, key=lambda found: found.memory.total)
    ways = []
    if not chosen.is_open and _fits(job, cluster, Choices(), room):
        ways.append(chosen.way_out)
    count = cluster.num_gpus
    while (count := 2 * count) <= MOST_GPUS:
        if _fits(job, replace(cluster, num_gpus=count), chosen, room):
            ways.append(f"--gpus {count}")
            break
    larger = [gpu for gpu in GPUS.values() if gpu.memory_gib > cluster.gpu.memory_gib]
    for gpu in sorted(larger, key=lambda gpu: gpu.memory_gib):
        there = gpu.memory_gib - reserve_gib
        if _fits(job, replace(cluster, gpu=gpu), chosen, there):
            ways.append(f"--gpu {gpu.name}")
            break
    although = ""
    if chosen.parallel is None and chosen.model is None:
        although = (
            ", although every layer is run again and any replicas share the optimizer's state"
        )
    return (
        f"{job.name}: no layout fits. The nearest, {least.flags(job)}, needs "
        f"{least.needed_gib:.1f} GiB a GPU and has {room:.1f} ({cluster.gpu.name}: "
        f"{cluster.gpu.memory_gib:.1f}, less --memory-reserve-gib {reserve_gib:g}): "
        f"{least.needed_gib - room:.1f} GiB too much{although}; ways out: "
        f"{', or '.join(ways) or f'nothing that was tried, up to {MOST_GPUS} GPUs'}"
    )


def _smallest(work: Work, job: Job, cluster: Cluster, chosen: Choices) -> Candidate:
    """Return a division with every layer recomputed, unless the user has chosen recompute."""
    *_, least = recompute_choices(work, chosen.model)
    return candidate(replace(work, model=least), job, cluster)


def _fits(job: Job, cluster: Cluster, chosen: Choices, room: float) -> bool:
    return any(
        _smallest(work, job, cluster, chosen).needed_gib <= room
        for work in divisions(job, cluster, chosen)
    )
