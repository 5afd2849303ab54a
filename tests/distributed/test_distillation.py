"""Distillation at every layout: gradients are those of one process and an independent formula."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megashear.config import ModelConfig, ParallelConfig
from megashear.data.batch import MicroBatch
from megashear.masks.mask_set import MaskSet
from megashear.masks.targets import whole_parts
from megashear.models.llama import build_chunks, build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.distillation import Distillation, Teacher
from megashear.train.objectives import LanguageModelling
from megashear.train.points import mean_losses
from megashear.train.pruning import StructuredPruning
from megashear.train.terms import CrossEntropy, LossTerm
from tests import reference_llama
from tests.distributed.pruning_run import STREAMS, Snapshot, half_open_masks, run
from tests.distributed.test_loss_terms import masked
from tests.live import fill
from tests.ranks import run_ranks
from tests.tiny import (
    BATCH,
    PAIRS,
    SEQUENCE,
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
BROKEN = 0.01
"""Relative; what one broken thing must change at least."""
SEED = 9
"""Of the teacher's weights."""
TEACHER = ModelShape(
    num_layers=8,
    hidden_size=48,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=80,
    vocab_size=SOURCE.vocab_size,
    max_position_embeddings=32,
)
"""Larger than the student, and with other extents in every dimension."""


@dataclass(frozen=True)
class Loss:
    """Weights of the terms, temperature, and what else differs between cases."""

    entropy: float = 0.0
    divergence: float = 1.0
    temperature: float = 1.0
    vocab: int = SOURCE.vocab_size
    tied: bool = False
    packed: bool = False

    @property
    def student(self) -> ModelShape:
        return replace(SOURCE, vocab_size=self.vocab)

    @property
    def teacher(self) -> ModelShape:
        return replace(TEACHER, vocab_size=self.vocab, tied_embeddings=self.tied)

    def batches(self, **share: int) -> list[MicroBatch]:
        found = masked(microbatches(0, vocab=self.vocab, size=2, **share))
        if not self.packed:
            return found
        borders = torch.tensor([5, 1, SEQUENCE - 6])
        documents = torch.arange(3).repeat_interleave(borders).expand(2, -1)
        return [replace(batch, documents=documents) for batch in found]


def make_term(
    groups: ParallelGroups,
    parallel: ParallelConfig,
    loss: Loss,
    *,
    shape: ModelShape | None = None,
    seed: int = SEED,
) -> Distillation:
    shape = shape or loss.teacher
    chunks = build_chunks(shape, groups, parallel, ModelConfig(), variant="local")
    set_weights(chunks, megatron_weights(shape, seed), groups.tensor_rank, groups.tensor_size)
    return Distillation(
        Teacher(chunks, shape),
        groups.tensor,
        weight=loss.divergence,
        temperature=loss.temperature,
    )


def terms_of(loss: Loss, divergence: LossTerm) -> list[LossTerm]:
    own: list[LossTerm] = [CrossEntropy(weight=loss.entropy)] if loss.entropy else []
    return [*own, divergence]


Break = Callable[[Distillation], None]


