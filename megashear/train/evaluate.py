"""Held-out loss per domain, token-weighted and equal on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megashear.data.batch import MicroBatch
from megashear.data.held_out import HeldOutSet
from megashear.monitor.console import progress
from megashear.parallel import device
from megashear.parallel.agree import ordered_sum
from megashear.parallel.groups import ParallelGroups
from megashear.train.objectives import LanguageModelling

_SLAB = 16
"""Microbatches handed to the schedule at a time, so that memory does not grow with the set."""


@dataclass(frozen=True, kw_only=True)
class DomainLosses:
    """What an evaluation found."""

    losses: dict[str, float]
    """Cross entropy per token by domain, nats."""
    tokens: dict[str, int]
    """Tokens evaluated by domain."""

    @property
    def mean(self) -> float:
        """Mean over domains, each counted alike."""
        return sum(self.losses.values()) / len(self.losses)


def evaluate_domains(
    objective: LanguageModelling,
    mode: str,
    names: Sequence[str],
    held_out: Sequence[HeldOutSet],
    chosen: Sequence[Sequence[int]],
    groups: ParallelGroups,
    *,
    micro_batch_size: int,
    step: int | None = None,
) -> DomainLosses:
    """Evaluate the chosen sequences of every domain. Collective over the world.

    Args:
        objective: whose model is evaluated.
        mode: of its evaluation modes.
        names: of the domains.
        held_out: sets of the domains, in the same order.
        chosen: indices of sequences of each set, equal on every rank.
        groups: where this rank stands.
        micro_batch_size: sequences per forward pass.
        step: steps done, shown beside the progress bar.
    """
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=device.device())
    per_pass = micro_batch_size * groups.data_size
    total = sum(-(-len(indices) // per_pass) for indices in chosen)  # microbatches
    what = f"evaluation ({mode})" if step is None else f"evaluation at step {step} ({mode})"
    objective.begin_evaluation(mode)
    with progress(total, rank=groups.rank, desc=what, unit="batch", leave=False) as bar:
        for slab in _slabs(held_out, chosen, groups, micro_batch_size):
            for found in objective.evaluate(mode, slab):
                domains = found.domains.to(sums.device)
                sums[0].index_add_(0, domains, found.sums.double())
                sums[1].index_add_(0, domains, found.counts.double())
            bar.update(min(len(slab), total - bar.n))
    objective.end_evaluation()
    # only last stages measured; tensor ranks of a stage measured the same
    (sums,) = ordered_sum([sums], groups.pipeline)
    (sums,) = ordered_sum([sums], groups.data)
    losses = (sums[0] / sums[1]).tolist()
    return DomainLosses(
        losses=dict(zip(names, losses)),
        tokens={name: int(count) for name, count in zip(names, sums[1].tolist())},
    )


def _slabs(
    held_out: Sequence[HeldOutSet],
    chosen: Sequence[Sequence[int]],
    groups: ParallelGroups,
    micro_batch_size: int,
) -> Iterator[list[MicroBatch]]:
    batches = itertools.chain.from_iterable(
        domain.batches(indices, micro_batch_size, groups.data_rank, groups.data_size)
        for domain, indices in zip(held_out, chosen)
    )
    slab_size = -(-_SLAB // groups.pipeline_size) * groups.pipeline_size
    while slab := list(itertools.islice(batches, slab_size)):
        if groups.virtual_size > 1:
            # the interleaved schedule takes a multiple of the stages only
            while len(slab) % groups.pipeline_size:
                slab.append(replace(slab[-1], loss_mask=torch.zeros_like(slab[-1].loss_mask)))
        yield slab
