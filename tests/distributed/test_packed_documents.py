"""Documents packed into one sequence compute what they compute alone, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megashear.checkpoint.description import read_description
from megashear.config import EvaluateRun, ModelConfig, ParallelConfig
from megashear.data.batch import MicroBatch
from megashear.data.reference_loss import MEASURED
from megashear.masks.mask_set import MaskSet
from megashear.models.core import CausalAttention, document_mask
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.train import measure
from megashear.train.schedule import run_schedule
from megashear.train.stored_model import StoredModel
from tests import reference_llama
from tests.distributed.masked_model import (
    Pass,
    by_megatron_name,
    own_logits,
    run_pass,
    whole_logits,
)
from tests.distributed.test_masked_model import (
    BROKEN,
    OTHER_KERNELS,
    given,
    middle_of_pruning,
    sampled,
    worst,
)
from tests.distributed.test_resume import configuration, start
from tests.ranks import run_ranks
from tests.text_run import TextRun, scalars
from tests.tiny import (
    SEQUENCE,
    SOURCE,
    TARGET,
    layout,
    megatron_weights,
    microbatches,
    relative_error,
    set_weights,
)

SIZE = 2
"""Sequences in a microbatch."""
STREAMS = [0, 0, 1, 1]
RECOMPUTE = ModelConfig(recompute_granularity="full")


def lengths_of(sequence: int) -> list[int]:
    """Documents of a sequence: other borders in each, and a document of one token."""
    first = 3 + sequence
    return [first, 1, SEQUENCE - first - 1]


def packed(apart: bool = True) -> list[MicroBatch]:
    batches = microbatches(0, size=SIZE)
    if not apart:
        return batches
    return [
        replace(
            batch,
            documents=torch.stack(
                [
                    torch.arange(3).repeat_interleave(torch.tensor(lengths_of(place)))
                    for place in batch.positions.tolist()
                ]
            ),
        )
        for batch in batches
    ]


def alone(tokens: Tensor, places: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of a microbatch, [b, s, v], of which each document ran by itself from position 0."""
    return torch.stack(
        [
            torch.cat([forward(part[None])[0] for part in row.split(lengths_of(place))])
            for row, place in zip(tokens, places.tolist())
        ]
    )


def documents_alone(masks: MaskSet) -> Pass:
    """A pass of the independent formula over every document by itself."""
    weights = reference_llama.random_weights(SOURCE)
    for weight in weights.values():
        weight.requires_grad_()
    of_stream = sampled(masks)
    for gates in of_stream.values():
        for gate in gates.values():
            gate.retain_grad()
    batches = packed()

    def logits_of(batch: MicroBatch, stream: int) -> Tensor:
        return alone(
            batch.tokens,
            batch.positions,
            lambda part: reference_llama.forward(weights, SOURCE, part, of_stream[stream]),
        )

    logits = torch.cat([logits_of(*each) for each in zip(batches, STREAMS)])
    labels = torch.cat([batch.labels for batch in batches])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for log_alpha in masks.parameters():
        log_alpha.grad = None
    loss.backward()
    return Pass(
        logits=logits.detach(),
        loss=loss.item(),
        weight_grads=by_megatron_name({n: given(w.grad) for n, w in weights.items()}, SOURCE),
        gate_grads={
            (stream, kind): given(gate.grad)
            for stream, gates in of_stream.items()
            for kind, gate in gates.items()
        },
        mask_grads={kind: given(mask.grad) for kind, mask in masks.log_alpha.items()},
    )


def masked_pass(
    parallel: ParallelConfig, masks: MaskSet, *, apart: bool = True, **more: Any
) -> Pass:
    return run_pass(
        parallel,
        source=SOURCE,
        target=TARGET,
        weights=reference_llama.random_weights(SOURCE),
        log_alpha=masks.state_dict(),
        sample=sampled,
        batches=packed(apart),
        streams=STREAMS,
        **more,
    )


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        pytest.param(layout(), None, id="whole"),
        pytest.param(layout(tp=2), None, id="tp2"),
        pytest.param(layout(pp=2), RECOMPUTE, id="pp2-recompute"),
        pytest.param(layout(tp=2, pp=2, vpp=2, sp=True), RECOMPUTE, id="tp2-pp2-vpp2-sp-recompute"),
    ],
)
def test_masked_documents_packed_apart_equal_documents_alone(
    parallel: ParallelConfig, model: ModelConfig | None
) -> None:
    masks = middle_of_pruning(SOURCE, TARGET)
    found = masked_pass(parallel, masks, model=model)
    assert worst(found, documents_alone(masks)) < OTHER_KERNELS


