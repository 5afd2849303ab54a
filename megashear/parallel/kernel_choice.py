"""Which kernels this process runs: compiled or not, deterministic or not."""

from __future__ import annotations

import functools
import os
import subprocess

import torch

from megashear.parallel import device

_compiles = False
"""What `choose_kernels` was last given: a state of the process."""


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left.T @ right to ``total``, without a copy of the product where a kernel can do that.

    Args:
        total: [m, n], in the precision of the factors or in float32.
        left: [tokens, m].
        right: [tokens, n].
    """
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif total.is_cuda and _adds_wider(left.dtype):
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left.t() @ right)


@functools.cache
def _adds_wider(factors: torch.dtype) -> bool:
    """Return whether this GPU and torch add a product of ``factors`` correctly to a float32 total.

    The answer comes from trying: no documentation says which devices and versions of torch can.
    """
    left, right = (torch.eye(16, device=device.device(), dtype=factors) for _ in range(2))
    total = torch.ones(16, 16, device=device.device())
    try:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # no such kernel; no such argument
        return False
    return torch.equal(total, 1.0 + torch.eye(16, device=device.device()))


def compiles_kernels() -> bool:
    """Return whether this process runs elementwise functions compiled, see `choose_kernels`."""
    return _compiles


def compile_obstacle() -> str | None:
    """Return why torch.compile makes no kernels for this process, or None where it does.

    The answer comes from compiling a tiny kernel: torch.compile needs a GPU, Triton, a C compiler
    and a folder to write to, and reports what is missing only when it is used.
    """
    if not device.has_cuda():
        return "no CUDA device"

    def double(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return x + x, torch.compiler.is_compiling()

    try:
        two, was_compiled = torch.compile(double)(torch.ones(2, device=device.device()))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    if not was_compiled:
        return "it is switched off, as by TORCH_COMPILE_DISABLE=1"
    return None if two.eq(2).all() else "it computes 1 + 1 wrongly"


def choose_kernels(*, compiled: bool) -> None:
    """Set whether this process runs elementwise functions compiled.

    All ranks must choose alike, because copies that they compute must stay bit-equal.
    """
    global _compiles
    _compiles = compiled


def use_deterministic_kernels() -> None:
    """Choose deterministic kernels, for runs that must repeat bit for bit on a GPU."""
    # cuBLAS is deterministic only with a workspace of fixed size, which is read when CUDA starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Transformer Engine refuses its own kernels that are not deterministic; NCCL may choose
    # another order of sums at each start
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
