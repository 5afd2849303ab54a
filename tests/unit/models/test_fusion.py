"""Functions that a GPU runs compiled: one graph each, and the same numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megashear.models import cross_entropy, kernels
from megashear.models.fusion import fused
from megashear.parallel import device
from tests.unit.models import test_cross_entropy
from tests.unit.models.test_kernels import CASES, FLOAT32, with_gradients, worst

MODULES = (kernels, cross_entropy)
FUSED = {
    name: (module, value)
    for module in MODULES
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__code__ is fused(len).__code__
}


@pytest.fixture
def in_one_graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Have every fused function traced as for a GPU, whole, and run by torch's operators; the names
    of those that were called."""
    called: set[str] = set()

    def traced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # what torch.compile does before it makes kernels: a function that it cannot trace whole, or
        # whose writes to views and arguments it gets wrong, shows here; no compiler is needed
        compiled = torch.compile(inspect.unwrap(function), backend="aot_eager", fullgraph=True)

        def run(*args: Any) -> Any:
            called.add(name)
            return compiled(*args)

        return run

    for name, (module, function) in FUSED.items():
        monkeypatch.setattr(module, name, traced(name, function))
    yield called
    torch.compiler.reset()


def test_every_fused_function_is_found() -> None:
    assert {"_activate", "_activation_gradients", "_turn_into", "_gate_units"} < FUSED.keys()
    assert {
        "_output_gradients",
        "_exponentials",
        "_exponentials_over",
        "_gradient_over",
    } < FUSED.keys()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_kernels_are_traced_whole_and_compute_the_same(
    in_one_graph: set[str], precision: torch.dtype
) -> None:
    for ours, formula, inputs in CASES.values():
        rounded = {
            name: value if name in ("units", "outputs") else value.to(precision)
            for name, value in inputs.items()
        }
        found = with_gradients(ours, rounded)
        wanted = with_gradients(formula, rounded, torch.float64)
        assert worst(found, wanted) < (FLOAT32 if precision == torch.float32 else 0.01)
    assert in_one_graph >= {name for name, (module, _) in FUSED.items() if module is kernels}


def test_cross_entropy_is_traced_whole_and_computes_the_same(in_one_graph: set[str]) -> None:
    test_cross_entropy.test_loss_and_gradient_are_those_of_the_whole_vocabulary(1, None)
    test_cross_entropy.test_bfloat16_is_rounded_once(1)


def test_a_function_runs_as_written_until_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: ran.append("compiled") or function(x)

    monkeypatch.setattr(torch, "compile", compiler)
    double = fused(lambda x: ran.append("function") or 2 * x)
    monkeypatch.setattr(device, "_compiles", False)
    assert double(3) == 6
    device.choose_kernels(compiled=True)
    assert double(4) == 8
    assert ran == ["function", "compiled", "function"]
