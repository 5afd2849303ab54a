"""Elementwise parts of a layer, each a single node of autograd that keeps only its input.

torch's own operators, each a node of its own, would keep several tensors as large as the input.
Arithmetic is float32 whatever the precision of activations, and the result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megashear.models.fusion import fused
from megashear.parallel import kernel_choice


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Args:
        x: gate and up side by side, [..., 2 * ffn/tp].

    Returns:
        [..., ffn/tp], typed like ``x``.
    """
    output: Tensor = _SwiGLU.apply(x)
    return output


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_open: Tensor | None = None) -> Tensor:
    """Return x / sqrt(sum(x^2) / h' + eps) * weight over the last dimension.

    ``x`` is exactly 0 in hidden dimensions that masks close. So, with h' of h dimensions open, this
    is the norm of the cut model. The host never reads h', which may differ in every step without a
    wait and without another kernel.

    On CUDA the norm over all dimensions is torch's fused kernel, and the norm over the open ones is
    ours, compiled. On a CPU both are ours.

    Args:
        x: [..., h].
        weight: [h], typed like ``x``.
        eps: added to the mean square.
        num_open: h', float32 [], on the device of ``x``; None for h.

    Returns:
        Shaped and typed like ``x``.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    if x.is_cuda and num_open is None:
        return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, eps)
    count = x.new_full((), x.size(-1), dtype=torch.float32) if num_open is None else num_open
    output: Tensor = _RMSNorm.apply(x, weight, eps, count)
    return output


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` with each pair (x_i, x_{i + d/2}) of a head turned by its angle at its position.

    Args:
        x: [s, b, heads/tp, d].
        cos: cosines of the angles, [s, 1, 1, d/2].
        sin: sines of the angles, [s, 1, 1, d/2].

    Returns:
        [s, b, heads/tp, d]. On a CPU each sequence is contiguous in memory, which attention reads a
        fifth faster. Where this is compiled, tokens of all sequences alternate.

    Source: Su et al. 2021 (arXiv:2104.09864), halves instead of neighbours, as in LLaMA.
    """
    output: Tensor = _Rotation.apply(x, cos, sin)
    return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _activate(_gate_and_up(x)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _activation_gradient(_tokens(dy), _gate_and_up(x)).view(x.shape)


def _gate_and_up(x: Tensor) -> Tensor:
    """Take [..., 2 * ffn/tp] apart into [tokens, 2, ffn/tp]."""
    return _tokens(x).unflatten(-1, (2, -1))


@fused
def _activate(x: Tensor) -> Tensor:
    gate, up = x.float().unbind(1)
    return torch.nn.functional.silu(gate).mul_(up).to(x.dtype)


@fused
def _activation_gradient(dy: Tensor, x: Tensor) -> Tensor:
    dy = dy.float()
    gate, up = x.float().unbind(1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    if torch.compiler.is_compiling():
        # the compiler makes one pass of this, but several of writes to parts of a tensor
        dup, dgate = dy * silu, dy * up * (sigmoid + silu * (1 - sigmoid))
        return torch.stack((dgate.to(x.dtype), dup.to(x.dtype)), dim=1)
    dx = torch.empty_like(x)
    dgate, dup = dx.unbind(1)
    torch.mul(dy, silu, out=dup)
    # silu' = sigmoid + silu * (1 - sigmoid); silu is overwritten, since it is no longer needed
    slope = silu.addcmul_(silu, sigmoid, value=-1.0).add_(sigmoid).mul_(dy)
    torch.mul(slope, up, out=dgate)
    return dx


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, count: Tensor) -> Tensor:
        y, scale = _norm(_tokens(x), weight, eps, count)
        ctx.save_for_backward(x, weight, scale, count)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale, count = ctx.saved_tensors
        dx, dweight = _norm_gradients(_tokens(dy), _tokens(x), weight, scale, count)
        return dx.view(x.shape), dweight, None, None


@fused
def _norm(x: Tensor, weight: Tensor, eps: float, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normed tokens, and the factor of each token, float32 [tokens, 1]."""
    wide = x.float()
    # in the order of operations of torch's own norm, for equal bits
    scale = wide.pow(2).sum(dim=-1, keepdim=True).div_(count).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


@fused
def _norm_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of the weight."""
    dy, wide, w = dy.float(), x.float(), weight.float()
    product = dy * wide
    dweight = product.T @ scale.squeeze(1)
    # d scale / d x = -scale^3 x / count
    along = (product @ w)[:, None] * scale.pow(3).div_(count).neg_()
    dx = (dy * w).mul_(scale).addcmul_(wide, along)
    return dx.to(x.dtype), dweight.to(weight.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if kernel_choice.compiles_kernels():
            return _turn_compiled(x, cos, sin)
        b_s = torch.empty((x.size(1), x.size(0), *x.shape[2:]), dtype=x.dtype, device=x.device)
        turned = b_s.transpose(0, 1)
        _turn_into(turned, x, cos, sin)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # with the strides of ``sin``: other strides would need another graph
        back = torch.neg(sin, out=torch.empty_strided(sin.shape, sin.stride(), device=sin.device))
        if kernel_choice.compiles_kernels():
            return _turn_compiled(dy, cos, back), None, None
        turned = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        _turn_into(turned, dy, cos, back)
        return turned, None, None


def _turn_into(turned: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write ``x``, turned by its angles, to ``turned``."""
    first, second = x.float().chunk(2, dim=-1)
    a, b = turned.chunk(2, dim=-1)
    if a.dtype == torch.float32:
        torch.mul(first, cos, out=a).addcmul_(second, sin, value=-1.0)
        torch.mul(second, cos, out=b).addcmul_(first, sin)
    else:
        a.copy_((first * cos).addcmul_(second, sin, value=-1.0))
        b.copy_((second * cos).addcmul_(first, sin))


def _turn_compiled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x``, [s, b, heads/tp, d], turned by its angles, without a copy of ``x`` first.

    Its rows are seldom contiguous, because queries, keys and values of a token are one product.
    """
    # rows at equal distances
    heads, half = x.size(1) * x.size(2), x.size(3) // 2
    if heads == 1:  # doubled, since a size of 1 needs another graph; one head is a small copy
        x = x.expand(-1, -1, 2, -1)
    rows = x.flatten(0, 2)  # [s * b * heads/tp, d], a view where rows are equally far apart
    if rows.stride(1) != 1 or rows.stride(0) % half:
        rows = rows.contiguous()
    # two flat views
    distance = rows.stride(0)
    extent = (len(rows) - 1) * distance + half
    first, second = (
        rows.as_strided((extent,), (1,), rows.storage_offset() + place) for place in (0, half)
    )
    cos, sin = (table.flatten(0, 2) for table in (cos, sin))
    turned = _turn_rows(first, second, cos, sin, len(rows) // len(cos), distance // half)
    return turned[:, :heads].view(len(cos), x.size(1), -1, 2 * half)


@fused
def _turn_rows(
    first: Tensor, second: Tensor, cos: Tensor, sin: Tensor, rows: int, distance: int
) -> Tensor:
    """Return rows turned by their angles.

    Args:
        first: flat memory that begins with the first half of the first row.
        second: flat memory that begins with the second half of the first row.
        cos: [s, d/2].
        sin: [s, d/2].
        rows: rows of each position of the sequence, b * heads/tp.
        distance: distance from one row to the next, in halves of a row.

    Returns:
        [s, b * heads/tp, 2, d/2].
    """
    a, b = (_apart(half, cos, rows, distance) for half in (first, second))
    cos, sin = cos[:, None], sin[:, None]
    turned = a * cos - b * sin, b * cos + a * sin
    # rounded before stacking: to round afterwards would be another pass
    return torch.stack([half.to(first.dtype) for half in turned], dim=2)


def _apart(half: Tensor, cos: Tensor, rows: int, distance: int) -> Tensor:
    """Return halves of rows, ``distance`` halves apart in memory, as float32 [s, rows, d/2]."""
    tokens, width = cos.shape
    distance = distance * width
    apart = half.as_strided((tokens, rows, width), (rows * distance, distance, 1))
    # first of all operations: any other would make two graphs, contiguous or not
    return apart.clone(memory_format=torch.contiguous_format).float()


def _tokens(x: Tensor) -> Tensor:
    """Return ``x``, [..., width], flattened to [tokens, width]."""
    return x.contiguous().flatten(0, -2)
