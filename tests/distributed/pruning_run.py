"""Pruning steps at any layout, with everything the layout law compares brought home whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megashear.config import (
    Constraint,
    MaskConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megashear.masks.mask_set import expected_gates
from megashear.masks.targets import whole_parts
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.train.guard import StepGuard
from megashear.train.optim import build_optimizer, build_schedule
from megashear.train.pruning import StructuredPruning
from megashear.train.step import TrainStep
from tests.live import fill
from tests.ranks import run_ranks
from tests.tiny import (
    BATCH,
    PAIRS,
    assemble,
    megatron_weights,
    microbatches,
    named_parameters,
    set_weights,
)

STREAMS = 2
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=2)


@dataclass
class Snapshot:
    """State before a step and gradients of it, whole."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    multipliers: dict[str, Tensor] = field(default_factory=dict)
    loss: float = float("nan")
    penalty: float = float("nan")
    weight_grads: dict[str, Tensor] = field(default_factory=dict)
    leaf_grads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    mask_grads: dict[str, Tensor] = field(default_factory=dict)
    multiplier_grads: dict[str, Tensor] = field(default_factory=dict)
    expected_open: dict[str, Tensor] = field(default_factory=dict)


def run(
    parallel: ParallelConfig,
    *,
    data_size: int = 1,
    steps: int = 3,
    model: ModelConfig | None = None,
    follow: Sequence[Snapshot] | None = None,
    broken: Callable[[StructuredPruning], None] | None = None,
    train_iters: int = 40,
    pair: str = "8-groups-of-4",
    constraint: Constraint = "lagrangian",
) -> list[Snapshot]:
    """Prune for ``steps`` steps and return a snapshot of each.

    Args:
        parallel: the layout.
        data_size: replicas.
        steps: how many.
        model: precision and recompute.
        follow: set every step to the state of these snapshots first; else run freely.
        broken: applied to the objective, to show that the comparison notices.
        train_iters: length of the schedule.
        pair: source and target, of ``PAIRS``.
        constraint: what holds the masks to the target.
    """
    world = parallel.model_parallel_size * data_size
    per_rank = run_ranks(
        world,
        lambda rank: _rank(
            *(parallel, model or ModelConfig(), steps, follow, broken, train_iters, pair),
            constraint,
        ),
    )
    return [_whole([result[step] for result in per_rank]) for step in range(steps)]


def half_open_masks(pair: str) -> dict[str, Tensor]:
    """Whole log_alpha in the middle of pruning: gates sampled closed, open and between."""
    generator = torch.Generator().manual_seed(3)
    return {
        kind: (torch.randn(part.num_rows, part.num_units, generator=generator) * 2 + 1).clamp(-4, 4)
        for kind, part in whole_parts(*PAIRS[pair]).items()
    }


