"""Elementwise functions as few kernels on a GPU, by torch.compile; as they are written on a CPU."""

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
"""Numbers beside each other that the compiler may count on in every row. A GPU's thread reads 8 of
them at once, where Triton knows that what it reads begins at a multiple of 16."""


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Have ``function`` compiled, once, where `kernel_choice.compiles_kernels` says so.

    Each of torch's operators reads and writes all of its tensors, so on a GPU, whose products are
    fast, a chain of them takes as long as several products; compiled it is one pass, and one more
    for a sum over tokens. On a CPU the chain is short beside the products, and a compiler need not
    be there.

    torch.compile makes another graph for whatever differs from call to call and was not left open,
    and none beyond `torch._dynamo.config.recompile_limit`, which is 8: from there on the function
    runs as it is written, which the log reports. Here all is left open that differs in a run: a
    function has one graph for each precision, before and after the cut. (Rows whose length 16 does
    not divide have one of their own: without tiles each number would be found by a division, and
    read and written alone.)

    Args:
        function: of tensors, integers and numbers, given by place; returns new tensors or writes to
            its arguments. Nothing in it depends on values. It sees no gradients and makes none,
            which is left to another function. What would make a second graph is kept out of its
            arguments: tensors are contiguous and keep their number of dimensions, tokens are one
            dimension (a microbatch of one sequence would be a size of 1), no size or integer is 1
            in some calls, a number that is no integer is the same in all, and None stands for
            nothing.
    """

    def traced(*args: Any) -> T:
        if not torch.compiler.is_compiling():
            complain()
        return function(*map(_untile, args))  # type: ignore[call-arg]

    # torch counts graphs by code, which the functions of all calls of `fused` would share
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
        assert not kwargs, "arguments are given by place"
        with torch.no_grad():
            if kernel_choice.compiles_kernels():
                # sizes that are equal in the first call are not equal in all; set in every call, as
                # each thread has settings of its own, and autograd one for the backward pass
                torch.fx.experimental._config.use_duck_shape = False
                return compiled()(*map(_tile, args))
            return function(*args, **kwargs)

    return run


def _options() -> dict[str, Any]:
    """Return what inductor is told: not to let sizes decide which sums are one pass."""
    from torch._inductor import config

    wanted = {"triton.mix_order_reduction": False}
    return {name: value for name, value in wanted.items() if name in config.get_config_copy()}


def _tile(x: Any) -> Any:
    """Return a tensor as torch.compile is to see it: sizes are open, rows are tiles."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    if x.storage_offset():
        # as memory of its own: where it begins in a larger one is in the graph, and 0 another graph
        x = from_dlpack(to_dlpack(x))
    if x.dim() > 1 and x.size(-1) % _TILE == 0:
        x = x.unflatten(-1, (-1, _TILE))
        torch._dynamo.mark_static(x, x.dim() - 1)
    return x


def _untile(x: Any) -> Any:
    is_tiled = isinstance(x, Tensor) and x.dim() > 2 and x.size(-1) == _TILE
    return x.flatten(-2) if is_tiled else x
