"""Elementwise parts of a layer as single nodes of autograd: each keeps its input alone for its
backward pass, which torch's own operators, one node each, would keep several times over.

Gates come in here where the activation that they gate is in hand anyway. Arithmetic is float32
whatever the activation's precision, and the result is rounded once; a norm over all dimensions on
CUDA rounds its weight too, see `fused_rms_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megashear.models.fusion import fused


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        x: gate and up side by side, [..., 2 * ffn/tp].

    Returns:
        [..., ffn/tp], typed like ``x``.
    """
    output: Tensor = _SwiGLU.apply(x)
    return output


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_open: Tensor | None = None) -> Tensor:
    """x / sqrt(sum(x^2) / h' + eps) * weight over the last dimension.

    Where masks close hidden dimensions, ``x`` is exactly 0 there, so that with h' of h open this is
    the norm that the cut model takes of what it keeps. The host never reads h': it may be another
    one in every step without a wait and without another kernel.

    On CUDA the norm over all dimensions is torch's fused kernel, see `fused_rms_norm`, and the one
    over the open is ours, compiled. On a CPU both are ours.

    Args:
        x: [..., h].
        weight: [h], of any precision.
        eps: added to the mean square.
        num_open: h', float32 [], on the device of ``x``; None for h.

    Returns:
        Shaped and typed like ``x``.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    if x.is_cuda and num_open is None:
        return fused_rms_norm(x, weight, eps)
    count = x.new_full((), x.size(-1), dtype=torch.float32) if num_open is None else num_open
    output: Tensor = _RMSNorm.apply(x, weight, eps, count)
    return output


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` over all dimensions as it is on CUDA, where the weight is rounded as ``x`` is; a
    float32 weight beside bfloat16 would run as seven kernels."""
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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _activate(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _activation_gradient(dy, *ctx.saved_tensors)


@fused
def _activate(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up).to(x.dtype)


@fused
def _activation_gradient(dy: Tensor, x: Tensor) -> Tensor:
    dy = dy.float()
    gate, up = x.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    if torch.compiler.is_compiling():
        # the compiler makes one pass of this, and of writes to parts of a tensor several
        dup, dgate = dy * silu, dy * up * (sigmoid + silu * (1 - sigmoid))
        return torch.stack((dgate.to(x.dtype), dup.to(x.dtype)), dim=-2).flatten(-2)
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.mul(dy, silu, out=dup)
    # silu' = sigmoid + silu * (1 - sigmoid); both are overwritten, they are no longer needed
    slope = silu.addcmul_(silu, sigmoid, value=-1.0).add_(sigmoid).mul_(dy)
    torch.mul(slope, up, out=dgate)
    return dx


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, count: Tensor) -> Tensor:
        y, scale = _norm(x, weight, eps, count)
        ctx.save_for_backward(x, weight, scale, count)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_norm_gradients(dy, *ctx.saved_tensors), None, None


@fused
def _norm(x: Tensor, weight: Tensor, eps: float, count: Tensor) -> tuple[Tensor, Tensor]:
    """And what each token was scaled by, float32 [..., 1]."""
    wide = x.float()
    # in the order of torch's own norm, for the same bits
    scale = wide.pow(2).sum(dim=-1, keepdim=True).div_(count).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


@fused
def _norm_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the input and of the weight."""
    dy, wide, w = dy.float(), x.float(), weight.float()
    product = (dy * wide).flatten(0, -2)  # [tokens, h]
    dweight = product.T @ scale.flatten()
    # d scale / d x = -scale^3 x / count
    along = (product @ w).view_as(scale) * scale.pow(3).div_(count).neg_()
    dx = (dy * w).mul_(scale).addcmul_(wide, along)
    return dx.to(x.dtype), dweight.to(weight.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        b_s = torch.empty((x.size(1), x.size(0), *x.shape[2:]), dtype=x.dtype, device=x.device)
        return _turn_into(b_s.transpose(0, 1), x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turned = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        return _turn_into(turned, dy, cos, sin, back=True), None, None


@fused
def _turn_into(turned: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Turn by the angles, or back; each half's place tells the direction."""
    first, second = x.float().chunk(2, dim=-1)
    a, b = turned.chunk(2, dim=-1)
    if back:
        first, second, a, b = second, first, b, a
    if turned.dtype == torch.float32:
        _product_into(a, first, cos).addcmul_(second, sin, value=-1.0)
        _product_into(b, second, cos).addcmul_(first, sin)
    else:
        a.copy_((first * cos).addcmul_(second, sin, value=-1.0))
        b.copy_((second * cos).addcmul_(first, sin))
    return turned


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a * b, written to ``out`` at once; torch.compile, which makes one pass of both, traces no
    ``out=`` that is a part of another tensor."""
    return out.copy_(a * b) if torch.compiler.is_compiling() else torch.mul(a, b, out=out)
