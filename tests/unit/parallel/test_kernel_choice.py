"""Kernels are chosen by trying them."""

import re
from typing import Any

import pytest
import torch

from megashear.parallel import device, kernel_choice

WITHOUT_CUDA = pytest.mark.skipif(device.has_cuda(), reason="there is a CUDA device")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_what_is_there(precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(6, n, generator=generator).to(precision) for n in (5, 4))
    before = torch.randn(5, 4, generator=generator)
    total = before.clone()
    kernel_choice.add_product(total, left, right)
    wanted = left.double().T @ right.double()
    tolerance = 1e-6 if precision == torch.float32 else 2**-8  # of sums over 6 rounded products
    assert (total - before - wanted).abs().max() < tolerance * wanted.abs().max()
    kernel_choice.add_product(total, left, right)
    assert (total - before - 2 * wanted).abs().max() < 2 * tolerance * wanted.abs().max()


def test_a_gpu_that_cannot_add_a_wider_product_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def adds(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **_: Any) -> None:
        total.add_(left @ right)

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented for this dtype")

    def overwrites(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **_: Any) -> None:
        total.copy_(left @ right)

    for addmm, answer in ((adds, True), (refuses, False), (overwrites, False)):
        monkeypatch.setattr(torch, "addmm", addmm)
        assert kernel_choice._adds_wider.__wrapped__(torch.float32) is answer


def raising(error: Exception) -> Any:
    def compiler(function: Any) -> Any:
        def run(*_: Any) -> None:
            raise error

        return run

    return compiler


@pytest.mark.parametrize(
    ("compiler", "obstacle"),
    [
        (lambda function: lambda x: (x + x, True), None),
        (lambda function: lambda x: (x, True), "wrongly"),
        (lambda function: function, "switched off.*TORCH_COMPILE_DISABLE=1"),
        (raising(RuntimeError("no C compiler found")), "RuntimeError: no C compiler found"),
        (raising(PermissionError("/cache")), "PermissionError: /cache"),
    ],
)
def test_a_compiler_that_does_not_work_is_found_out(
    monkeypatch: pytest.MonkeyPatch, compiler: Any, obstacle: str | None
) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", compiler)
    found = kernel_choice.compile_obstacle()
    assert found is None if obstacle is None else re.search(obstacle, found or "")


@WITHOUT_CUDA
def test_on_a_cpu_nothing_is_compiled() -> None:
    assert kernel_choice.compile_obstacle() == "no CUDA device"
