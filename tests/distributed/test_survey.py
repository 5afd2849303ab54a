"""What a run counts of its masks does not depend on the layout, and is what one counts by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megashear.config import MaskConfig, ModelConfig, ParallelConfig
from megashear.masks.mask_set import expected_gates
from megashear.models.llama import build_llama
from megashear.monitor import tags
from megashear.parallel import device
from megashear.parallel.groups import ParallelGroups
from megashear.train.points import cost_points
from megashear.train.pruning import RELAXED, StructuredPruning
from megashear.train.survey import survey_points
from tests.distributed.pruning_run import half_open_masks
from tests.live import fill
from tests.ranks import run_ranks
from tests.tiny import BATCH, PAIRS, layout, megatron_weights, microbatches, set_weights

PAIR = "8-groups-of-4"
SOURCE, TARGET = PAIRS[PAIR]
STEPS = (10, 20)
REDUCTION_ORDER = 1e-5
"""Relative; float32 sums over at most 4 shards in another order."""


def later_masks() -> dict[str, torch.Tensor]:
    """Masks of another evaluation: some gates have changed side."""
    generator = torch.Generator().manual_seed(11)
    return {
        kind: (values + torch.randn(values.shape, generator=generator)).clamp(-4.6, 4.6)
        for kind, values in half_open_masks(PAIR).items()
    }


def objective_of(parallel: ParallelConfig, groups: ParallelGroups) -> StructuredPruning:
    chunks = build_llama(SOURCE, groups, parallel, ModelConfig(), variant="local")
    set_weights(chunks, megatron_weights(SOURCE), groups.tensor_rank, groups.tensor_size)
    return StructuredPruning(
        chunks,
        groups,
        source=SOURCE,
        target=TARGET,
        config=MaskConfig(sparsity_warmup_iters=15, eval_relaxed_masks=True),
        seed=7,
        global_batch_size=BATCH,
        sequence_parallel=parallel.sequence_parallel,
    )


def surveyed(
    parallel: ParallelConfig,
    replicas: int = 1,
    broken: Callable[[StructuredPruning], None] | None = None,
) -> list[list[dict[str, float]]]:
    """Points of two evaluations on every rank."""

    def body(rank: int) -> list[dict[str, float]]:
        objective = objective_of(parallel, ParallelGroups.create(parallel))
        if broken is not None:
            broken(objective)
        points = []
        for step, masks in zip(STEPS, (half_open_masks(PAIR), later_masks())):
            fill(objective.masks.state_dict(), objective.binding.slice_gates(masks))
            points.append(survey_points(objective.survey(step), TARGET))
        return points

    return run_ranks(parallel.model_parallel_size * replicas, body)


@pytest.fixture(scope="module")
def alone() -> list[dict[str, float]]:
    (points,) = surveyed(layout())
    return points


@pytest.mark.parametrize(
    ("parallel", "replicas"),
    [(layout(tp=2, pp=2), 1), (layout(pp=2, vpp=2), 1), (layout(tp=2), 2)],
    ids=["tp2-pp2", "pp2-vpp2", "tp2-dp2"],
)
def test_counts_are_equal_in_every_layout_and_on_every_rank(
    alone: list[dict[str, float]], parallel: ParallelConfig, replicas: int
) -> None:
    for of_rank in surveyed(parallel, replicas):
        assert of_rank == alone


def test_counts_over_one_group_too_many_are_noticed(alone: list[dict[str, float]]) -> None:
    def count_copies(objective: StructuredPruning) -> None:
        groups = objective.binding.groups
        objective.binding._owners = lambda: [(frozenset(objective.masks.parts), groups.model)]

    found = surveyed(layout(tp=2), broken=count_copies)[0][1]
    assert found[tags.churn("hidden")] == 2 * alone[1][tags.churn("hidden")] > 0
    assert found[tags.churn("head")] == alone[1][tags.churn("head")]


def test_churn_and_sizes_are_those_that_one_counts(alone: list[dict[str, float]]) -> None:
    before = {kind: torch.ones_like(values) for kind, values in half_open_masks(PAIR).items()}
    for points, masks in zip(alone, (half_open_masks(PAIR), later_masks())):
        gates = expected_gates(masks)
        for kind, rows in gates.items():
            pairs = [
                (a != 0, b != 0)
                for row, other in zip(rows.tolist(), before[kind].tolist())
                for a, b in zip(row, other)
            ]
            changed = sum(a != b for a, b in pairs)
            assert points[tags.churn(kind)] == changed / len(pairs)
            assert points[tags.actual_size(kind)] == sum(a for a, _ in pairs) / len(rows)
        before = gates
    assert 0 < alone[1][tags.churn("intermediate")] < alone[0][tags.churn("intermediate")]
    # steps 10 and 20 of a warm-up of 15: that of the step taken last, which counts from 0
    hidden = [points[tags.target_size("hidden")] for points in alone]
    grown = 40 - (40 - 24) * 9 / 15
    assert hidden == pytest.approx([grown, 24], rel=1e-12)


def relaxed_losses(parallel: ParallelConfig) -> list[float]:
    def body(rank: int) -> list[float]:
        objective = objective_of(parallel, ParallelGroups.create(parallel))
        fill(objective.masks.state_dict(), objective.binding.slice_gates(half_open_masks(PAIR)))
        found = []
        for mode in objective.modes():
            with objective.evaluating(mode) as measure:
                losses = measure(microbatches(0))
            found.append(sum(float(part.sums.sum()) for part in losses))
        return found

    # the last stage has the losses
    return run_ranks(parallel.model_parallel_size, body)[-1]


def test_relaxed_masks_are_the_same_in_every_layout_and_others_than_the_cut_ones() -> None:
    whole, split = relaxed_losses(layout()), relaxed_losses(layout(tp=2, pp=2))
    assert split == pytest.approx(whole, rel=REDUCTION_ORDER)
    expected, exact, relaxed = whole
    assert abs(relaxed - expected) > 1e-3 * expected
    assert abs(exact - expected) > 1e-3 * expected


def test_relaxed_masks_without_a_hidden_dimension_are_refused_on_every_rank() -> None:
    def body(rank: int) -> str:
        parallel = layout(tp=2)
        objective = objective_of(parallel, ParallelGroups.create(parallel))
        with torch.no_grad():
            objective.masks.log_alpha["hidden"].fill_(-40.0)
        wanted = "relaxed masks: every hidden gate is closed"
        with pytest.raises(ValueError, match=wanted) as error, objective.evaluating(RELAXED):
            pass
        return str(error.value)

    assert len(set(run_ranks(2, body))) == 1


def test_the_host_waits_inside_for_every_collective_and_message() -> None:
    def body(rank: int) -> tuple[int, int, int]:
        counts = [0]

        @contextlib.contextmanager
        def counting() -> Iterator[None]:
            counts[0] += 1
            yield

        ones = torch.ones(3)
        group = dist.new_group([0, 1])
        with device.waiting_inside(counting):
            dist.all_reduce(ones, group=group)
            dist.all_reduce(ones, group=group, async_op=True).wait()
            if rank == 0:
                dist.send(ones, 1)
            else:
                dist.recv(ones, 0)
            blocking = counts[0]
            dist.barrier(group=group)
            objects: list[Any] = [None, None]
            dist.all_gather_object(objects, rank)
        inside = counts[0]
        dist.all_reduce(ones, group=group)
        return blocking, inside, counts[0]

    for blocking, inside, after in run_ranks(2, body):
        assert blocking == 3
        assert inside > blocking + 1
        assert after == inside  # as before


def test_costs_are_means_and_maxima_over_ranks() -> None:
    def body(rank: int) -> dict[str, float]:
        groups = ParallelGroups.create(layout(tp=2))
        device.memory_in_use = lambda: {"resident": 1.0 + rank}  # type: ignore[assignment]
        return cost_points({"data": 1.0, "forward-backward": 2.0 + rank}, groups)

    for found in run_ranks(2, body):
        assert found == {
            tags.part_seconds("data"): 1.0,
            tags.part_seconds("forward-backward"): 2.5,
            tags.MEMORY_RESIDENT: 2.0,
        }


def test_memory_of_a_process_is_what_the_system_says() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    resident = device.memory_in_use()["resident"]
    assert resident == pytest.approx(pages * 4096 / 1e9, rel=0.1)
