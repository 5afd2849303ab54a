"""What megatron-core's schedules do with losses, microbatches and sends; docs/megatron_core.md."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megashear.config import ModelConfig, ParallelConfig
from megashear.models import llama
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.train.schedule import run_schedule
from tests.distributed.pruning_run import Snapshot, run
from tests.ranks import run_ranks
from tests.tiny import SOURCE, layout, microbatches, relative_error

REDUCTION_ORDER = 1e-5
"""Relative; float32 sums in another order. Corrupted gradients are off by half and more."""
INTERLEAVED = layout(pp=2, vpp=2)
OVERLAPPED = layout(pp=2, vpp=2, overlap_p2p_communication=True)


@functools.cache
def reference() -> list[Snapshot]:
    return run(layout(), steps=1)


def worst_weight_gradient(
    monkeypatch: pytest.MonkeyPatch,
    parallel: ParallelConfig,
    model: ModelConfig | None = None,
    **settings: bool,
) -> float:
    """Largest relative error of a weight's gradient, with pipeline settings changed."""
    whole, real = reference(), llama.pipeline_settings
    with monkeypatch.context() as patch:
        patch.setattr(llama, "pipeline_settings", lambda p: real(p) | settings)
        [step] = run(parallel, steps=1, follow=whole, model=model)
    return max(
        relative_error(step.weight_grads[name], grad)
        for name, grad in whole[0].weight_grads.items()
    )


def test_batched_sends_corrupt_the_interleaved_schedule_of_two_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # both neighbours are the same rank, and what it sent back is taken for what it sent ahead
    assert worst_weight_gradient(monkeypatch, INTERLEAVED) < REDUCTION_ORDER
    assert worst_weight_gradient(monkeypatch, INTERLEAVED, batch_p2p_comm=True) > 0.5


def test_batched_sends_are_right_in_the_plain_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    # where the corruption ends: set off everywhere all the same
    assert worst_weight_gradient(monkeypatch, layout(pp=2), batch_p2p_comm=True) < REDUCTION_ORDER


def test_freed_outputs_corrupt_sends_that_are_still_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert worst_weight_gradient(monkeypatch, OVERLAPPED) < REDUCTION_ORDER
    for _ in range(4):  # memory freed too early: what is read there is chance, seldom the old
        try:
            error = worst_weight_gradient(monkeypatch, OVERLAPPED, deallocate_pipeline_outputs=True)
        except AssertionError:  # not a number, or copies that differ
            return
        if not error < 0.01:
            return
    raise AssertionError("freed outputs did no harm: llama.pipeline_settings may allow them")


def test_freed_outputs_are_right_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    for freed in (False, True):
        assert (
            worst_weight_gradient(monkeypatch, INTERLEAVED, deallocate_pipeline_outputs=freed)
            < REDUCTION_ORDER
        )


def test_batched_and_overlapped_sends_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="both overlap_p2p_comm and batch_p2p_comm"):
        worst_weight_gradient(monkeypatch, OVERLAPPED, batch_p2p_comm=True)


@pytest.mark.parametrize("layers", [1, 2])
def test_block_recompute_computes_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    block = ModelConfig(
        recompute_granularity="full", recompute_method="block", recompute_num_layers=layers
    )
    assert worst_weight_gradient(monkeypatch, layout(pp=2), block) < REDUCTION_ORDER


def test_the_loss_is_divided_by_the_number_of_microbatches_in_place() -> None:
    # so a report must not be the loss itself
    def body(rank: int) -> list[dict[str, float]]:
        groups = ParallelGroups.create(layout())
        chunks = build_llama(SOURCE, groups, layout(), ModelConfig(), variant="local")

        def loss_of(reports: dict[str, Any], per_token: Tensor) -> tuple[Tensor, dict[str, Any]]:
            loss = per_token.mean()
            reports |= {"alias": loss.detach(), "copy": loss.item()}
            return loss, reports

        def forward_step(pending: Any, chunk: Any) -> tuple[Tensor, Any]:
            batch = next(pending)
            positions = torch.arange(batch.tokens.size(1))[None]
            per_token = chunk(batch.tokens, positions, None, labels=batch.labels)
            return per_token, partial(loss_of, {})

        batches = microbatches(0)[:4]
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches)],
            model=list(chunks),
            num_microbatches=4,
            seq_length=16,
            micro_batch_size=1,
            forward_only=False,
        )
        ours = run_schedule(chunks, batches, forward_only=True)
        return [
            {"alias": float(report["alias"]), "copy": report["copy"], "ours": float(loss.sums) / 16}
            for report, loss in zip(reports, ours)
        ]

    [reports] = run_ranks(1, body)
    assert len(reports) == 4
    for report in reports:
        assert report["alias"] == pytest.approx(report["copy"] / 4, rel=1e-6)
        assert report["ours"] == pytest.approx(report["copy"], rel=REDUCTION_ORDER)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_the_interleaved_schedule_wants_a_multiple_of_its_stages(number: int) -> None:
    def body(rank: int) -> str:
        groups = ParallelGroups.create(INTERLEAVED)
        chunks = build_llama(SOURCE, groups, INTERLEAVED, ModelConfig(), variant="local")
        batches = microbatches(0)[:number]
        try:
            run_schedule(chunks, batches, forward_only=False)
        except (RuntimeError, ValueError) as error:
            return str(error)
        return "ran"

    messages = run_ranks(2, body)
    assert messages[0] == messages[1]  # on all ranks alike, before the first send
    assert "micro-batches" in messages[0]
