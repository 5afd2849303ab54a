"""Megatron's optimizer of the weights, and the schedule that masks and multipliers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megashear.config import OptimizerConfig


def build_optimizer(
    chunks: Sequence[torch.nn.Module], config: OptimizerConfig, *, bf16: bool, sharded: bool = False
) -> MegatronOptimizer:
    """Build AdamW over the weights of this rank's chunks, with float32 masters under bf16.

    Args:
        chunks: wrapped for data parallelism.
        config: betas, weight decay, clip norm. The learning rate comes from the schedule.
        bf16: whether the weights are bfloat16.
        sharded: whether replicas share the state, each holding its part; the chunks' gradients
            must be sharded too.
    """
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=_floor(config),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=sharded,
    )
    optimizer = get_megatron_optimizer(megatron, list(chunks), use_gloo_process_groups=False)
    _fuse(optimizer)
    return optimizer


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Have torch's AdamW, which serves where Apex and Transformer Engine are absent, pass over
    weights, gradients and moments once instead of a dozen times; megatron-core does not ask it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            group["fused"] = True
        for parameter, state in adam.state.items():
            if "step" in state:  # where the kernel wants it, see torch.optim.AdamW
                state["step"] = state["step"].to(parameter.device)


def build_schedule(
    optimizer: MegatronOptimizer, config: OptimizerConfig, train_iters: int
) -> OptimizerParamScheduler:
    """Build the schedule: warm-up from 0, decay to the floor, counted in steps.

    The rate of step 0 is set at once.

    Raises:
        ValueError: warm-up is not shorter than the decay.
    """
    check_schedule(config, train_iters)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=_floor(config),
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=config.lr_decay_iters or train_iters,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        # what the user asks for now counts, not what the checkpoint was trained with
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def apply_flags(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """Let the flags of this run count after a checkpoint's parameter groups were loaded.

    The groups carry the peak and floor of the run that saved them, and the schedule prefers these
    to its own: without this a changed --lr would be logged and not used.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.lr, _floor(config)
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_eps
    _fuse(optimizer)


@torch.no_grad()
def ready_gradients(optimizer: MegatronOptimizer) -> float:
    """Hand reduced gradients to the optimizer and return their norm, before clipping.

    Collective over the replica's model group. The first half of the optimizer's own ``step()``,
    between whose halves a step can still be skipped: a norm that is not finite would go into every
    weight.
    """
    found_inf = optimizer.prepare_grads()
    assert not found_inf, "only loss scaling looks for infinities, and fp16 is refused"
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def step_with_norm(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip by a norm that `ready_gradients` returned, and step: the second half."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if norm > part.config.clip_grad:
            # in place; megatron-core writes a scaled copy first where Apex is absent
            torch.nn.utils.clip_grads_with_norm_(
                part.get_parameters(), part.config.clip_grad, torch.tensor(norm)
            )
    optimizer.step_with_ready_grads()


def check_schedule(config: OptimizerConfig, train_iters: int) -> None:
    """Refuse a warm-up that leaves no step for the decay.

    Raises:
        ValueError: with both numbers.
    """
    decay = config.lr_decay_iters or train_iters
    if config.lr_warmup_iters >= decay:
        raise ValueError(
            f"--lr-warmup-iters {config.lr_warmup_iters} is not below --lr-decay-iters {decay} "
            f"(--train-iters unless given); lower the one or raise the other"
        )


def schedule_fraction(schedule: OptimizerParamScheduler, peak: float) -> float:
    """Return the schedule's present value as a fraction of its peak, for the rate of masks."""
    return schedule.get_lr({}) / peak


def _floor(config: OptimizerConfig) -> float:
    # a tenth of the peak: the recipes of Sheared LLaMA (docs/algorithm.md section 6)
    return config.lr / 10 if config.min_lr is None else config.min_lr