def _rank(
    parallel: ParallelConfig,
    model: ModelConfig,
    steps: int,
    follow: Sequence[Snapshot] | None,
    broken: Callable[[StructuredPruning], None] | None,
    train_iters: int,
    pair: str,
    constraint: Constraint,
) -> list[dict[str, Any]]:
    groups = ParallelGroups.create(parallel)
    source, target = PAIRS[pair]
    chunks = build_llama(source, groups, parallel, model, variant="local")
    set_weights(chunks, megatron_weights(source), groups.tensor_rank, groups.tensor_size)
    objective = StructuredPruning(
        chunks,
        groups,
        source=source,
        target=target,
        config=MaskConfig(
            constraint=constraint, sparsity_warmup_iters=4, mask_noise_streams=STREAMS
        ),
        seed=7,
        global_batch_size=BATCH,
        sequence_parallel=parallel.sequence_parallel,
    )
    fill(objective.masks.state_dict(), objective.binding.slice_gates(half_open_masks(pair)))
    if broken is not None:
        broken(objective)
    optimizer = build_optimizer(chunks, OPTIMIZER, bf16=False)
    train_step = TrainStep(
        chunks=chunks,
        objective=objective,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, OPTIMIZER, train_iters),
        peak_lr=OPTIMIZER.lr,
        groups=groups,
        guard=StepGuard(TrainConfig()),
    )
    leaf_grads: dict[Any, Tensor] = {}
    collect = objective.binding.whole_gradients

    def collecting() -> dict[int, dict[str, Tensor]]:
        gradients = collect()
        for stream, of_kind in gradients.items():
            leaf_grads.update({(stream, kind): grad.clone() for kind, grad in of_kind.items()})
        return gradients

    objective.binding.whole_gradients = collecting  # type: ignore[method-assign]
    results = []
    for step in range(steps):
        if follow is not None:
            set_weights(chunks, follow[step].weights, groups.tensor_rank, groups.tensor_size)
            fill(objective.masks.state_dict(), objective.binding.slice_gates(follow[step].masks))
            fill(objective.constraint.state_dict(), follow[step].multipliers)
        before = {
            "weights": {n: p.detach().clone() for n, p in named_parameters(chunks).items()},
            "masks": objective.binding.gather_log_alpha(),
            "multipliers": {n: t.clone() for n, t in objective.constraint.state_dict().items()},
        }
        leaf_grads.clear()
        batches = microbatches(step, data_rank=groups.data_rank, data_size=groups.data_size)
        losses = train_step.gradients(batches, step)
        means = [float(loss.sums.sum() / loss.counts.sum()) for loss in losses]
        results.append(
            before
            | {
                "tensor_rank": groups.tensor_rank,
                "data_rank": groups.data_rank,
                "parts": objective.masks.parts,
                "losses": means,
                "weight_grads": {
                    n: p.main_grad.clone() for n, p in named_parameters(chunks).items()
                },
                "leaf_grads": dict(leaf_grads),
                "mask_grads": {k: p.grad.clone() for k, p in objective.masks.log_alpha.items()},
                "multiplier_grads": {
                    n: p.grad.clone()
                    for n, p in objective.constraint.named_parameters().items()
                    if p.grad is not None
                },
                "penalty": 0.0 if objective._penalty is None else objective._penalty.item(),
                "expected_open": expected_gates(objective.binding.gather_log_alpha()),
            }
        )
        assert train_step.apply(losses, step).skipped is None
    return results


def _whole(ranks: Sequence[dict[str, Any]]) -> Snapshot:
    replica = [rank for rank in ranks if rank["data_rank"] == 0]
    order = [rank["tensor_rank"] for rank in replica]
    losses = [loss for rank in ranks if rank["tensor_rank"] == 0 for loss in rank["losses"]]
    leaves: dict[tuple[int, str], Tensor] = {}
    for stream, kind in {key for rank in ranks for key in rank["leaf_grads"]}:
        # a stream may lie in one replica only; where two share it, each has its part of the mean
        of_replica: dict[int, list] = {}
        for rank in ranks:
            if (stream, kind) in rank["leaf_grads"]:
                held = (rank["parts"][kind], rank["leaf_grads"][stream, kind])
                of_replica.setdefault(rank["data_rank"], []).append(held)
        num_replicas = len({rank["data_rank"] for rank in ranks})
        wholes = [_rows(kind, pieces) for pieces in of_replica.values()]
        leaves[stream, kind] = torch.stack(wholes).sum(dim=0) / num_replicas
    first = ranks[0]
    for rank in ranks:
        assert rank["penalty"] == first["penalty"], "the penalty differs between ranks"
    return Snapshot(
        weights=assemble([rank["weights"] for rank in replica], order),
        masks=first["masks"],
        multipliers=first["multipliers"],
        loss=sum(losses) / len(losses),
        penalty=first["penalty"],
        weight_grads=assemble([rank["weight_grads"] for rank in replica], order),
        leaf_grads=leaves,
        mask_grads={
            kind: _rows(kind, [(rank["parts"][kind], rank["mask_grads"][kind]) for rank in ranks])
            for kind in first["mask_grads"]
        },
        multiplier_grads=first["multiplier_grads"],
        expected_open=first["expected_open"],
    )


def _rows(kind: str, pieces: Sequence[tuple[Any, Tensor]]) -> Tensor:
    part = pieces[0][0]
    whole = torch.full((part.num_rows, part.num_units), float("nan"))
    for held, values in pieces:
        index = (torch.tensor(held.rows)[:, None], torch.tensor(list(held.units))[None, :])
        known = whole[index]
        # what several ranks hold must be the same for all
        same = known.isnan() | torch.isclose(known, values, rtol=1e-5, atol=1e-9)
        assert bool(same.all()), f"copies of {kind} gradients differ between ranks"
        whole[index] = values
    assert not whole.isnan().any(), kind
    return whole
