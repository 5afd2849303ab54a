"""What megatron-core's optimizers and their schedule do; docs/megatron_core.md says why we care."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from megashear.config import ModelConfig, OptimizerConfig, ParallelConfig
from megashear.models.llama import build_llama, unwrap
from megashear.parallel.groups import ParallelGroups
from megashear.train.optim import (
    build_optimizer,
    build_schedule,
    ready_gradients,
    step_with_norm,
)
from tests.ranks import run_ranks
from tests.tiny import SOURCE, layout

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def chunks_of(parallel: ParallelConfig | None = None, *, bf16: bool = False) -> list[Any]:
    parallel = parallel or layout()
    groups = ParallelGroups.create(parallel)
    return list(build_llama(SOURCE, groups, parallel, ModelConfig(bf16=bf16), variant="local"))


def distributed_optimizers() -> tuple[list[Any], Callable[[], Any]]:
    """Chunks whose gradients are sharded, and a maker of DistributedOptimizers over them."""
    chunks = chunks_of(layout(use_distributed_optimizer=True))
    config = MegatronOptimizerConfig(lr=1e-2, use_distributed_optimizer=True)

    def make() -> Any:
        return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)

    return chunks, make


def step(chunks: list[Any], optimizer: Any) -> None:
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(0.1)
    optimizer.step()


def step_counts(optimizer: Any) -> tuple[int, set[float]]:
    """How many counters there are, and what they say."""
    counters = [state["step"] for state in optimizer.optimizer.state.values()]
    return len({counter.data_ptr() for counter in counters}), {float(c) for c in counters}


def test_a_loaded_distributed_optimizer_counts_steps_in_one_shared_tensor() -> None:
    def body(rank: int) -> list[tuple[int, set[float]]]:
        chunks, make = distributed_optimizers()
        first, second = make(), make()
        step(chunks, first)
        counts = [step_counts(first.chained_optimizers[0])]
        second.chained_optimizers[0].load_state_dict(copy.deepcopy(first.state_dict()))
        counts.append(step_counts(second.chained_optimizers[0]))
        step(chunks, second)
        counts.append(step_counts(second.chained_optimizers[0]))
        step(chunks, first)  # the twin: one that was never loaded
        counts.append(step_counts(first.chained_optimizers[0]))
        return counts

    [(saved, loaded, stepped, uninterrupted)] = run_ranks(1, body)
    num_parameters = saved[0]
    assert num_parameters == 4 * 6 + 3  # weights of the tiny model
    assert saved[1] == {1.0}
    assert loaded == (1, {1.0})
    assert stepped == (1, {1.0 + num_parameters})  # each parameter's update counts for all
    assert uninterrupted == (num_parameters, {2.0})


def test_a_distributed_optimizer_neither_saves_before_a_step_nor_loads_its_checkpoint(
    tmp_path: Path,
) -> None:
    def body(rank: int) -> None:
        chunks, make = distributed_optimizers()
        model = unwrap(chunks[0]).sharded_state_dict(metadata=METADATA)
        optimizer = make()
        with pytest.raises(AssertionError):
            optimizer.sharded_state_dict({"model": model}, is_loading=True, metadata=METADATA)
        step(chunks, optimizer)
        entries = optimizer.sharded_state_dict({"model": model}, metadata=METADATA)
        dist_checkpointing.save({"optimizer": entries}, str(tmp_path))
        wanted = optimizer.sharded_state_dict({"model": model}, is_loading=True, metadata=METADATA)
        loaded = dist_checkpointing.load({"optimizer": wanted}, str(tmp_path))
        with pytest.raises(KeyError, match="step"):
            optimizer.load_state_dict(loaded["optimizer"])

    run_ranks(1, body)


def test_loaded_parameter_groups_are_matched_by_multipliers_not_by_rates() -> None:
    # groups that differ in max_lr alone would be taken for one another
    from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

    identity = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False}
    identity["is_decoupled_lr"] = False
    assert set(param_group_identifier_keys) == set(identity)
    saved = [
        identity | {"max_lr": 1.0, "params": [0]},
        identity | {"max_lr": 2.0, "params": [1]},
    ]
    match = MegatronOptimizer._filter_and_reorder_param_groups
    found = match(saved, copy.deepcopy(saved))
    assert [group["max_lr"] for group in found] == [2.0, 2.0]
    saved[1]["lr_mult"] = 2.0  # the twin: told apart by a multiplier
    assert [group["max_lr"] for group in match(saved, copy.deepcopy(saved))] == [1.0, 2.0]


def test_the_groups_of_our_optimizer_are_told_apart() -> None:
    def body(rank: int) -> list[tuple[Any, ...]]:
        from megatron.core.optimizer.optimizer import param_group_identifier_keys

        optimizer = build_optimizer(chunks_of(), OptimizerConfig(), bf16=False)
        return [
            tuple(group[key] for key in param_group_identifier_keys)
            for group in optimizer.param_groups
        ]

    [groups] = run_ranks(1, body)
    assert len(set(groups)) == len(groups) == 2  # with weight decay, and without for norms


def test_float32_masters_keep_the_old_weights_until_they_are_reloaded() -> None:
    def body(rank: int) -> tuple[float, float]:
        chunks = chunks_of(bf16=True)
        optimizer = build_optimizer(chunks, OptimizerConfig(lr=1e-9), bf16=True)
        weight = unwrap(chunks[0]).decoder.final_layernorm.weight
        found = []
        for reload in (False, True):
            with torch.no_grad():
                weight.fill_(3.0)
            if reload:
                optimizer.reload_model_params()
            for parameter in chunks[0].parameters():
                parameter.main_grad.zero_()
            optimizer.step()
            found.append(float(weight.detach().mean()))
        return found[0], found[1]

    assert run_ranks(1, body) == [(1.0, 3.0)]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_in_two_halves_is_the_optimizer_s_own_step(bf16: bool) -> None:
    """Where clipping acts: gradients are far above the norm."""

    def after(step: Callable[[Any], object]) -> list[torch.Tensor]:
        def body(rank: int) -> list[torch.Tensor]:
            chunks = chunks_of(bf16=bf16)
            optimizer = build_optimizer(chunks, OptimizerConfig(lr=1e-2, clip_grad=0.5), bf16=bf16)
            generator = torch.Generator().manual_seed(1)
            for _ in range(2):
                for parameter in chunks[0].parameters():
                    parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
                step(optimizer)
            return [
                value.clone()
                for part in optimizer.chained_optimizers
                for parameter, state in part.optimizer.state.items()
                for value in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
            ]

        (found,) = run_ranks(1, body)
        return found

    def in_halves(optimizer: Any) -> None:
        norm = ready_gradients(optimizer)
        assert norm > 10
        step_with_norm(optimizer, norm)

    def unclipped(optimizer: Any) -> None:  # the twin
        ready_gradients(optimizer)
        step_with_norm(optimizer, 0.1)

    own, theirs = after(in_halves), after(lambda optimizer: optimizer.step())
    assert own
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(own, after(unclipped), strict=True))


def rates(style: str, warmup: int, steps: int = 7) -> list[float]:
    def body(rank: int) -> list[float]:
        config = OptimizerConfig(
            lr=1.0,
            min_lr=0.1,
            lr_decay_style=style,  # type: ignore[arg-type]
            lr_warmup_iters=warmup,
            lr_decay_iters=5,
        )
        optimizer = build_optimizer(chunks_of(), config, bf16=False)
        schedule = build_schedule(optimizer, config, train_iters=9)
        found = []
        for _ in range(steps):
            [rate] = {group["lr"] for group in optimizer.param_groups}
            found.append(rate)
            schedule.step(1)
        return found

    return run_ranks(1, body)[0]


def test_the_first_rate_of_a_warm_up_is_zero() -> None:
    assert rates("constant", warmup=4) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates("constant", warmup=0)[0] == 1.0


def test_the_rate_reaches_its_floor_at_the_end_of_the_decay_and_stays() -> None:
    linear = rates("linear", warmup=1)
    assert linear == pytest.approx([0.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1])
