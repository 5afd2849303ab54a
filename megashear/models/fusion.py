"""Elementwise functions as few kernels on a GPU, by torch.compile; as they are written on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from megashear.parallel import device

P = ParamSpec("P")
T = TypeVar("T")


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Have ``function`` compiled where `device.compiles_kernels` says so.

    Each of torch's operators reads and writes all of its tensors, so on a GPU, whose products are
    fast, a chain of them takes as long as several products; compiled it is one pass, and one more
    for a sum over tokens. On a CPU the chain is short beside the products, and a compiler need not
    be there.

    Args:
        function: of tensors, without control flow that depends on their values; may write to its
            arguments.
    """
    compiled = torch.compile(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        chosen = compiled if device.compiles_kernels() else function
        return chosen(*args, **kwargs)

    return run
