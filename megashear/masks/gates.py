"""Hard-concrete gates: their samples, their chance to be closed, their deterministic values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOW = -0.1
"""Lower end of the stretched interval; what falls below 0 is a closed gate."""
HIGH = 1.1
"""Upper end of the stretched interval; what rises above 1 is a fully open gate."""
TEMPERATURE = 2 / 3
"""Temperature of the concrete distribution. Source: Louizos et al. 2018, section 4."""
EPS = 1e-6
"""Distance that noise and probabilities keep from 0 and 1."""
SOFT_FACTOR = 0.8
"""Flattens the deterministic gate. Source: reference implementation of Sheared LLaMA."""
LOG_ALPHA_MIN = math.log(0.01)
"""Lower clamp of log_alpha: a gate is closed with probability 0.952870 at most."""
LOG_ALPHA_MAX = math.log(100.0)
"""Upper clamp and start value of log_alpha: closed with probability 0.0020177 at least."""

_NOISE_KEY_VERSION = "megashear mask noise 1"


def sample_gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Draw gates z from the hard-concrete distribution.

    Args:
        log_alpha: location of every gate, float32, any shape.
        noise: independent draws of :func:`logistic_noise`, shaped like ``log_alpha``.

    Returns:
        z in [0, 1], shaped like ``log_alpha``; exactly 0 or 1 with positive probability,
        and there the gradient to ``log_alpha`` is 0.

    Source: Louizos et al. 2018 (arXiv:1712.01312), "The hard concrete distribution".
    """
    z: Tensor = _SampledGates.apply(log_alpha, noise)
    return z


# One node of autograd each for what is done with every gate in every step, in place where it can
# be: memory that is touched for the first time costs more than the arithmetic.


class _SampledGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, noise: Tensor) -> Tensor:
        # a new tensor: noise that was drawn ahead may be asked for again
        s = torch.add(noise.to(log_alpha.dtype), log_alpha).div_(TEMPERATURE).sigmoid_()
        ctx.save_for_backward(s)
        return s.mul(HIGH - LOW).add_(LOW).clamp_(0.0, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        slope = torch.addcmul(s, s, s, value=-1.0).mul_(grad).mul_((HIGH - LOW) / TEMPERATURE)
        # the interval in which z is not clamped
        return slope.mul_((s > -LOW / (HIGH - LOW)) & (s < (1.0 - LOW) / (HIGH - LOW))), None


def probability_closed(log_alpha: Tensor) -> Tensor:
    """P(z = 0) of every gate, differentiable.

    Args:
        log_alpha: location of every gate, any shape.

    Returns:
        Probabilities in [EPS, 1 - EPS], float64, shaped like ``log_alpha``. Sums over a row of
        thousands of units start near 0.002 of its length, where float32 loses four digits.

    Source: Louizos et al. 2018 (arXiv:1712.01312), the distribution function at 0.
    """
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    return torch.sigmoid(shift - log_alpha.double()).clamp(EPS, 1.0 - EPS)


def closed_sums(log_alpha: Tensor) -> Tensor:
    """Expected number of closed gates of every row, differentiable: `probability_closed` summed.

    Args:
        log_alpha: [rows, units].

    Returns:
        float64 [rows]. One node of autograd: at 7B some 357,408 gates are summed in each step.
    """
    sums: Tensor = _ClosedSums.apply(log_alpha)
    return sums


class _ClosedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor) -> Tensor:
        shift = TEMPERATURE * math.log(-LOW / HIGH)
        closed = log_alpha.to(torch.float64, copy=True).neg_().add_(shift).sigmoid_()
        closed.clamp_(EPS, 1.0 - EPS)
        # The slope is made here and not in the backward pass, which must wait for the model's.
        slope = torch.addcmul(closed, closed, closed, value=-1.0)  # p (1 - p)
        slope.mul_((closed > EPS) & (closed < 1.0 - EPS))
        ctx.save_for_backward(slope)
        ctx.dtype = log_alpha.dtype
        return closed.sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return torch.mul(slope, -grad[:, None]).to(ctx.dtype)


def scores(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of every gate, the chance to be open; float64, shaped like ``log_alpha``."""
    return 1.0 - probability_closed(log_alpha)


def soft_gates(log_alpha: Tensor) -> Tensor:
    """Deterministic value of every gate that stays open.

    Shaped and typed like ``log_alpha``. Never 1: the upper clamp of log_alpha gives 0.99603.

    Source: reference implementation of Sheared LLaMA (arXiv:2310.06694), evaluation.
    """
    return torch.sigmoid(log_alpha / TEMPERATURE * SOFT_FACTOR)


def num_closed_expected(log_alpha_row: Tensor) -> int:
    """Number of units that one whole row is expected to close, to the nearest, halves up.

    Args:
        log_alpha_row: one **whole** row, [units]; a shard's own part gives another rounding.
    """
    return math.floor(float(probability_closed(log_alpha_row.detach()).sum()) + 0.5)


def deterministic_gates(log_alpha: Tensor, num_closed: Sequence[int]) -> Tensor:
    """Gates without noise: the least open units exactly 0, the rest soft.

    Args:
        log_alpha: **whole** rows, [rows, units].
        num_closed: how many units to close, one number per row.

    Returns:
        Gates shaped like ``log_alpha``, without gradient. Among equal units the first ones close.

    Source: reference implementation of Sheared LLaMA, with ties made definite.
    """
    log_alpha = log_alpha.detach()
    num_rows, num_units = log_alpha.shape
    assert len(num_closed) == num_rows, f"{len(num_closed)} counts for {num_rows} rows"
    gates = soft_gates(log_alpha)
    for row, count in enumerate(num_closed):
        assert 0 <= count <= num_units, f"row {row}: cannot close {count} of {num_units} units"
        # Ordered by log_alpha, not by the gate: the sigmoid rounds neighbours to one value, and
        # its vectorised and scalar forms do not round alike.
        order = torch.argsort(log_alpha[row], stable=True)
        gates[row, order[:count]] = 0.0
    return gates


def logistic_noise(uniform: Tensor) -> Tensor:
    """Return ln u - ln(1 - u) of uniform noise u, held within [EPS, 1 - EPS]; shaped like it."""
    return torch.logit(uniform, eps=EPS)


def uniform_noise(
    num_units: int, *, seed: int, step: int, stream: int, kind: str, row: int
) -> Tensor:
    """Uniform noise of one whole row of one kind of mask.

    A pure function of its arguments: no state, the same on every process and machine. Slices of
    it are what shards use, so that every parallel layout samples the same masks. It must never
    change: a resumed run would sample other masks than the run it continues. Both parts of it are
    therefore specified algorithms (BLAKE2b, Philox4x64-10), not a library's choice of the day.

    Args:
        num_units: length of the whole row.
        seed: the run's seed.
        step: training step, from 0.
        stream: noise stream, from 0; samples of a global batch belong to streams.
        kind: kind of mask, of ``KINDS``.
        row: row of the whole mask: a layer, from 0; of head with grouped queries the layer times
            G plus the group; or 0 where a kind has one row.

    Returns:
        Multiples of 2**-24 in [0, 1), float32, [num_units].
    """
    text = f"{_NOISE_KEY_VERSION}|{seed:d}|{step:d}|{stream:d}|{kind}|{row:d}"
    # All 128 bits of the key count. torch's CPU generator keeps 32 of its seed, of which the
    # rows of one 7B run (32 layers, 8 streams, 3,200 steps) would share many.
    key = int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key).random_raw(num_units) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))
