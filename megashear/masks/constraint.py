"""The constraint that holds expected sizes to target sizes, with a warm-up of the target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from megashear.config.defaults import LAMBDA2_MAX
from megashear.masks.gates import LOG_ALPHA_MAX, LOG_ALPHA_MIN, probability_closed
from megashear.masks.kinds import KINDS
from megashear.masks.targets import MaskPart, target_flag

LEAST_LAMBDA2_MAX = 100.0
"""Smallest bound of lambda2 that holds the constraint; a bound of 10 was seen to lose control."""


class SparsityConstraint:
    """Holds each kind's expected sparsity to its target with a pair of multipliers.

    Every process has all multipliers and computes the same penalty from the same whole sums, so
    multipliers stay equal everywhere without communication.

    Args:
        parts: the parts that this process holds, by kind.
        targets: units to leave open in a row, for the kinds of ``parts``.
        warmup_steps: steps over which the target sparsity grows from 0; 0 for no warm-up.
        lambda2_max: bound of the quadratic multipliers, which without one only grow; ``None`` for
            no bound.
        force: accept a ``lambda2_max`` below ``LEAST_LAMBDA2_MAX``.
        dtype: type of the multipliers, float32 as in the reference; float64 to compare layouts.

    Raises:
        ValueError: the clamp of log_alpha makes a target unreachable, or the bound is too low to
            hold the constraint.

    Source: Sheared LLaMA (arXiv:2310.06694), section 2.1. Deviations: sums in float64, bounded
    lambda2, no multipliers for a kind that keeps its size.
    """

    def __init__(
        self,
        parts: Mapping[str, MaskPart],
        targets: Mapping[str, int],
        *,
        warmup_steps: int,
        lambda2_max: float | None = LAMBDA2_MAX,
        force: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert parts.keys() == targets.keys(), f"masks {[*parts]} for targets {[*targets]}"
        assert warmup_steps >= 0, f"{warmup_steps} steps of warm-up"
        if lambda2_max is not None and not lambda2_max >= LEAST_LAMBDA2_MAX and not force:
            raise ValueError(
                f"lambda2_max is {lambda2_max:g}; below {LEAST_LAMBDA2_MAX:g} the masks were seen "
                f"to lose their targets; raise --lambda2-max to {LEAST_LAMBDA2_MAX:g} or more, or "
                f"force it with --force-lambda2-max"
            )
        self.parts: dict[str, MaskPart] = {kind: parts[kind] for kind in KINDS if kind in parts}
        self.targets: dict[str, float] = {
            kind: _target_sparsity(part, targets[kind]) for kind, part in self.parts.items()
        }  # sparsity at the end of the warm-up
        self.warmup_steps = warmup_steps
        self.lambda2_max = lambda2_max
        self.lambda1: dict[str, nn.Parameter] = self._multipliers(dtype)
        self.lambda2: dict[str, nn.Parameter] = self._multipliers(dtype)

    def target_at(self, step: int) -> dict[str, float]:
        """Return the target sparsity by kind at ``step`` (from 0), a fraction of a row's units."""
        grown = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return {kind: target * grown for kind, target in self.targets.items()}

    def penalty(
        self, own_sums: Mapping[str, Tensor], whole_sums: Mapping[str, Tensor], step: int
    ) -> Tensor:
        """Return the penalty to add to the loss, the same number on every process.

        No differentiable collective is needed: the value of each row comes from ``whole_sums``, its
        slope from ``own_sums``. The gradient of the log_alpha in ``own_sums`` is exactly this
        process's share, and the gradient of the multipliers is whole.

        Args:
            own_sums: expected closed units held here by kind, float64 [own rows], differentiable,
                from `MaskSet.closed_sums`.
            whole_sums: expected closed units of whole rows, float64 [num_rows]: ``own_sums`` summed
                over all shards, and in one process ``own_sums`` itself.
            step: training step, from 0.

        Returns:
            float64 scalar: sum over kinds of the mean over all rows of
            lambda1 (s - t) + lambda2 (s - t)**2, with s the sparsity of a row and t the target.
        """
        targets = self.target_at(step)
        total = torch.zeros((), dtype=torch.float64)
        for kind, part in self.parts.items():
            own, whole = own_sums[kind], whole_sums[kind].detach()
            assert whole.shape == (part.num_rows,), f"{kind}: {list(whole.shape)} for whole rows"
            rows = torch.tensor(part.rows, dtype=torch.long)
            sums = whole.index_add(0, rows, own - own.detach())  # [num_rows]
            gap = sums / part.num_units - targets[kind]
            lambda1, lambda2 = self.lambda1[kind].double(), self.lambda2[kind].double()
            total = total + (lambda1 * gap + lambda2 * gap.square()).mean()
        return total

    def expected_sparsity(self, whole_sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean over all rows of the expected fraction of closed units, by kind.

        Args:
            whole_sums: expected closed units of whole rows by kind, [num_rows].
        """
        return {
            kind: float(whole_sums[kind].detach().double().mean()) / part.num_units
            for kind, part in self.parts.items()
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all multipliers: lambda1 of every kind, then lambda2, in the order of ``KINDS``."""
        yield from self.lambda1.values()
        yield from self.lambda2.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors of the multipliers, ``lambda1.<kind>`` and ``lambda2.<kind>``."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the multipliers by the names ``lambda1.<kind>`` and ``lambda2.<kind>``."""
        first = {f"lambda1.{kind}": parameter for kind, parameter in self.lambda1.items()}
        return first | {f"lambda2.{kind}": parameter for kind, parameter in self.lambda2.items()}

    def _multipliers(self, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        return {kind: nn.Parameter(torch.zeros((), dtype=dtype)) for kind in self.parts}


def _target_sparsity(part: MaskPart, wanted: int) -> float:
    least, most = (
        float(probability_closed(torch.tensor(clamp, dtype=torch.float64)))
        for clamp in (LOG_ALPHA_MAX, LOG_ALPHA_MIN)
    )
    sparsity = 1.0 - wanted / part.num_units
    if not least <= sparsity <= most:
        if sparsity < least:
            nearest = math.floor(part.num_units * (1.0 - least))
        else:
            nearest = math.ceil(part.num_units * (1.0 - most))
        kind = KINDS[part.kind]
        extent, outer = kind.extent, kind.within if part.rows_per_layer > 1 else None
        each = "" if outer is None else f" for each {KINDS[outer].unit}"
        raise ValueError(
            f"target {extent} {wanted} of {part.num_units}{each} is a sparsity of "
            f"{sparsity:.4f}, and masks reach {least:.4f} to {most:.4f}; the nearest "
            f"{target_flag(extent)} is {nearest}{each}"
        )
    return sparsity
