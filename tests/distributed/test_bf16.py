"""A bfloat16 model prunes: masks stay float32, and what layouts share stays equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megashear.config import MaskConfig, ModelConfig, ParallelConfig, TrainConfig
from megashear.models.llama import build_llama, unwrap
from megashear.parallel.agree import assert_replicated
from megashear.parallel.groups import ParallelGroups
from megashear.train.guard import StepGuard
from megashear.train.optim import build_optimizer, build_schedule
from megashear.train.pruning import StructuredPruning
from megashear.train.step import TrainStep
from tests.distributed.pruning_run import OPTIMIZER, half_open_masks
from tests.live import fill
from tests.ranks import run_ranks
from tests.tiny import (
    BATCH,
    PAIRS,
    layout,
    megatron_weights,
    microbatches,
    set_weights,
)

BFLOAT16 = 0.005
"""Relative, on the loss: 8 bits of mantissa through 4 layers; measured 2e-4 to 8e-4."""
STEPPED = 0.05
"""The same after a step of the masks, of which Adam at rate 1.0 moves each gate by its gradient's
sign: a nearly cancelled one takes the other (1 of 588, measured), and the loss moves by 0.016."""
STEPS = 2
PAIR = "8-groups-of-4"
SOURCE, TARGET = PAIRS[PAIR]


def prune(parallel: ParallelConfig, model: ModelConfig) -> list[float]:
    """Losses of a few steps, equal on all ranks but for their absence before the last stage."""

    def body(rank: int) -> list[float]:
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, model, variant="local")
        set_weights(chunks, megatron_weights(SOURCE), groups.tensor_rank, groups.tensor_size)
        objective = StructuredPruning(
            chunks,
            groups,
            source=SOURCE,
            target=TARGET,
            config=MaskConfig(sparsity_warmup_iters=4, mask_noise_streams=2),
            seed=7,
            global_batch_size=BATCH,
            sequence_parallel=parallel.sequence_parallel,
        )
        fill(objective.masks.state_dict(), objective.binding.slice_gates(half_open_masks(PAIR)))
        optimizer = build_optimizer(chunks, OPTIMIZER, bf16=model.bf16)
        schedule = build_schedule(optimizer, OPTIMIZER, 40)
        schedule.step(1)  # past the rate of 0
        train_step = TrainStep(
            chunks=chunks,
            objective=objective,
            optimizer=optimizer,
            schedule=schedule,
            peak_lr=OPTIMIZER.lr,
            groups=groups,
            guard=StepGuard(TrainConfig()),
        )
        losses = [step(train_step, objective, number) for number in range(STEPS)]
        check_formats(chunks, objective, model)
        assert_replicated(objective.replicated(), "masks")
        return losses

    return [loss for losses in run_ranks(parallel.model_parallel_size, body) for loss in losses]


def step(train_step: TrainStep, objective: StructuredPruning, number: int) -> float:
    before = [log_alpha.detach().clone() for log_alpha in objective.masks.parameters()]
    losses = train_step.gradients(microbatches(number), number)
    for leaf in objective.masks.parameters():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    taken = train_step.apply(losses, number)
    assert taken.skipped is None
    assert all(0.0 < norm < float("inf") for norm in taken.norms.values())
    for old, log_alpha in zip(before, objective.masks.parameters()):
        assert not torch.equal(old, log_alpha)
        assert log_alpha.isfinite().all()
    counts = sum(float(loss.counts.sum()) for loss in losses)
    return sum(float(loss.sums.sum()) for loss in losses) / counts if losses else float("nan")


def check_formats(chunks: Any, objective: StructuredPruning, model: ModelConfig) -> None:
    wanted = torch.bfloat16 if model.bf16 else torch.float32
    for chunk in chunks:
        for name, weight in unwrap(chunk).named_parameters():
            assert weight.dtype == wanted, name
            assert weight.main_grad.dtype == torch.float32, name
            assert weight.isfinite().all(), name
    kept = [*objective.masks.parameters(), *objective.optimizer.state_tensors().values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        pytest.param(layout(tp=2), {}, id="tp2"),
        pytest.param(layout(tp=2, sp=True), {}, id="tp2-sp"),
        pytest.param(
            layout(pp=2),
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 1,
            },
            id="pp2-recompute-block",
        ),
    ],
)
def test_a_bfloat16_model_prunes_with_float32_masks(
    parallel: ParallelConfig, recompute: dict[str, Any]
) -> None:
    whole = prune(layout(), ModelConfig())
    found = [loss for loss in prune(parallel, ModelConfig(bf16=True, **recompute)) if loss == loss]
    copies = parallel.tensor_model_parallel_size  # tensor ranks see the same loss
    assert found[::STEPS] == pytest.approx(whole[::STEPS] * copies, rel=BFLOAT16)
    assert found == pytest.approx(whole * copies, rel=STEPPED)
    assert found != pytest.approx(whole * copies, rel=1e-7)  # it was not float32 in disguise
    assert found[:STEPS] * copies == found
