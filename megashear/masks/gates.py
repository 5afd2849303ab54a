"""Hard-concrete gates: samples, chances to be closed, deterministic values."""

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
"""Lower end of the stretched interval; values below 0 are closed gates."""
HIGH = 1.1
"""Upper end of the stretched interval; values above 1 are fully open gates."""
TEMPERATURE = 2 / 3
"""Temperature of the concrete distribution. Source: Louizos et al. 2018, section 4."""
EPS = 1e-6
"""Least distance of noise and probabilities from 0 and from 1."""
SOFT_FACTOR = 0.8
"""Factor that flattens the deterministic gate. Source: the reference of Sheared LLaMA."""
LOG_ALPHA_MIN = math.log(0.01)
"""Lower clamp of log_alpha, where a gate is closed with probability 0.952870, the largest."""
LOG_ALPHA_MAX = math.log(100.0)
"""Upper clamp and start value of log_alpha; closed with probability 0.0020177, the smallest."""

_NOISE_KEY_VERSION = "megashear mask noise 1"


def sample_gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Draw gates z from the hard-concrete distribution.

    Args:
        log_alpha: location of every gate, float32, any shape.
        noise: independent draws of `logistic_noise`, shaped like ``log_alpha``.

    Returns:
        z in [0, 1], shaped like ``log_alpha``; exactly 0 or 1 with positive probability,
        and there the gradient to ``log_alpha`` is 0.

    Source: Louizos et al. 2018 (arXiv:1712.01312), "The hard concrete distribution".
    """
    z: Tensor = _SampledGates.apply(log_alpha, noise)
    return z


# What is done with every gate in every step is one node of autograd, in place where possible:
# memory that is touched for the first time costs more than the arithmetic. As plain operators of
# torch it would take 1.2 to 1.7 times the host's time that a GPU waits for
# (`tools/benchmarks/masks.py`).


class _SampledGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, noise: Tensor) -> Tensor:
        # a new tensor, because noise that was drawn ahead may be used again
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
    """Return P(z = 0) of every gate, differentiable.

    Args:
        log_alpha: location of every gate, any shape.

    Returns:
        Probabilities in [EPS, 1 - EPS], float64, shaped like ``log_alpha``. Float32 would lose four
        digits: sums over a row of thousands of units start near 0.002 of its length.

    Source: Louizos et al. 2018 (arXiv:1712.01312), the distribution function at 0.
    """
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    return torch.sigmoid(shift - log_alpha.double()).clamp(EPS, 1.0 - EPS)


def closed_sums(log_alpha: Tensor) -> Tensor:
    """Return the expected number of closed gates of every row, differentiable.

    It is the sum of `probability_closed` over the row, as one node of autograd: at 7B each step
    sums 357,408 gates.

    Args:
        log_alpha: [rows, units].

    Returns:
        float64 [rows].
    """
    sums: Tensor = _ClosedSums.apply(log_alpha)
    return sums


class _ClosedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor) -> Tensor:
        shift = TEMPERATURE * math.log(-LOW / HIGH)
        closed = log_alpha.to(torch.float64, copy=True).neg_().add_(shift).sigmoid_()
        closed.clamp_(EPS, 1.0 - EPS)
        # The slope is made here, because the backward pass waits for that of the model.
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
    """Return P(z > 0) of every gate, the chance to be open; float64, shaped like ``log_alpha``."""
    return 1.0 - probability_closed(log_alpha)


def soft_gates(log_alpha: Tensor) -> Tensor:
    """Return the deterministic value of every gate, if it is open.

    The values are shaped and typed like ``log_alpha`` and never reach 1: the upper clamp of
    log_alpha gives 0.99603.

    Source: reference implementation of Sheared LLaMA (arXiv:2310.06694), evaluation.
    """
    return torch.sigmoid(log_alpha / TEMPERATURE * SOFT_FACTOR)


def num_closed_expected(log_alpha_row: Tensor) -> int:
    """Return the number of units that one row is expected to close, rounded with halves up.

    Args:
        log_alpha_row: one **whole** row, [units]; sums of shards would be rounded differently.
    """
    return math.floor(float(probability_closed(log_alpha_row.detach()).sum()) + 0.5)


def deterministic_gates(log_alpha: Tensor, num_closed: Sequence[int]) -> Tensor:
    """Return gates without noise: the least open units exactly 0, the others soft.

    Args:
        log_alpha: **whole** rows, [rows, units].
        num_closed: number of units to close in each row.

    Returns:
        Gates shaped like ``log_alpha``, without gradient. Among equal units the first are closed.

    Source: reference implementation of Sheared LLaMA, which leaves ties undefined.
    """
    log_alpha = log_alpha.detach()
    num_rows, num_units = log_alpha.shape
    assert len(num_closed) == num_rows, f"{len(num_closed)} counts for {num_rows} rows"
    gates = soft_gates(log_alpha)
    for row, count in enumerate(num_closed):
        assert 0 <= count <= num_units, f"row {row}: cannot close {count} of {num_units} units"
        # Ordered by log_alpha and not by the gate: the sigmoid rounds neighbours to one value, and
        # its vectorised and scalar forms round differently.
        order = torch.argsort(log_alpha[row], stable=True)
        gates[row, order[:count]] = 0.0
    return gates


def logistic_noise(uniform: Tensor) -> Tensor:
    """Return ln u - ln(1 - u) of uniform noise u, which is clamped to [EPS, 1 - EPS]."""
    return torch.logit(uniform, eps=EPS)


def uniform_noise(
    num_units: int, *, seed: int, step: int, stream: int, kind: str, row: int
) -> Tensor:
    """Return the uniform noise of one whole row of one kind of mask.

    It is a pure function of its arguments, equal on every process and machine. Shards use slices of
    it, so every layout samples the same masks. It must never change, or a resumed run would sample
    other masks than the run that it continues. Therefore both of its parts are specified algorithms
    (BLAKE2b, Philox4x64-10) and not the default generator of a library.

    Args:
        num_units: length of the whole row.
        seed: the run's seed.
        step: training step, from 0.
        stream: noise stream, from 0; each sample of a global batch belongs to a stream.
        kind: kind of mask, of ``KINDS``.
        row: row of the whole mask: a layer, from 0; for head with grouped queries the layer times
            G plus the group; 0 where a kind has one row.

    Returns:
        Multiples of 2**-24 in [0, 1), float32, [num_units].
    """
    text = f"{_NOISE_KEY_VERSION}|{seed:d}|{step:d}|{stream:d}|{kind}|{row:d}"
    # All 128 bits of the key count. torch's CPU generator keeps only 32 bits of its seed, and many
    # rows of one 7B run (32 layers, 8 streams, 3,200 steps) would share a seed.
    key = int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key).random_raw(num_units) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))
