"""Adam that descends on log_alpha and ascends on the multipliers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megashear.config.defaults import ADAM_BETAS, ADAM_EPS
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.gates import LOG_ALPHA_MAX, LOG_ALPHA_MIN
from megashear.masks.mask_set import MaskSet

MULTIPLIERS = "multipliers"
"""Name of all multipliers together in `MaskOptimizer.grad_square_sums`."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MaskOptimizer:
    """Steps masks downhill and multipliers uphill, with one Adam.

    Args:
        mask_set: masks whose log_alpha descends and is clamped after each step. The master itself
            is clamped: the reference clamps a copy, and its masters wind up.
        constraint: constraint whose multipliers ascend; lambda2 is clamped to [0, lambda2_max].
        betas: decay rates of Adam's two moments, per step.
        eps: number added to the root of the second moment.
        ascend: whether the multipliers move; without a penalty they stay, and have no gradients.

    Source: reference implementation of Sheared LLaMA (arXiv:2310.06694), with the clamp moved.
    """

    def __init__(
        self,
        mask_set: MaskSet,
        constraint: SparsityConstraint,
        *,
        betas: tuple[float, float] = ADAM_BETAS,
        eps: float = ADAM_EPS,
        ascend: bool = True,
    ) -> None:
        self._log_alpha: dict[str, nn.Parameter] = dict(mask_set.log_alpha)
        self._multipliers: dict[str, nn.Parameter] = constraint.named_parameters()
        self._moving = self._named_parameters() if ascend else self._log_alpha
        self._ascending = list(self._multipliers.values()) if ascend else []
        self._lambda2 = list(constraint.lambda2.values())
        self._lambda2_max = constraint.lambda2_max
        # One Adam for both, so that step counts and learning rates cannot drift apart. step()
        # negates the gradients of multipliers.
        self._adam = torch.optim.Adam(
            [
                {"params": list(self._log_alpha.values())},
                {"params": list(self._multipliers.values())},
            ],
            lr=0.0,
            betas=betas,
            eps=eps,
            foreach=False,
        )
        # Adam makes its state at the first step, and a checkpoint needs it before.
        for parameter in self._named_parameters().values():
            self._adam.state[parameter] = {"step": torch.tensor(0.0)} | {
                moment: torch.zeros_like(parameter, requires_grad=False) for moment in _MOMENTS
            }

    def step(self, lr: float, *, grad_scale: float = 1.0) -> None:
        """Take one step with the present gradients, and clamp.

        Afterwards gradients cannot be used again: they are scaled, and those of multipliers are
        negated.

        Args:
            lr: learning rate of log_alpha and multipliers, from the schedule.
            grad_scale: factor on all gradients, from `clip_factor`.
        """
        for name, parameter in self._moving.items():
            assert parameter.grad is not None, f"{name} has no gradient; was the penalty added?"
            parameter.grad.mul_(-grad_scale if name in self._multipliers else grad_scale)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        with torch.no_grad():
            for log_alpha in self._log_alpha.values():
                log_alpha.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)
            for lambda2 in self._lambda2:
                lambda2.clamp_(min=0.0, max=self._lambda2_max)

    def zero_grad(self) -> None:
        """Drop the gradients of log_alpha and of the multipliers."""
        self._adam.zero_grad(set_to_none=True)

    def grad_square_sums(self) -> dict[str, Tensor]:
        """Return squared gradient norms of what is held here, to form one clip norm.

        The caller sums each kind over exactly the shards that hold different parts of it, so that a
        replicated mask counts once, and then adds up the kinds.

        Returns:
            float64 scalars: one for log_alpha of each kind, and ``MULTIPLIERS`` for all
            multipliers, which every process holds whole.
        """
        sums = {kind: _grad_square_sum(mask) for kind, mask in self._log_alpha.items()}
        zero = torch.zeros((), dtype=torch.float64)
        return sums | {MULTIPLIERS: sum(map(_grad_square_sum, self._ascending), zero)}

    @property
    def num_steps(self) -> int:
        """Return the number of steps taken, which Adam's bias correction needs."""
        return int(next(iter(self._adam.state.values()))["step"])

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(float(num_steps))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return Adam's moments: the live tensors, not copies.

        Returns:
            ``<kind>.exp_avg`` and ``<kind>.exp_avg_sq``, shaped and sharded like log_alpha, and
            ``lambda1.<kind>.exp_avg`` and so on for the multipliers, scalars. These and `num_steps`
            are all that a resume needs.
        """
        return {
            f"{name}.{moment}": self._adam.state[parameter][moment]
            for name, parameter in self._named_parameters().items()
            for moment in _MOMENTS
        }

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return self._log_alpha | self._multipliers


def clip_factor(total_norm: float, max_norm: float = 1.0) -> float:
    """Return the factor on all gradients, at most 1, that brings their norm to ``max_norm``.

    Args:
        total_norm: norm of the gradients of all log_alpha, over shards, and all multipliers.
        max_norm: the largest norm that is not scaled.

    Source: torch.nn.utils.clip_grad_norm_, and Megatron's clipping, with their 1e-6.
    """
    factor = max_norm / (total_norm + 1e-6)
    # not min(), which would hide a norm that is not a number
    return 1.0 if factor > 1.0 else factor


def _grad_square_sum(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "no gradient yet; was the penalty added?"
    return parameter.grad.double().square().sum()
