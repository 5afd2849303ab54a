"""Fused functions compiled anew, their graphs counted, without a GPU and without a compiler."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch._dynamo.backends.registry import lookup_backend

from megashear.models import cross_entropy, fold, kernels
from megashear.models.fusion import fused
from megashear.parallel import kernel_choice

MODULES = (kernels, cross_entropy, fold)
"""Where fused functions are."""


def fused_functions() -> dict[str, tuple[ModuleType, Callable[..., Any]]]:
    """Every fused function by name, with its module."""
    return {
        name: (module, value)
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__code__ is fused(len).__code__
    }


@contextmanager
def graphs_counted(backend: str = "aot_eager", *, fullgraph: bool = True) -> Iterator[Counter[str]]:
    """Compile fused functions as for a GPU and count the graphs of each by its name.

    torch traces them as it does before it makes kernels; ``backend`` then runs torch's operators. A
    function whose writes to views and arguments torch gets wrong shows here.

    Args:
        backend: any of torch's.
        fullgraph: whether a function that cannot be traced whole, or has too many graphs, is an
            error.
    """
    graphs: Counter[str] = Counter()
    real = torch.compile

    def compiler(function: Callable[..., Any], *, dynamic: bool, options: Any) -> Any:
        def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs[function.__code__.co_name] += 1
            return lookup_backend(backend)(graph, inputs)

        return real(function, backend=counted, dynamic=dynamic, fullgraph=fullgraph)

    with (
        mock.patch.object(torch, "compile", compiler),
        mock.patch.object(kernel_choice, "_compiles", True),
    ):
        originals = fused_functions()
        for name, (module, function) in originals.items():
            setattr(module, name, fused(inspect.unwrap(function)))
        try:
            yield graphs
        finally:
            for name, (module, function) in originals.items():
                setattr(module, name, function)
            torch.compiler.reset()
