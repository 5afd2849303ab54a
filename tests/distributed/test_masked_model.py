"""Law 6 on Megatron: the masked model computes the independent formula and the golden numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor
from torch.nn import functional as F

from megashear.config import ParallelConfig
from megashear.data.batch import MicroBatch
from megashear.masks.gates import sample_gates
from megashear.masks.mask_set import MaskSet, exact_gates
from megashear.masks.targets import target_units, whole_parts
from megashear.models import fold, folded
from megashear.models.core import RMSNorm
from megashear.models.fold import unit_values
from megashear.shape import ModelShape
from tests import reference_llama
from tests.distributed.masked_model import Pass, Sampler, by_megatron_name, run_pass
from tests.tiny import BATCH, PAIRS, layout, microbatches, relative_error
from tests.unit.masks import golden

OTHER_KERNELS = 1e-5
"""Relative per tensor; float32 sums of other kernels, over at most 2 shards, in another order."""
BROKEN = 0.01
"""Relative; any of the breakages shown here is off by more."""

STREAMS = [0] * (BATCH // 2) + [1] * (BATCH // 2)
SOURCE, TARGET = PAIRS["8-groups-of-4"]
WHOLE, SPLIT = layout(), layout(tp=2, pp=2, sp=True)


@pytest.mark.parametrize(
    ("pair", "parallel"),
    [
        pytest.param(pair, parallel, id=f"{pair}-{name}")
        for pair, (source, _) in PAIRS.items()
        for name, parallel in (("whole", WHOLE), ("tp2-pp2-sp", SPLIT))
        if source.num_query_groups % parallel.tensor_model_parallel_size == 0
    ],
)
def test_masked_model_equals_the_plain_formula(pair: str, parallel: ParallelConfig) -> None:
    source, target = PAIRS[pair]
    masks = middle_of_pruning(source, target)
    found = sampled_pass(parallel, source, target, masks)
    assert worst(found, plain_pass(source, masks)) < OTHER_KERNELS


def test_gates_transposed_in_their_groups_are_noticed() -> None:
    def broken() -> None:
        def transposed(
            gates: dict[str, Tensor], shape: ModelShape, num_layers: int
        ) -> dict[str, Tensor]:
            values = unit_values(gates, shape, num_layers)
            heads = gates["head"].view(*gates["group"].shape, -1) * gates["group"][..., None]
            return values | {"head": heads.transpose(1, 2).flatten(1)}

        fold.unit_values = transposed  # type: ignore[assignment]

    masks = middle_of_pruning(SOURCE, TARGET)
    found = sampled_pass(layout(), SOURCE, TARGET, masks, broken=broken)
    assert relative_error(found.logits, plain_pass(SOURCE, masks).logits) > BROKEN


@pytest.mark.parametrize("kind", ["hidden", "head", "group", "intermediate", "layer"])
def test_a_kind_of_gate_left_out_is_noticed(kind: str) -> None:
    masks = middle_of_pruning(SOURCE, TARGET)
    found = sampled_pass(layout(), SOURCE, TARGET, masks)
    wanted = plain_pass(SOURCE, masks, without=kind)
    assert relative_error(found.logits, wanted.logits) > BROKEN


def test_a_norm_over_closed_dimensions_is_noticed() -> None:
    def broken() -> None:
        def forward(norm: RMSNorm, x: Tensor) -> Tensor:
            return F.rms_norm(x, (x.size(-1),), norm.weight, norm.eps)

        RMSNorm.forward = forward  # type: ignore[method-assign]

    masks = middle_of_pruning(SOURCE, TARGET)
    found = sampled_pass(layout(), SOURCE, TARGET, masks, broken=broken)
    assert relative_error(found.logits, plain_pass(SOURCE, masks).logits) > BROKEN


GOLDEN_LAYOUTS = pytest.mark.parametrize("parallel", [layout(), layout(pp=3)], ids=["whole", "pp3"])


@GOLDEN_LAYOUTS
def test_golden_logits_of_exact_gates(parallel: ParallelConfig) -> None:
    source, target = golden.shape("base"), golden.shape("target")
    gates = exact_gates(golden.log_alpha(), target_units(source, target))
    found = golden_pass(parallel, lambda masks: {0: own_rows(gates, masks)})
    assert relative_error(found.logits, golden.tensors()["eval.logits"]) < OTHER_KERNELS


@GOLDEN_LAYOUTS
def test_golden_training_pass(parallel: ParallelConfig) -> None:
    found = golden_pass(parallel, golden_gates)
    assert relative_error(found.logits, golden.tensors()["train.logits"]) < OTHER_KERNELS
    assert found.loss == pytest.approx(golden.facts()["train.ce"], rel=OTHER_KERNELS)
    wanted = by_megatron_name(golden_weights("train.grad.w."), golden.shape("base"))
    assert found.weight_grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert relative_error(found.weight_grads[name], grad) < OTHER_KERNELS, name
    for kind in golden.GOLDEN_KINDS:
        grad = golden.rows(golden.tensors()[f"train.grad.log_alpha.{kind}"])
        assert relative_error(found.mask_grads[kind], grad) < OTHER_KERNELS, kind


def test_an_embedding_left_unfolded_is_noticed() -> None:
    def broken() -> None:
        enter = folded._FoldedWeight.enter

        def enter_others(weight: folded._FoldedWeight, stream: folded._NoiseStream) -> None:
            if not isinstance(weight._module, VocabParallelEmbedding):
                enter(weight, stream)
            weight.check_done = lambda: None  # type: ignore[method-assign]

        folded._FoldedWeight.enter = enter_others  # type: ignore[method-assign]

    found = golden_pass(layout(), golden_gates, broken=broken)
    assert relative_error(found.logits, golden.tensors()["train.logits"]) > BROKEN
    grad = golden.rows(golden.tensors()["train.grad.log_alpha.hidden"])
    assert relative_error(found.mask_grads["hidden"], grad) > BROKEN


def middle_of_pruning(source: ModelShape, target: ModelShape) -> MaskSet:
    """Whole masks of which gates are sampled closed, open and between."""
    generator = torch.Generator().manual_seed(3)
    masks = MaskSet(whole_parts(source, target))
    for log_alpha in masks.state_dict().values():
        log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator) * 2 + 1)
    return masks


def sampled(masks: MaskSet, streams: Sequence[int] = STREAMS) -> dict[int, dict[str, Tensor]]:
    return {stream: masks.sample(seed=7, step=5, stream=stream) for stream in sorted({*streams})}


def sampled_pass(
    parallel: ParallelConfig,
    source: ModelShape,
    target: ModelShape,
    masks: MaskSet,
    *,
    streams: Sequence[int] = STREAMS,
    **more: Any,
) -> Pass:
    """One pass under sampled gates; ``more`` as `run_pass` takes it."""
    return run_pass(
        parallel,
        source=source,
        target=target,
        weights=reference_llama.random_weights(source),
        log_alpha=masks.state_dict(),
        sample=functools.partial(sampled, streams=streams),
        batches=microbatches(0, vocab=source.vocab_size),
        streams=streams,
        **more,
    )


def plain_pass(
    source: ModelShape,
    masks: MaskSet,
    *,
    without: str | None = None,
    streams: Sequence[int] = STREAMS,
) -> Pass:
    """The same pass by autograd through the plain formula."""
    weights = reference_llama.random_weights(source)
    for weight in weights.values():
        weight.requires_grad_()
    of_stream = sampled(masks, streams)
    for gates in of_stream.values():
        gates.pop(without or "", None)
        for gate in gates.values():
            gate.retain_grad()
    batches = microbatches(0, vocab=source.vocab_size)
    logits = torch.cat(
        [
            reference_llama.forward(weights, source, batch.tokens, of_stream[stream])
            for batch, stream in zip(batches, streams)
        ]
    )
    labels = torch.cat([batch.labels for batch in batches])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for log_alpha in masks.parameters():
        log_alpha.grad = None
    loss.backward()
    return Pass(
        logits=logits.detach(),
        loss=loss.item(),
        weight_grads=by_megatron_name({n: given(w.grad) for n, w in weights.items()}, source),
        gate_grads={
            (stream, kind): given(gate.grad)
            for stream, gates in of_stream.items()
            for kind, gate in gates.items()
        },
        mask_grads={
            kind: given(mask.grad) for kind, mask in masks.log_alpha.items() if kind != without
        },
    )


def given(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def worst(found: Pass, wanted: Pass) -> float:
    """The largest relative error of the loss and of any tensor."""
    errors = [
        relative_error(found.logits, wanted.logits),
        abs(found.loss - wanted.loss) / wanted.loss,
    ]
    for name in ("weight_grads", "gate_grads"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.keys() == theirs.keys()
        errors += [relative_error(ours[key], theirs[key]) for key in theirs]
    # log_alpha of all kinds together: what is left of a kind where most gates are saturated may be
    # a few numbers that nearly cancel
    assert found.mask_grads.keys() == wanted.mask_grads.keys()
    together = [
        torch.cat([of.mask_grads[kind].flatten() for kind in wanted.mask_grads])
        for of in (found, wanted)
    ]
    return max(*errors, relative_error(*together))


def golden_weights(prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in golden.tensors().items()
        if name.startswith(prefix)
    }


def own_rows(whole: dict[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
    """A rank's part of whole tensors by kind."""
    return {
        kind: whole[kind][list(part.rows)][:, list(part.units)]
        for kind, part in masks.parts.items()
    }


def golden_gates(masks: MaskSet) -> dict[int, dict[str, Tensor]]:
    """Gates from the golden file's noise, differentiable."""
    whole = {kind: golden.noise(kind) for kind in golden.GOLDEN_KINDS}
    noise = own_rows(whole, masks)
    return {0: {kind: sample_gates(mask, noise[kind]) for kind, mask in masks.log_alpha.items()}}


def golden_pass(
    parallel: ParallelConfig, sample: Sampler, *, broken: Callable[[], None] | None = None
) -> Pass:
    tokens = golden.tensors()["input_ids"]
    counted = torch.ones(tokens.shape)
    counted[:, -1] = 0.0  # nothing follows the last token of a row
    batch = MicroBatch(
        tokens=tokens,
        labels=tokens.roll(-1, dims=1),
        loss_mask=counted,
        domains=torch.zeros(len(tokens), dtype=torch.int64),
        positions=torch.arange(len(tokens)),
    )
    return run_pass(
        parallel,
        source=golden.shape("base"),
        target=golden.shape("target"),
        weights=golden_weights("w."),
        log_alpha=golden.log_alpha(),
        sample=sample,
        batches=[batch],
        streams=[0],
        broken=broken,
    )
