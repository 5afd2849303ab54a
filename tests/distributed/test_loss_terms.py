"""A term joins any objective: its gradients are those of one process and an independent formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megashear.config import ModelConfig, ParallelConfig
from megashear.data.batch import MicroBatch
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.train.objectives import LanguageModelling
from megashear.train.points import mean_losses
from megashear.train.pruning import StructuredPruning
from megashear.train.terms import CrossEntropy, LossTerm
from tests import reference_llama
from tests.distributed.pruning_run import Snapshot, run
from tests.ranks import run_ranks
from tests.tiny import (
    BATCH,
    SOURCE,
    assemble,
    layout,
    megatron_weights,
    microbatches,
    named_parameters,
    relative_error,
    set_weights,
)

REDUCTION_ORDER = 1e-5
"""Relative; float32 sums over at most 2 shards and 4 layers in another order."""
WEIGHT = 0.05
"""Of the term: its gradient is then about as large as the cross entropy's."""


class SquaredLogPartition(LossTerm):
    """The square of log Z of the next token's softmax, the "z-loss" that keeps logits small.

    Source: Chowdhery et al. 2022 (arXiv:2204.02311), section 5.
    """

    needs_logits = True

    def __init__(self, *, weight: float = WEIGHT) -> None:
        super().__init__("log-partition", weight=weight)
        self.prepared: list[int] = []

    def prepare(self, batches: Any, step: int) -> None:
        self.prepared.append(len(batches))

    def per_token(self, batch: MicroBatch, cross_entropy: Tensor, logits: Tensor | None) -> Tensor:
        assert logits is not None
        # logits are small enough here to do without the largest
        own = logits.float().exp().sum(dim=-1)
        return self.over_ranks(own).log().square()

    def over_ranks(self, own: Tensor) -> Tensor:
        """Sum over tensor ranks; the gradient goes to each rank's part."""
        total: Tensor = reduce_from_tensor_model_parallel_region(own)
        return total


class OwnSliceAlone(SquaredLogPartition):
    """The twin: what a rank has of the vocabulary is taken for all of it."""

    def over_ranks(self, own: Tensor) -> Tensor:
        return own


class LateEntropy(LossTerm):
    """The cross entropy of the second half of a sequence: a term of losses, not of logits."""

    def per_token(self, batch: MicroBatch, cross_entropy: Tensor, logits: Tensor | None) -> Tensor:
        assert logits is None
        late = torch.arange(cross_entropy.size(1)) >= cross_entropy.size(1) // 2
        return cross_entropy * late


Terms = Callable[[], list[LossTerm]]


def with_z() -> list[LossTerm]:
    return [CrossEntropy(), SquaredLogPartition()]


def broken_z() -> list[LossTerm]:
    return [CrossEntropy(), OwnSliceAlone()]


def weightless_z() -> list[LossTerm]:
    return [CrossEntropy(), SquaredLogPartition(weight=0.0)]


def only_z() -> list[LossTerm]:
    return [SquaredLogPartition()]


def with_late() -> list[LossTerm]:
    return [CrossEntropy(), LateEntropy("late", weight=0.5)]


def plain() -> list[LossTerm]:
    return [CrossEntropy()]


def gradients(
    terms: Terms, parallel: ParallelConfig, data_size: int = 1, *, is_measured: bool = True
) -> tuple[dict[str, Tensor], float, dict[str, float]]:
    """Whole gradients of the weights of one step, the mean loss, and the means of the terms."""

    def body(rank: int) -> dict[str, Any]:
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, ModelConfig(), variant="local")
        set_weights(chunks, megatron_weights(SOURCE), groups.tensor_rank, groups.tensor_size)
        objective = LanguageModelling(chunks, terms=terms())
        for chunk in chunks:
            chunk.zero_grad_buffer()
        batches = masked(microbatches(0, data_rank=groups.data_rank, data_size=data_size))
        found = objective.forward_backward(batches, 0)
        for term in objective.terms:
            assert getattr(term, "prepared", [len(batches)]) == [len(batches)]  # on every rank
        loss, means = 0.0, dict[str, float]()
        if is_measured:
            loss, means = mean_losses(found, objective.further_terms, groups)
        return {
            "tensor_rank": groups.tensor_rank,
            "data_rank": groups.data_rank,
            "grads": {n: p.main_grad.clone() for n, p in named_parameters(chunks).items()},
            "loss": loss,
            "means": means,
        }

    ranks = run_ranks(parallel.model_parallel_size * data_size, body)
    replica = [rank for rank in ranks if rank["data_rank"] == 0]
    whole = assemble([r["grads"] for r in replica], [r["tensor_rank"] for r in replica])
    measured = [(rank["loss"], rank["means"]) for rank in ranks]
    assert all(each == measured[0] for each in measured)
    return whole, ranks[0]["loss"], ranks[0]["means"]