def gradients(
    loss: Loss,
    parallel: ParallelConfig | None = None,
    data_size: int = 1,
    *,
    model: ModelConfig | None = None,
    broken: Break | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Whole gradients of the student's weights of one step, and the means of the terms."""
    parallel = parallel or layout()

    def body(rank: int) -> dict[str, Any]:
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(
            loss.student, groups, parallel, model or ModelConfig(), variant="local"
        )
        whole = megatron_weights(loss.student)
        set_weights(chunks, whole, groups.tensor_rank, groups.tensor_size)
        term = make_term(groups, parallel, loss)
        if broken is not None:
            broken(term)
        objective = LanguageModelling(chunks, terms=terms_of(loss, term))
        for chunk in chunks:
            chunk.zero_grad_buffer()
        batches = loss.batches(data_rank=groups.data_rank, data_size=data_size)
        found = objective.forward_backward(batches, 0)
        _, means = mean_losses(found, objective.further_terms, groups)
        grads = {name: p.main_grad for name, p in named_parameters(chunks).items()}
        return {
            "tensor_rank": groups.tensor_rank,
            "data_rank": groups.data_rank,
            # padding of the vocabulary is the layout's
            "grads": {name: grad.clone() for name, grad in grads.items()},
            "means": means,
        }

    ranks = run_ranks(parallel.model_parallel_size * data_size, body)
    replica = [rank for rank in ranks if rank["data_rank"] == 0]
    assert all(rank["means"] == ranks[0]["means"] for rank in ranks)
    whole = assemble([r["grads"] for r in replica], [r["tensor_rank"] for r in replica])
    return whole, ranks[0]["means"]


def forward(weights: dict[str, Tensor], shape: ModelShape, batch: MicroBatch) -> Tensor:
    """Logits by the other LLaMA, of documents alone where some are packed."""
    if batch.documents is None:
        return reference_llama.forward(weights, shape, batch.tokens)
    sizes = batch.documents[0].bincount().tolist()
    parts = batch.tokens.split(sizes, dim=1)
    return torch.cat([reference_llama.forward(weights, shape, part) for part in parts], dim=1)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton's term of each token, [b, s], written from the definition."""
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


@functools.cache
def independent(loss: Loss) -> tuple[dict[str, Tensor], float]:
    """Gradients by Hugging Face name, and the mean of the divergence, by plain autograd."""
    shape = loss.student
    weights = {
        name: tensor.clone().requires_grad_()
        for name, tensor in reference_llama.random_weights(shape).items()
    }
    fixed = reference_llama.random_weights(loss.teacher, SEED)
    losses, sums, counts = [], 0.0, 0.0
    for batch in loss.batches():
        logits = forward(weights, shape, batch)
        apart = divergence(logits, forward(fixed, loss.teacher, batch), loss.temperature)
        entropy = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        each = loss.entropy * entropy + loss.divergence * apart
        losses.append((each * batch.loss_mask).sum() / batch.loss_mask.sum())
        sums += float((apart.detach() * batch.loss_mask).sum())
        counts += float(batch.loss_mask.sum())
    assert len(losses) == BATCH // 2
    torch.stack(losses).mean().backward()
    grads = {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}
    return grads, sums / counts


NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.layers.0.self_attention.linear_proj.weight": "model.layers.0.self_attn.o_proj.weight",
    "decoder.layers.3.mlp.linear_fc2.weight": "model.layers.3.mlp.down_proj.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Weights of every stage; fused ones are compared by their parts in other tests."""


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: relative_error(found[name][: len(wanted[other])], wanted[other])
        for name, other in NAMES.items()
    }


LAYOUTS = [
    pytest.param(layout(), 1, id="one"),
    pytest.param(layout(tp=2), 1, id="tp2"),
    pytest.param(layout(tp=2, pp=2, sp=True), 1, id="tp2-pp2-sp"),
    pytest.param(layout(pp=2, vpp=2), 1, id="pp2-vpp2"),
    pytest.param(layout(), 2, id="dp2"),
]
LOSSES = {
    "alone": Loss(),
    "beside cross entropy": Loss(entropy=0.3, divergence=0.7),
    "temperature": Loss(temperature=2.5),
    "padded vocabulary": Loss(vocab=57),
    "tied teacher": Loss(tied=True),
    "packed documents": Loss(packed=True),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("parallel", "replicas"), LAYOUTS)
def test_gradients_are_those_of_an_independent_formula(
    loss: str, parallel: ParallelConfig, replicas: int
) -> None:
    found, means = gradients(LOSSES[loss], parallel, replicas)
    wanted, mean = independent(LOSSES[loss])
    assert means == {"distillation": pytest.approx(mean, rel=REDUCTION_ORDER)}
    for name, error in errors(found, wanted).items():
        assert error < REDUCTION_ORDER, name


def test_recompute_changes_nothing() -> None:
    model = ModelConfig(recompute_granularity="full", recompute_num_layers=2)
    found, _ = gradients(Loss(), layout(tp=2, sp=True), model=model)
    for name, error in errors(found, independent(Loss())[0]).items():
        assert error < REDUCTION_ORDER, name


def late_teacher(term: Distillation) -> None:
    """The teacher's text is one token behind: it predicts the student's last token."""
    whole = term.teacher.hidden_states
    term.teacher.hidden_states = lambda batches: [  # type: ignore[method-assign]
        hidden.roll(1, dims=0) for hidden in whole(batches)
    ]


def other_microbatch(term: Distillation) -> None:
    whole = term.teacher.hidden_states
    term.teacher.hidden_states = lambda batches: whole(batches)[::-1]  # type: ignore[method-assign]


def square_left_out(term: Distillation) -> None:
    whole = term.per_token
    term.per_token = lambda *of: whole(*of) / term.temperature**2  # type: ignore[method-assign]


def square_taken_twice(term: Distillation) -> None:
    whole = term.per_token
    term.per_token = lambda *of: whole(*of) * term.temperature**2  # type: ignore[method-assign]