def test_attention_across_borders_is_noticed() -> None:
    masks = middle_of_pruning(SOURCE, TARGET)
    wanted = documents_alone(masks).logits
    assert relative_error(masked_pass(layout(), masks, apart=False).logits, wanted) > BROKEN

    def broken() -> None:  # the mask is lost on its way through the layers
        forward = CausalAttention.forward

        def maskless(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any) -> Tensor:
            return forward(self, q, k, v, None, **rest)

        CausalAttention.forward = maskless  # type: ignore[method-assign, assignment]

    assert relative_error(masked_pass(layout(), masks, broken=broken).logits, wanted) > BROKEN


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        pytest.param(layout(tp=2, sp=True), None, id="tp2-sp"),
        pytest.param(layout(pp=2), RECOMPUTE, id="pp2-recompute"),
    ],
)
def test_plain_documents_packed_apart_equal_documents_alone(
    parallel: ParallelConfig, model: ModelConfig | None
) -> None:
    def body(rank: int) -> dict[str, Any]:
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, model or ModelConfig(), variant="local")
        set_weights(chunks, megatron_weights(SOURCE), groups.tensor_rank, groups.tensor_size)
        batches = packed()
        losses = run_schedule(chunks, batches, forward_only=False)  # recompute runs only so
        return {
            "tensor_rank": groups.tensor_rank,
            "logits": own_logits(chunks, batches),
            "losses": [float(loss.sums.sum()) for loss in losses],
        }

    ranks = run_ranks(parallel.model_parallel_size, body)
    weights = reference_llama.random_weights(SOURCE)
    wanted = torch.cat(
        [
            alone(b.tokens, b.positions, lambda p: reference_llama.forward(weights, SOURCE, p))
            for b in packed()
        ]
    )
    assert relative_error(whole_logits(ranks), wanted) < OTHER_KERNELS
    labels = torch.cat([batch.labels for batch in packed()])
    loss = F.cross_entropy(wanted.flatten(0, 1), labels.flatten(), reduction="sum")
    assert sum(ranks[-1]["losses"]) == pytest.approx(loss.item(), rel=OTHER_KERNELS)


def test_a_token_sees_its_own_document_and_nothing_behind_it() -> None:
    found = document_mask(torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]]))
    assert found.shape == (2, 1, 4, 4)
    assert found[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert found[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_a_run_and_the_evaluation_of_its_checkpoint_keep_documents_apart_alike(
    text: TextRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(text, "pretrain", layout(pp=2), tmp_path)
    flags = ModelConfig(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    config = replace(config, model=flags, train=replace(config.train, train_iters=3))
    start(config, 1)

    def losses(model: ModelConfig) -> dict[str, float]:
        evaluation = EvaluateRun(
            load=str(tmp_path / "saved"), data_path=str(text.data), model=model, micro_batch_size=4
        )
        (found,) = run_ranks(1, lambda rank: measure.evaluate(evaluation)[MEASURED])
        return found

    saved = read_description(tmp_path / "saved" / "iter_0000003")
    assert saved.details["run"]["model"]["reset_attention_mask"]
    of_run = saved.details["held_out_loss"]["loss"]
    assert losses(ModelConfig()) == pytest.approx(of_run, rel=OTHER_KERNELS)

    # and that differs from what documents compute that see each other
    monkeypatch.setattr(StoredModel, "as_trained", lambda found, model: model)
    crossing = losses(ModelConfig())
    assert max(abs(crossing[name] / of_run[name] - 1) for name in of_run) > 1e-3


@pytest.mark.sampled(1)
@pytest.mark.parametrize("flags", [ModelConfig(), ModelConfig(reset_attention_mask=True)])
def test_stages_in_the_middle_read_what_they_need(
    text: TextRun, tmp_path: Path, flags: ModelConfig
) -> None:
    losses = []
    for parallel in (layout(), layout(pp=4)):
        folder = tmp_path / f"pp{parallel.pipeline_model_parallel_size}"
        config = configuration(text, "prune", parallel, folder)
        config = replace(config, model=flags, train=replace(config.train, train_iters=4))
        start(config, 1)
        losses.append(scalars(folder / "events")["train/lm-loss"])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=OTHER_KERNELS)
