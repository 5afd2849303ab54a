"""Compiled functions have one graph each, and compute equal numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megashear.models import cross_entropy, fusion, kernels
from megashear.models.cross_entropy import vocab_parallel_cross_entropy
from megashear.models.fusion import fused
from megashear.parallel import kernel_choice
from tests.compiled import fused_functions, graphs_counted
from tests.ranks import run_ranks
from tests.tiny import relative_error
from tests.unit.models.test_cross_entropy import BFLOAT16, labels, weights, whole_logits
from tests.unit.models.test_cross_entropy import wanted as whole_vocabulary
from tests.unit.models.test_kernels import CASES, FLOAT32, with_gradients, worst


@pytest.fixture
def graphs() -> Iterator[Counter[str]]:
    with graphs_counted() as graphs:
        yield graphs


def test_every_fused_function_is_found() -> None:
    assert {"_activate", "_activation_gradient", "_turn_rows", "_norm"} < fused_functions().keys()
    assert {
        "_fold_matrix",
        "_unfold_matrix",
        "_exponentials",
        "_exponentials_over",
        "_gradient_over",
    } < fused_functions().keys()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_kernels_are_traced_whole_and_compute_the_same(
    graphs: Counter[str], precision: torch.dtype
) -> None:
    for ours, formula, inputs in CASES.values():
        rounded = {name: value.to(precision) for name, value in inputs.items()}
        found = with_gradients(ours, rounded)
        wanted = with_gradients(formula, rounded, torch.float64)
        assert worst(found, wanted) < (FLOAT32 if precision == torch.float32 else 0.01)
    assert graphs.keys() == {
        name for name, (module, _) in fused_functions().items() if module is kernels
    }


@pytest.mark.parametrize("at_once", [None, 30])
def test_cross_entropy_is_traced_whole_and_computes_the_same(
    graphs: Counter[str], at_once: int | None
) -> None:
    for logits, wanted in (
        (whole_logits(), {"_exponentials_over"}),
        (whole_logits().bfloat16(), {"_exponentials", "_gradient_over"}),
    ):

        def body(rank: int) -> tuple[Tensor, Tensor, Counter[str]]:
            if at_once is not None:
                cross_entropy._AT_ONCE = {"cpu": at_once}
            leaf = logits.clone().requires_grad_()  # noqa: B023
            loss = vocab_parallel_cross_entropy(leaf.clone(), labels(), dist.group.WORLD)
            loss.backward(weights())
            assert leaf.grad is not None
            return loss.detach(), leaf.grad, graphs

        [(loss, gradient, called)] = run_ranks(1, body)
        wanted_loss, wanted_gradient = whole_vocabulary(logits)
        assert relative_error(loss, wanted_loss) < FLOAT32
        assert relative_error(gradient, wanted_gradient) < BFLOAT16
        assert called.keys() == wanted


def test_a_function_runs_as_written_until_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda x: ran.append("compiled") or function(x)

    monkeypatch.setattr(torch, "compile", compiler)
    double = fused(lambda x: ran.append("function") or 2 * x)
    monkeypatch.setattr(kernel_choice, "_compiles", False)
    assert double(3) == 6
    kernel_choice.choose_kernels(compiled=True)
    assert double(4) == 8
    assert ran == ["function", "compiled", "function"]


def scale_into(out: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Scale elementwise into an argument, as a fold does."""
    out.copy_(x * rows[:, None] * columns)


def sum_over(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(dim=0), x.sum(dim=1)


SIZES = ((48, 48), (32, 64), (7, 48), (48, 16 * 7), (2, 32))
"""Rows and columns: equal, different, few."""


def call_with_all(
    function: Callable[..., Any], sums: Callable[..., Any], sizes: tuple[tuple[int, int], ...]
) -> None:
    """Call with parameters and other tensors, with and without autograd, and with views."""
    for rows, columns in sizes:
        x, r, c = torch.randn(rows, columns), torch.randn(rows), torch.randn(columns)
        buffer = torch.zeros(3 * x.numel())
        place = x.numel() if rows != 32 else 0
        out = buffer[place : place + x.numel()].view_as(x)
        for each in (x, torch.nn.Parameter(x)):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    function(out, each, r, c)
                    found = sums(each)
        assert torch.allclose(out, x * r[:, None] * c)
        assert torch.count_nonzero(buffer) == torch.count_nonzero(out)  # and nothing beside it
        assert torch.allclose(found[0], x.sum(dim=0), atol=1e-5)
        assert torch.allclose(found[1], x.sum(dim=1), atol=1e-5)


def test_a_function_has_one_graph_for_all_sizes(graphs: Counter[str]) -> None:
    call_with_all(fused(scale_into), fused(sum_over), SIZES)
    assert graphs == {"scale_into": 1, "sum_over": 1}


def test_a_thread_of_autograd_makes_no_more_graphs(graphs: Counter[str]) -> None:
    function = fused(scale_into)

    def call(dtype: torch.dtype) -> None:
        for rows, columns in ((48, 48), (32, 64), (64, 32)):
            x = torch.randn(rows, columns, dtype=dtype)
            function(torch.empty_like(x), x, torch.randn(rows), torch.randn(columns))

    call(torch.float32)
    with ThreadPoolExecutor(1) as thread:  # as backward passes on a GPU
        thread.submit(call, torch.bfloat16).result()
    assert graphs == {"scale_into": 2}  # one for each precision


def test_what_is_left_to_torch_has_many(graphs: Counter[str]) -> None:
    with mock.patch.object(fusion, "_tile", lambda x: x):
        call_with_all(fused(scale_into), fused(sum_over), SIZES)
    assert min(graphs.values()) > 1


def test_rows_that_16_does_not_divide_have_a_graph_of_their_own(graphs: Counter[str]) -> None:
    call_with_all(fused(scale_into), fused(sum_over), (*SIZES, (48, 40), (6, 20)))
    assert graphs == {"scale_into": 2, "sum_over": 2}


def test_a_function_that_torch_stops_compiling_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "megashear")
    function, sums = fused(scale_into), fused(sum_over)
    inputs = [torch.randn(3, 32), torch.randn(3, 32), torch.randn(3), torch.randn(32)]
    with torch._dynamo.config.patch(recompile_limit=1), graphs_counted(fullgraph=False):
        for dtype in (torch.float32, torch.float64):
            assert not caplog.records  # one precision is within the limit
            out, *others = (x.to(dtype) for x in inputs)
            for _ in range(2):
                function(out, *others)
                sums(others[0].float())
            assert torch.equal(out, others[0] * others[1][:, None] * others[2])
    [record] = caplog.records
    assert "scale_into has more graphs than the 1" in record.getMessage()
    assert "please report it" in record.getMessage()
