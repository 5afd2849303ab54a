"""Elementwise parts of a layer as single nodes of autograd: each keeps its input alone for its
backward pass, which torch's own operators, one node each, would keep several times over.

Gates come in here where the activation that they gate is in hand anyway. Arithmetic is float32
whatever the activation's precision, and the result is rounded once; a norm on CUDA rounds its
weight too, see `rms_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(x: Tensor, units: Tensor | None = None) -> Tensor:
    """silu(gate) * up * z.

    Args:
        x: gate and up side by side, [..., 2 * ffn/tp].
        units: z, float32 [ffn/tp]; None for no gates.

    Returns:
        [..., ffn/tp], typed like ``x``.
    """
    output: Tensor = _SwiGLU.apply(x, units)
    return output


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    On CUDA it is torch's fused kernel, which takes weights of the activation's precision alone: a
    masked norm's float32 weight, gates folded in, is rounded once, as the cut rounds what it folds,
    and masked and unmasked norms run one kernel. On a CPU the weight is taken as it is.

    Args:
        x: [..., h].
        weight: [h], of any precision.
        eps: added to the mean square.

    Returns:
        Shaped and typed like ``x``.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    if x.is_cuda:
        return fused_rms_norm(x, weight, eps)
    output: Tensor = _RMSNorm.apply(x, weight, eps)
    return output


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` as it is on CUDA; a float32 weight beside bfloat16 would run as seven kernels."""
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight.to(x.dtype), eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of a head by its angle at this place of the sequence.

    Args:
        x: [s, b, heads/tp, d].
        cos: of the angles, [s, 1, 1, d/2].
        sin: as ``cos``.

    Returns:
        [s, b, heads/tp, d], of sequences that lie in memory one behind the other: attention on a
        CPU reads them a fifth faster so than one token of each in turn.

    Source: Su et al. 2021 (arXiv:2104.09864), halves instead of neighbours as LLaMA has them.
    """
    output: Tensor = _Rotate.apply(x, cos, sin)
    return output


def gated_linear(
    x: Tensor, weight: Tensor, units: Tensor | None, outputs: Tensor | None, copies: int
) -> Tensor:
    """((x * z) @ weight.T) * g, keeping x alone for the backward pass.

    The gradient of g needs the product before it was gated, which would be kept for it. But it is
    also what the gradient G of the weight, before it is gated, has in its rows:
    sum_t dy_ti (u @ W.T)_ti = sum_j W_ij (dy.T @ u)_ij = sum_j W_ij G_ij; and W.grad = g_i G_ij.

    Args:
        x: [..., units * width].
        weight: [outputs, units * width].
        units: z, float32 [units]; None for no gates.
        outputs: g, float32 [outputs]; None for no gates.
        copies: factor on the gradient of ``outputs``, see MaskedRowParallelLinear.
    """
    output: Tensor = _GatedLinear.apply(x, weight, units, outputs, copies)
    return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, units: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, units)
        gate, up = x.float().chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate).mul_(up)
        if units is not None:
            y.mul_(units)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, units = ctx.saved_tensors
        dy = dy.float()
        gate, up = x.float().chunk(2, dim=-1)
        dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        dgate, dup = dx.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        torch.mul(dy, silu, out=dup)
        # silu' = sigmoid + silu * (1 - sigmoid); both are overwritten, they are no longer needed
        slope = silu.addcmul_(silu, sigmoid, value=-1.0).add_(sigmoid)
        torch.mul(slope, dy, out=dgate).mul_(up)
        dunits = None
        if units is not None:
            dunits = _sum_over_tokens(torch.mul(dup, up, out=sigmoid))
            dup.mul_(units)
            dgate.mul_(units)
        return dx.to(x.dtype), dunits


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        # in the order of torch's own norm, for the same bits
        scale = wide.pow(2).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dy, wide, w = dy.float(), x.float(), weight.float()
        product = (dy * wide).flatten(0, -2)  # [tokens, h]
        dweight = product.T @ scale.flatten()
        # d scale / d x = -scale^3 x / h
        along = (product @ w).view_as(scale) * scale.pow(3).div_(-x.size(-1))
        dx = (dy * w).mul_(scale).addcmul_(wide, along)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        b_s = torch.empty((x.size(1), x.size(0), *x.shape[2:]), device=x.device)
        return _turn_into(b_s.transpose(0, 1), x, cos, sin).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turned = torch.empty(dy.shape, device=dy.device)
        return _turn_into(turned, dy, cos, -sin).to(dy.dtype), None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        units: Tensor | None,
        outputs: Tensor | None,
        copies: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, units, outputs)
        ctx.copies = copies
        y = _gate_units(x, units) @ weight.T
        return y if outputs is None else y.mul_(outputs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, units, outputs = ctx.saved_tensors
        dx = dunits = dweight = doutputs = None
        gated = dy if outputs is None else (dy * outputs).to(dy.dtype)
        if ctx.needs_input_grad[0] or units is not None:
            dx = gated @ weight
            if units is not None:
                each = (dx * x).unflatten(-1, (len(units), -1))  # [..., units, width]
                dunits = _sum_over_tokens(each.sum(dim=-1, dtype=torch.float32))
                dx = _gate_units(dx, units)
        if ctx.needs_input_grad[1] or outputs is not None:
            inputs = _gate_units(x, units).flatten(0, -2)
            raw = dy.flatten(0, -2).T @ inputs  # [outputs, units * width]
            dweight = raw
            if outputs is not None:
                doutputs = (weight * raw).sum(dim=1, dtype=torch.float32).mul_(ctx.copies)
                dweight = raw.mul_(outputs[:, None])
        return dx, dweight, dunits, doutputs, None


def _gate_units(x: Tensor, units: Tensor | None) -> Tensor:
    if units is None:
        return x
    return (x.unflatten(-1, (len(units), -1)) * units[:, None]).flatten(-2).to(x.dtype)


def _sum_over_tokens(x: Tensor) -> Tensor:
    """[..., units] to [units]."""
    return x.flatten(0, -2).sum(dim=0)


def _turn_into(turned: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    a, b = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=a).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=b).addcmul_(first, sin)
    return turned