def half_of_the_sequence(term: Distillation) -> None:
    """Under sequence parallelism, every rank takes the first rank's part."""
    whole = term.teacher.logits
    term.teacher.logits = (
        lambda hidden: (  # type: ignore[method-assign]
            whole(hidden)[:, : SEQUENCE // 2].repeat(1, 2, 1)
        )
    )


@pytest.mark.parametrize(
    ("broken", "parallel"),
    [
        (late_teacher, layout()),
        (other_microbatch, layout()),
        (square_left_out, layout()),
        (square_taken_twice, layout()),
        (half_of_the_sequence, layout(tp=2, sp=True)),
    ],
)
def test_one_broken_thing_is_noticed(broken: Break, parallel: ParallelConfig) -> None:
    loss = LOSSES["temperature"]
    found, _ = gradients(loss, parallel, broken=broken)
    assert max(errors(found, independent(loss)[0]).values()) > BROKEN


def test_a_teacher_never_learns_and_has_no_gradient() -> None:
    def body(rank: int) -> bool:
        groups = ParallelGroups.create(layout())
        term = make_term(groups, layout(), Loss())
        return any(p.requires_grad for chunk in term.teacher.chunks for p in chunk.parameters())

    assert run_ranks(1, body) == [False]


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (5, 0.75), (10, 0.5), (12, 0.5)])
def test_the_weight_falls_on_a_line(step: int, weight: float) -> None:
    term = Distillation(None, None, weight=1.0, last_weight=0.5, num_steps=11)  # type: ignore[arg-type]
    assert term.weight_at(step) == pytest.approx(weight)


# while masks are learned: the source, without gates, is the teacher

PAIR = "8-groups-of-4"


def joined(parallel: ParallelConfig, objective: StructuredPruning) -> None:
    source = PAIRS[PAIR][0]
    term = make_term(objective.binding.groups, parallel, Loss(), shape=source, seed=0)
    objective.terms = [CrossEntropy(weight=0.5), term]


@functools.cache
def pruned(parallel: ParallelConfig, data_size: int = 1) -> Snapshot:
    (snapshot,) = run(
        parallel, data_size=data_size, steps=1, broken=functools.partial(joined, parallel)
    )
    return snapshot


@functools.cache
def independently_pruned(*, gated_teacher: bool = False) -> dict[tuple[int, str], Tensor]:
    """Gradients of the gates by stream and kind, by plain autograd."""
    source, target = PAIRS[PAIR]
    weights = reference_llama.random_weights(source)
    masks = MaskSet(whole_parts(source, target))
    fill(masks.state_dict(), half_open_masks(PAIR))
    gates = {
        stream: {
            kind: gate.detach().requires_grad_()
            for kind, gate in masks.sample(seed=7, step=0, stream=stream).items()
        }
        for stream in range(STREAMS)
    }
    losses = []
    for number, batch in enumerate(microbatches(0)):
        own = gates[number * STREAMS // BATCH]
        logits = reference_llama.forward(weights, source, batch.tokens, own)
        with torch.no_grad():
            teacher = reference_llama.forward(
                weights, source, batch.tokens, own if gated_teacher else None
            )
        entropy = F.cross_entropy(logits.transpose(1, 2), batch.labels)
        losses.append(0.5 * entropy + divergence(logits, teacher, 1.0).mean())
    torch.stack(losses).mean().backward()
    return {
        (stream, kind): gate.grad
        for stream, of_kind in gates.items()
        for kind, gate in of_kind.items()
        if gate.grad is not None
    }


def same_gates(found: Snapshot, wanted: dict[tuple[int, str], Tensor]) -> Sequence[float]:
    assert found.leaf_grads.keys() == wanted.keys()
    return [
        relative_error(found.leaf_grads[key].flatten(), grad.flatten())
        for key, grad in wanted.items()
    ]


@pytest.mark.parametrize(
    ("parallel", "replicas"),
    [
        pytest.param(layout(), 1, id="one"),
        pytest.param(layout(tp=2, pp=2, sp=True), 1, id="tp2-pp2-sp"),
        pytest.param(layout(tp=2), 2, id="tp2-dp2"),
    ],
)
def test_gates_learn_from_the_source_without_gates(parallel: ParallelConfig, replicas: int) -> None:
    found = pruned(parallel, replicas)
    assert max(same_gates(found, independently_pruned())) < REDUCTION_ORDER
    one = pruned(layout())
    for name, grad in one.weight_grads.items():
        assert relative_error(found.weight_grads[name], grad) < REDUCTION_ORDER, name


def test_a_teacher_with_gates_is_noticed() -> None:
    found = pruned(layout())
    assert max(same_gates(found, independently_pruned(gated_teacher=True))) > BROKEN
