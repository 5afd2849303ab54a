"""Elementwise functions in few kernels on a GPU, by torch.compile; on a CPU they run as written."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from megashear.parallel import kernel_choice

P = ParamSpec("P")
T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_TILE = 16
"""Numbers by which the length of a row is known to be divisible. A GPU's thread reads 8 numbers at
once where Triton knows that they begin at a multiple of 16."""


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Return ``function``, compiled where `kernel_choice.compiles_kernels` says so.

    Each of torch's operators reads and writes all of its tensors. On a GPU, where products are
    fast, a chain of operators takes as long as several products. Compiled it is one pass, and one
    more for a sum over tokens. On a CPU the chain takes little time beside the products, and there
    may be no compiler.

    torch.compile makes another graph for everything that differs between calls and was not declared
    to differ, up to `torch._dynamo.config.recompile_limit`, which is 8. After that the function
    runs as it is written, and the log reports it. Here everything that differs within a run is
    declared, so a function has one graph for each precision, before and after the cut. (Rows whose
    length is not divisible by 16 have another one: without tiles each number would be found by a
    division, and read and written alone.)

    Args:
        function: a function of tensors, integers and floats, given by position, that returns new
            tensors or writes to its arguments. Its steps depend on no values. It sees and makes no
            gradients. Its arguments must not differ in a way that needs another graph: tensors are
            contiguous and keep their number of dimensions, tokens are one dimension (a microbatch
            of one sequence would have a size of 1), no size or integer is 1 in some calls only, a
            float is the same in all calls, and no argument is None.
    """

    def traced(*args: Any) -> T:
        if not torch.compiler.is_compiling():
            complain()
        return function(*map(_untile, args))  # type: ignore[call-arg]

    # torch counts graphs by code object, which all calls of `fused` would otherwise share
    traced.__code__ = traced.__code__.replace(co_name=function.__name__)

    @functools.cache
    def compiled() -> Callable[..., T]:
        return torch.compile(traced, dynamic=True, options=_options())

    @functools.cache
    def complain() -> None:
        _LOG.error(
            "%s has more graphs than the %d that torch.compile makes of a function, and runs as "
            "single operators from now on: right, but slower. This is a defect of megashear: "
            "please report it, with the command and TORCH_LOGS=recompiles",
            function.__name__,
            torch._dynamo.config.recompile_limit,
        )

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        assert not kwargs, "arguments are given by position"
        with torch.no_grad():
            if kernel_choice.compiles_kernels():
                # Sizes that are equal in the first call may differ in others. Set in every call,
                # because each thread has its own settings, and autograd has a thread.
                torch.fx.experimental._config.use_duck_shape = False
                return compiled()(*map(_tile, args))
            return function(*args, **kwargs)

    return run


def _options() -> dict[str, Any]:
    """Return options of inductor: sizes must not decide which sums are one pass."""
    from torch._inductor import config

    wanted = {"triton.mix_order_reduction": False}
    return {name: value for name, value in wanted.items() if name in config.get_config_copy()}


def _tile(x: Any) -> Any:
    """Return a tensor as torch.compile gets it: sizes may differ, rows are tiles."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    if x.storage_offset():
        # as memory of its own: an offset into other memory is part of the graph, and 0 is another
        x = from_dlpack(to_dlpack(x))
    if x.dim() > 1 and x.size(-1) % _TILE == 0:
        x = x.unflatten(-1, (-1, _TILE))
        torch._dynamo.mark_static(x, x.dim() - 1)
    return x


def _untile(x: Any) -> Any:
    is_tiled = isinstance(x, Tensor) and x.dim() > 2 and x.size(-1) == _TILE
    return x.flatten(-2) if is_tiled else x
