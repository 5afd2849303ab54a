"""Functions that a GPU runs compiled: one graph each, and the same numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megashear.models import cross_entropy, fold, kernels
from megashear.models.cross_entropy import vocab_parallel_cross_entropy
from megashear.models.fusion import fused
from megashear.parallel import device
from tests.ranks import run_ranks
from tests.tiny import relative_error
from tests.unit.models.test_cross_entropy import BFLOAT16, labels, weights, whole_logits
from tests.unit.models.test_cross_entropy import wanted as whole_vocabulary
from tests.unit.models.test_kernels import CASES, FLOAT32, with_gradients, worst

MODULES = (kernels, cross_entropy, fold)
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

        def run(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return compiled(*args, **kwargs)

        return run

    for name, (module, function) in FUSED.items():
        monkeypatch.setattr(module, name, traced(name, function))
    yield called
    torch.compiler.reset()


def test_every_fused_function_is_found() -> None:
    assert {"_activate", "_activation_gradient", "_turn_into"} < FUSED.keys()
    assert {
        "_exponentials",
        "_exponentials_over",
        "_gradient_over",
    } < FUSED.keys()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_kernels_are_traced_whole_and_compute_the_same(
    in_one_graph: set[str], precision: torch.dtype
) -> None:
    for ours, formula, inputs in CASES.values():
        rounded = {name: value.to(precision) for name, value in inputs.items()}
        found = with_gradients(ours, rounded)
        wanted = with_gradients(formula, rounded, torch.float64)
        assert worst(found, wanted) < (FLOAT32 if precision == torch.float32 else 0.01)
    assert in_one_graph == {name for name, (module, _) in FUSED.items() if module is kernels}


@pytest.mark.parametrize("at_once", [None, 30])
def test_cross_entropy_is_traced_whole_and_computes_the_same(
    in_one_graph: set[str], at_once: int | None
) -> None:
    for logits, wanted in (
        (whole_logits(), {"_exponentials_over"}),
        (whole_logits().bfloat16(), {"_exponentials", "_gradient_over"}),
    ):

        def body(rank: int) -> tuple[Tensor, Tensor, set[str]]:
            if at_once is not None:
                cross_entropy._AT_ONCE = {"cpu": at_once}
            leaf = logits.clone().requires_grad_()  # noqa: B023
            loss = vocab_parallel_cross_entropy(leaf.clone(), labels(), dist.group.WORLD)
            loss.backward(weights())
            assert leaf.grad is not None
            return loss.detach(), leaf.grad, in_one_graph

        [(loss, gradient, called)] = run_ranks(1, body)
        wanted_loss, wanted_gradient = whole_vocabulary(logits)
        assert relative_error(loss, wanted_loss) < FLOAT32
        assert relative_error(gradient, wanted_gradient) < BFLOAT16
        assert called == wanted


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
