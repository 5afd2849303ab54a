"""The layouts that fit, the fastest first; or what is nearest where none does."""

from __future__ import annotations

from dataclasses import replace

from megashear.planning.hardware import GPUS
from megashear.planning.layouts import (
    Candidate,
    DivisionError,
    Fixed,
    Job,
    candidate,
    divisions,
    order,
    recomputes,
)
from megashear.planning.time import Cluster
from megashear.planning.work import GIB, Work

MOST_GPUS = 4096
"""Up to how many GPUs are looked for where those given do not do."""


class NothingFitsError(ValueError):
    """No layout divides the job, or none fits; the message says what would."""


def plan(job: Job, cluster: Cluster, fixed: Fixed, *, reserve_gib: float) -> list[Candidate]:
    """Layouts that fit, the fastest first: of each tensor, pipeline and virtual size the best.

    Args:
        job: what is trained.
        cluster: what there is.
        fixed: what the user has chosen.
        reserve_gib: memory of each GPU that tensors may not take, GiB.

    Raises:
        NothingFitsError: none does.
    """
    room = cluster.gpu.memory_gib - reserve_gib
    divided = list(divisions(job, cluster, fixed))
    if not divided:
        raise NothingFitsError(_nothing_divides(job, cluster, fixed))
    best: dict[tuple[int, int, int], Candidate] = {}
    for work in divided:
        found = _first_that_fits(work, job, cluster, fixed, room)
        if found is None:
            continue
        place = (work.tensor, work.pipeline, work.virtual)
        if place not in best or order(found) < order(best[place]):
            best[place] = found
    if not best:
        raise NothingFitsError(_nothing_fits(job, cluster, fixed, divided, reserve_gib))
    return sorted(best.values(), key=order)


def _first_that_fits(
    work: Work, job: Job, cluster: Cluster, fixed: Fixed, room: float
) -> Candidate | None:
    """Return the division with as little recompute as fits; None where none does."""
    for recompute in recomputes(work, fixed.model):
        found = candidate(replace(work, model=recompute), job, cluster)
        if found.needed_gib <= room:
            return found
        if found.memory.lasting / GIB > room:
            return None
    return None


def _nothing_divides(job: Job, cluster: Cluster, fixed: Fixed) -> str:
    """Why the division that gets farthest is none, and the numbers of GPUs nearest that divide."""
    refused: list[DivisionError] = []
    list(divisions(job, cluster, fixed, refused))
    why = max(refused, key=lambda error: error.passed)
    others = [
        str(count)
        for count in (_nearest_below(job, cluster, fixed), _nearest_above(job, cluster, fixed))
        if count is not None
    ]
    way_out = f"; --gpus {' or '.join(others)} can" if others else ""
    return (
        f"{job.name}: {cluster.num_gpus} GPUs cannot be divided so that layers, heads, neurons "
        f"and {job.batch_flag} {job.global_batch_size} go into them: {why}{way_out}"
    )


def _nearest_below(job: Job, cluster: Cluster, fixed: Fixed) -> int | None:
    counts = range(cluster.num_gpus - 1, 0, -1)
    return next((n for n in counts if _divides(job, cluster, fixed, n)), None)


def _nearest_above(job: Job, cluster: Cluster, fixed: Fixed) -> int | None:
    counts = range(cluster.num_gpus + 1, min(2 * cluster.num_gpus, MOST_GPUS) + 1)
    return next((n for n in counts if _divides(job, cluster, fixed, n)), None)


def _divides(job: Job, cluster: Cluster, fixed: Fixed, num_gpus: int) -> bool:
    smaller = replace(fixed, micro_batch_size=fixed.micro_batch_size or 1)
    return any(True for _ in divisions(job, replace(cluster, num_gpus=num_gpus), smaller))


def _nothing_fits(
    job: Job,
    cluster: Cluster,
    fixed: Fixed,
    divided: list[Work],
    reserve_gib: float,
) -> str:
    """Say by how much the nearest layout is too large, and what would do."""
    room = cluster.gpu.memory_gib - reserve_gib
    smallest = (_smallest(work, job, cluster, fixed) for work in divided)
    least = min(smallest, key=lambda found: found.memory.total)
    ways = []
    if not fixed.is_open and _fits(job, cluster, Fixed(), room):
        ways.append(fixed.way_out)
    count = cluster.num_gpus
    while (count := 2 * count) <= MOST_GPUS:
        if _fits(job, replace(cluster, num_gpus=count), fixed, room):
            ways.append(f"--gpus {count}")
            break
    larger = [gpu for gpu in GPUS.values() if gpu.memory_gib > cluster.gpu.memory_gib]
    for gpu in sorted(larger, key=lambda gpu: gpu.memory_gib):
        there = gpu.memory_gib - reserve_gib
        if _fits(job, replace(cluster, gpu=gpu), fixed, there):
            ways.append(f"--gpu {gpu.name}")
            break
    although = ""
    if fixed.parallel is None and fixed.model is None:
        although = (
            ", although every layer is run again and replicas, where there are any, share the "
            "optimizer's state"
        )
    return (
        f"{job.name}: no layout fits. The nearest, {least.flags(job)}, needs "
        f"{least.needed_gib:.1f} GiB a GPU, and {room:.1f} are there ({cluster.gpu.name}: "
        f"{cluster.gpu.memory_gib:.1f}, less --memory-reserve-gib {reserve_gib:g}): "
        f"{least.needed_gib - room:.1f} GiB too much{although}; what would do: "
        f"{', or '.join(ways) or f'nothing that was tried, up to {MOST_GPUS} GPUs'}"
    )


def _smallest(work: Work, job: Job, cluster: Cluster, fixed: Fixed) -> Candidate:
    """Return a division with every layer recomputed, unless that was chosen otherwise."""
    *_, least = recomputes(work, fixed.model)
    return candidate(replace(work, model=least), job, cluster)


def _fits(job: Job, cluster: Cluster, fixed: Fixed, room: float) -> bool:
    return any(
        _smallest(work, job, cluster, fixed).needed_gib <= room
        for work in divisions(job, cluster, fixed)
    )
