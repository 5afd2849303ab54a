"""Every set of mask kinds prunes: a step, evaluations, the cut and the plan, by an own formula.

A kind exists where the target is smaller, so a user chooses the set by the ``--target-*`` flags.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megashear.checkpoint.cut import cut
from megashear.config import MaskConfig, ModelConfig, ParallelConfig, PlanConfig
from megashear.masks.mask_set import MaskSet, exact_gates, expected_gates
from megashear.masks.targets import target_units, whole_parts
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.planning.jobs import PRUNING, make_plans
from megashear.shape import ModelShape
from megashear.train.pruning import EXACT, EXPECTED, NO_STEP, RELAXED, StructuredPruning
from tests import reference_llama
from tests.distributed.masked_model import by_megatron_name, whole_rows
from tests.live import fill
from tests.ranks import run_ranks
from tests.tiny import (
    BATCH,
    SEQUENCE,
    SOURCE,
    TARGET,
    assemble,
    layout,
    megatron_weights,
    microbatches,
    named_parameters,
    relative_error,
    set_weights,
)

OTHER_KERNELS = 1e-5
"""Relative per tensor; float32 sums of other kernels, over at most 2 shards, in another order."""
BROKEN = 1e-4
"""Relative; a kind left out moves every figure further. One layer's neurons move a loss least."""
SEED, STEP, STREAMS = 7, 5, 2

SOURCES = {
    "multi-head": replace(SOURCE, num_query_groups=SOURCE.num_attention_heads),
    "grouped": SOURCE,
}
ATTENTION = {
    # heads in groups that all stay, whole groups, and both
    "grouped": [
        {"num_attention_heads": 4},
        {"num_attention_heads": 4, "num_query_groups": 2},
        {"num_attention_heads": 2, "num_query_groups": 2},
    ],
    "multi-head": [{"num_attention_heads": 4, "num_query_groups": 4}],
}
"""What a target may lower of attention."""


def targets(family: str) -> Iterator[ModelShape]:
    """A target for every set of kinds that is not empty."""
    others = [
        {name: getattr(TARGET, name)} for name in ("hidden_size", "ffn_hidden_size", "num_layers")
    ]
    for chosen in itertools.product(*[({}, each) for each in others], ({}, *ATTENTION[family])):
        lowered = {name: size for each in chosen for name, size in each.items()}
        if lowered:
            yield replace(SOURCES[family], **lowered)


def kinds(source: ModelShape, target: ModelShape) -> tuple[str, ...]:
    return tuple(whole_parts(source, target))


SUBSETS = {
    (family, kinds(SOURCES[family], target)): (SOURCES[family], target)
    for family in SOURCES
    for target in targets(family)
}