def masked(batches: list[MicroBatch]) -> list[MicroBatch]:
    """Leave a third of the positions out, as padding is, another number in each sequence."""
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            batch.loss_mask[row, : 3 + position % 4] = 0.0
    return batches


@functools.cache
def independent(z: float, late: float, cross_entropy: float) -> dict[str, Tensor]:
    """Gradients by Hugging Face name, by plain autograd through another LLaMA."""
    weights = {
        name: tensor.clone().requires_grad_()
        for name, tensor in reference_llama.random_weights(SOURCE).items()
    }
    losses = []
    for batch in masked(microbatches(0)):
        logits = reference_llama.forward(weights, SOURCE, batch.tokens)
        entropy = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.labels, reduction="none"
        )
        half = entropy.size(1) // 2
        later = torch.cat([torch.zeros_like(entropy[:, :half]), entropy[:, half:]], dim=1)
        each = cross_entropy * entropy + z * logits.logsumexp(-1).square() + late * later
        losses.append((each * batch.loss_mask).sum() / batch.loss_mask.sum())
    assert len(losses) == BATCH
    torch.stack(losses).mean().backward()
    return {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}


LAYOUTS = [
    pytest.param(layout(), 1, id="one"),
    pytest.param(layout(tp=2), 1, id="tp2"),
    pytest.param(layout(tp=2, pp=2, sp=True), 1, id="tp2-pp2-sp"),
    pytest.param(layout(pp=2, vpp=2), 1, id="pp2-vpp2"),
    pytest.param(layout(), 2, id="dp2"),
]
TERMS = {
    "cross entropy and log partition": (with_z, (WEIGHT, 0.0, 1.0)),
    "log partition alone": (only_z, (WEIGHT, 0.0, 0.0)),
    "a term of losses": (with_late, (0.0, 0.5, 1.0)),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("parallel", "replicas"), LAYOUTS)
def test_gradients_with_terms_are_those_of_an_independent_formula(
    terms: str, parallel: ParallelConfig, replicas: int
) -> None:
    make, factors = TERMS[terms]
    found, _, means = gradients(make, parallel, replicas)
    assert all(value > 0.0 for value in means.values())
    wanted = independent(*factors)
    # fused weights are compared by their parts in other tests; these are of every stage
    for name, other in {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.layers.0.self_attention.linear_proj.weight": (
            "model.layers.0.self_attn.o_proj.weight"
        ),
        "decoder.layers.3.mlp.linear_fc2.weight": "model.layers.3.mlp.down_proj.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }.items():
        assert relative_error(found[name], wanted[other]) < REDUCTION_ORDER, name


def test_a_term_that_forgets_other_ranks_slices_is_noticed() -> None:
    with pytest.raises(AssertionError, match="different values of the term log-partition"):
        gradients(broken_z, layout(tp=2, pp=2))
    found, _, _ = gradients(broken_z, layout(tp=2), is_measured=False)
    error = relative_error(
        found["output_layer.weight"], independent(WEIGHT, 0.0, 1.0)["lm_head.weight"]
    )
    assert error > 0.01


def test_a_term_without_weight_changes_no_gradient_and_is_measured() -> None:
    found, loss, means = gradients(weightless_z, layout(tp=2))
    wanted, alone, nothing = gradients(plain, layout(tp=2))
    assert nothing == {}
    assert means.keys() == {"log-partition"}
    assert loss == pytest.approx(alone, rel=REDUCTION_ORDER)
    for name, grad in wanted.items():
        assert relative_error(found[name], grad) < REDUCTION_ORDER, name


def joined(objective: StructuredPruning) -> None:
    objective.terms = with_z()


def unjoined(objective: StructuredPruning) -> None:
    objective.terms = broken_z()


@functools.cache
def pruned(parallel: ParallelConfig, broken: Callable[[StructuredPruning], None]) -> list[Snapshot]:
    return run(parallel, steps=1, broken=broken)


@pytest.mark.parametrize("parallel", [layout(tp=2), layout(tp=2, pp=2, sp=True)])
def test_a_term_joins_pruning_at_every_layout(parallel: ParallelConfig) -> None:
    (one,), (split,) = pruned(layout(), joined), pruned(parallel, joined)
    for of in ("weight_grads", "mask_grads"):
        for name, grad in getattr(one, of).items():
            error = relative_error(getattr(split, of)[name], grad)
            assert error < REDUCTION_ORDER, name


def test_a_broken_term_of_pruning_is_noticed() -> None:
    (one,), (split,) = pruned(layout(), joined), pruned(layout(tp=2), unjoined)
    assert relative_error(split.mask_grads["hidden"], one.mask_grads["hidden"]) > 0.01