def test_every_set_of_kinds_is_tried() -> None:
    for family, all_kinds in (
        ("multi-head", {"hidden", "head", "intermediate", "layer"}),
        ("grouped", {"hidden", "head", "group", "intermediate", "layer"}),
    ):
        tried = {frozenset(chosen) for of, chosen in SUBSETS if of == family}
        assert tried == {
            frozenset(chosen)
            for size in range(1, len(all_kinds) + 1)
            for chosen in itertools.combinations(all_kinds, size)
        }


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one set of kinds gave, whole."""

    losses: dict[str, Tensor]
    """Cross entropy of each sequence, nats, [B], in the step and in each mode of evaluation."""
    weight_grads: dict[str, Tensor]
    """By Megatron name."""
    mask_grads: dict[str, Tensor]
    """Of log_alpha by kind, whole rows."""

    def differences(self, other: Figures) -> dict[str, float]:
        """Relative, by figure."""
        assert self.losses.keys() == other.losses.keys()
        found = {
            f"loss of {of}": relative_error(self.losses[of], other.losses[of]) for of in self.losses
        }
        # together: what is left of one kind or one weight may be a few numbers that nearly cancel
        for name in ("weight_grads", "mask_grads"):
            ours, theirs = getattr(self, name), getattr(other, name)
            keys = ours.keys() & theirs.keys()
            if not keys:
                continue  # the only kind was left out
            together = [
                torch.cat([of[key].flatten() for key in sorted(keys)]) for of in (ours, theirs)
            ]
            found[name] = relative_error(*together)
        return found


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "parallel",
    [layout(), layout(tp=2), layout(pp=2)],
    ids=["whole", "tp2", "pp2"],
)
def test_every_set_of_kinds_is_the_formula(parallel: ParallelConfig) -> None:
    for which, found in measured(parallel).items():
        wanted = plain(*SUBSETS[which])
        assert found.weight_grads.keys() == wanted.weight_grads.keys()
        assert found.mask_grads.keys() == wanted.mask_grads.keys() == {*which[1]}
        for figure, difference in found.differences(wanted).items():
            assert difference < OTHER_KERNELS, (which, figure)


def test_a_kind_left_out_is_noticed_alone_and_among_all() -> None:
    for family, source in SOURCES.items():
        *_, all_kinds = sorted((chosen for of, chosen in SUBSETS if of == family), key=len)
        for chosen in (*((kind,) for kind in all_kinds), all_kinds):
            source, target = SUBSETS[family, chosen]
            for kind in chosen:
                found = plain(source, target, without=kind).differences(plain(source, target))
                assert min(found.values()) > BROKEN, (family, chosen, kind, found)


def test_every_set_of_kinds_is_cut_to_what_its_evaluation_measured() -> None:
    for which, (source, target) in SUBSETS.items():
        weights = reference_llama.random_weights(source)
        exact = exact_gates(half_open(source, target), target_units(source, target))
        of_cut = losses_of(dict(cut(weights, exact, source, target)), target, [None, None])
        masked = measured(layout())[which].losses[EXACT]
        assert relative_error(of_cut, masked) < OTHER_KERNELS, which
        # the twin: one unit of one kind moved
        for kind in exact:
            moved = dict(exact) | {kind: exact[kind].roll(1, dims=-1)}
            other = losses_of(dict(cut(weights, moved, source, target)), target, [None, None])
            assert relative_error(other, masked) > BROKEN, (which, kind)


def test_every_set_of_kinds_is_planned() -> None:
    for source, target in SUBSETS.values():
        config = PlanConfig(
            model="as given beside it",
            gpus=2,
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=1,
            micro_batch_size=1,
            seq_length=SEQUENCE,
        )
        planned = make_plans(config, source, target)[0]
        assert planned.job.name == PRUNING
        assert planned.job.masks == {*kinds(source, target)}
        assert planned.candidates


def half_open(source: ModelShape, target: ModelShape) -> dict[str, Tensor]:
    """Whole log_alpha in the middle of pruning: gates sampled closed, open and between."""
    generator = torch.Generator().manual_seed(3)
    return {
        kind: (torch.randn(part.num_rows, part.num_units, generator=generator) * 2 + 1).clamp(-4, 4)
        for kind, part in whole_parts(source, target).items()
    }


@functools.cache
def measured(parallel: ParallelConfig) -> dict[tuple[str, tuple[str, ...]], Figures]:
    """Every set, pruned at a layout by the objective that the command runs."""
    ranks = run_ranks(parallel.model_parallel_size, lambda rank: own_figures(parallel))
    return {which: whole_figures([rank[which] for rank in ranks]) for which in SUBSETS}


def own_figures(parallel: ParallelConfig) -> dict[tuple[str, tuple[str, ...]], dict[str, Any]]:
    groups = ParallelGroups.create(parallel)
    found = {}
    for family, source in SOURCES.items():
        chunks = build_llama(source, groups, parallel, ModelConfig(), variant="local")
        set_weights(chunks, megatron_weights(source), groups.tensor_rank, groups.tensor_size)
        for which, (_, target) in SUBSETS.items():
            if which[0] != family:
                continue
            objective = StructuredPruning(
                chunks,
                groups,
                source=source,
                target=target,
                config=MaskConfig(mask_noise_streams=STREAMS, eval_relaxed_masks=True),
                seed=SEED,
                global_batch_size=BATCH,
                sequence_parallel=parallel.sequence_parallel,
            )
            whole = half_open(source, target)
            fill(objective.masks.state_dict(), objective.binding.slice_gates(whole))
            found[which] = own_figures_of(objective) | {"tensor_rank": groups.tensor_rank}
    return found


def own_figures_of(objective: StructuredPruning) -> dict[str, Any]:
    batches = microbatches(0, size=BATCH // STREAMS)
    for chunk in objective.chunks:
        chunk.zero_grad_buffer()
    of_step = objective.forward_backward(batches, STEP)
    losses = {"step": torch.cat([part.sums.detach() for part in of_step])} if of_step else {}
    weight_grads = {
        name: parameter.main_grad.clone()  # type: ignore[attr-defined]
        for name, parameter in named_parameters(objective.chunks).items()
    }
    # the multipliers begin at 0, so what log_alpha has is the gradient of the loss alone
    mask_grads = {kind: mask.grad for kind, mask in objective.masks.log_alpha.items()}
    for mode in objective.modes():
        with objective.evaluating(mode) as measure:
            of_mode = measure(batches)
        if of_mode:
            losses[mode] = torch.cat([part.sums.detach() for part in of_mode])
    return {
        "parts": objective.masks.parts,
        "losses": losses,
        "weight_grads": weight_grads,
        "mask_grads": mask_grads,
    }


def whole_figures(ranks: list[dict[str, Any]]) -> Figures:
    return Figures(
        losses=ranks[-1]["losses"],
        weight_grads=assemble(
            [rank["weight_grads"] for rank in ranks], [rank["tensor_rank"] for rank in ranks]
        ),
        mask_grads={
            kind: whole_rows(kind, ranks, "mask_grads", kind) for kind in ranks[0]["mask_grads"]
        },
    )


@functools.cache
def plain(source: ModelShape, target: ModelShape, *, without: str | None = None) -> Figures:
    """The same by autograd through the plain formula, one kind left open if asked for."""
    weights = reference_llama.random_weights(source)
    masks = MaskSet(whole_parts(source, target))
    fill(masks.state_dict(), half_open(source, target))

    def chosen(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {kind: gate for kind, gate in gates.items() if kind != without}

    def sampled(step: int, stream: int) -> dict[str, Tensor]:
        return chosen(masks.sample(seed=SEED, step=step, stream=stream))

    whole = {kind: mask.detach() for kind, mask in masks.log_alpha.items()}
    of_mode = {
        EXPECTED: chosen(expected_gates(whole)),
        EXACT: chosen(exact_gates(whole, target_units(source, target))),
        RELAXED: sampled(NO_STEP, 0),
    }
    with torch.no_grad():
        losses = {
            mode: losses_of(weights, source, [gates] * STREAMS) for mode, gates in of_mode.items()
        }
    for weight in weights.values():
        weight.requires_grad_()
    of_step = losses_of(weights, source, [sampled(STEP, stream) for stream in range(STREAMS)])
    (of_step.sum() / (BATCH * SEQUENCE)).backward()
    grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return Figures(
        losses={"step": of_step.detach()} | losses,
        weight_grads=by_megatron_name(grads, source),
        mask_grads={
            kind: mask.grad for kind, mask in masks.log_alpha.items() if mask.grad is not None
        },
    )


def losses_of(
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    gates: Sequence[Mapping[str, Tensor] | None],
) -> Tensor:
    """Cross entropy of each sequence, nats, [B], under the gates of each of two microbatches."""
    found = []
    for batch, of_batch in zip(microbatches(0, size=BATCH // STREAMS), gates, strict=True):
        logits = reference_llama.forward(weights, shape, batch.tokens, of_batch)
        per_token = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        found.append(per_token.sum(dim=1))
    return torch.cat(found)
