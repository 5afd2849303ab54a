"""Parts of a layer that are one node of autograd, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from megashear.models import kernels

FLOAT32 = 2e-6
"""Relative, against float64: some tens of roundings at 6e-8; measured up to 4e-7."""
BFLOAT16 = 0.01
"""Relative: inputs are the same, a result is rounded once at 2^-9, and sums over tokens take
rounded products; measured up to 0.004."""
TOKENS, HIDDEN, NEURONS = (5, 3), 40, 24
CUT = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
"""Relative, of a norm over open dimensions against that of the cut: the float32 sum of squares is
added in another order. Measured 6e-8; rounded to bfloat16 0 here, 1.5e-5 at 4,096 dimensions, where
few of the results move by one place."""
EPS = 0.05  # beside activations of about 1: a wrong eps must show

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]


def random(*extents: int, seed: int) -> Tensor:
    return torch.randn(extents, generator=torch.Generator().manual_seed(seed))


def gates(size: int, seed: int) -> Tensor:
    """Return gates between 0 and 1, a third of them exactly 0."""
    z = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    z[::3] = 0.0
    return z


def written_out_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def written_out_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def written_out_open_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return the norm with the mean square of open dimensions alone."""
    mean = x[..., OPENED].square().sum(dim=-1, keepdim=True) / len(OPENED)
    return x / (mean + EPS).sqrt() * weight


def open_norm(x: Tensor, weight: Tensor, num_open: float | None = None) -> Tensor:
    count = torch.tensor(float(len(OPENED)) if num_open is None else num_open)
    return kernels.rms_norm(x, weight, EPS, count)


def written_out_rotation(x: Tensor) -> Tensor:
    """Return the rotation, by complex numbers."""
    angles = angles_of(x).double()
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def angles_of(x: Tensor) -> Tensor:
    return random(x.size(0), 1, 1, x.size(-1) // 2, seed=9)


def rotation(x: Tensor) -> Tensor:
    return kernels.rotate(x, angles_of(x).cos(), angles_of(x).sin())


NEURON_INPUT = {"x": random(*TOKENS, 2 * NEURONS, seed=1)}
NORM_INPUT = {"x": random(*TOKENS, HIDDEN, seed=2), "weight": random(HIDDEN, seed=3) + 1.0}
OPENED = gates(HIDDEN, 10).nonzero().flatten()
OPEN_INPUT = NORM_INPUT | {"x": torch.zeros(*TOKENS, HIDDEN)}
OPEN_INPUT["x"][..., OPENED] = NORM_INPUT["x"][..., OPENED]
HEADS = {"x": random(5, 3, 4, 8, seed=6)}

CASES = {
    "swiglu": (kernels.swiglu, written_out_swiglu, NEURON_INPUT),
    "norm": (lambda x, weight: kernels.rms_norm(x, weight, EPS), written_out_norm, NORM_INPUT),
    "norm of open dimensions": (open_norm, written_out_open_norm, OPEN_INPUT),
    "rotation": (rotation, written_out_rotation, HEADS),
}


def with_gradients(function: Function, inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Return the output, and each input's gradient for a fixed gradient of the output."""
    leaves = {
        name: (value if dtype is None else value.to(dtype)).clone().requires_grad_()
        for name, value in inputs.items()
    }
    output = function(**leaves)
    output.backward(random(*output.shape, seed=11).to(output.dtype))
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        found[name] = leaf.grad
    return found


def worst(found: Inputs, wanted: Inputs) -> float:
    # torch's maximum: Python's passes over a NaN
    return float(
        torch.stack(
            [
                (found[name].double() - tensor).norm() / tensor.norm()
                for name, tensor in wanted.items()
            ]
        ).max()
    )


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_formula(case: str) -> None:
    ours, formula, inputs = CASES[case]
    wanted = with_gradients(formula, inputs, torch.float64)
    assert worst(with_gradients(ours, inputs), wanted) < FLOAT32


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_rounded_about_once(case: str) -> None:
    ours, formula, inputs = CASES[case]
    rounded = {name: value.bfloat16() for name, value in inputs.items()}
    found = with_gradients(ours, rounded)
    wanted = with_gradients(formula, rounded, torch.float64)
    assert found["output"].dtype == torch.bfloat16
    assert worst(found, wanted) < BFLOAT16


BREAKAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "up before gate": ("swiglu", {"x": NEURON_INPUT["x"].roll(NEURONS, -1)}),
    "another weight": ("norm", {"weight": NORM_INPUT["weight"].roll(1)}),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_broken_is_noticed(breakage: str) -> None:
    case, broken = BREAKAGES[breakage]
    ours, formula, inputs = CASES[case]
    wanted = with_gradients(formula, inputs, torch.float64)
    assert worst(with_gradients(ours, inputs | broken), wanted) > 100 * FLOAT32


@pytest.mark.parametrize("name", ["output", "x", "weight"])
def test_one_nan_is_noticed(name: str) -> None:
    ours, formula, inputs = CASES["norm"]
    wanted = with_gradients(formula, inputs, torch.float64)
    found = with_gradients(ours, inputs)
    found[name].view(-1)[-1] = float("nan")
    assert not worst(found, wanted) < FLOAT32


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_on_cuda_a_norm_over_all_dimensions_is_torchs(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    real = torch.nn.functional.rms_norm

    def note(x: Tensor, extents: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
        seen.append((x.dtype, weight.dtype))
        return real(x, extents, weight, eps)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", note)
    for place in ("cuda", "cpu"):
        with FakeTensorMode(), torch.no_grad():  # a GPU's tensors without their memory
            x = torch.empty(*TOKENS, HIDDEN, dtype=precision, device=place)
            weight = torch.empty(HIDDEN, dtype=precision, device=place)
            for num_open in (None, torch.empty((), device=place)):
                y = kernels.rms_norm(x, weight, EPS, num_open)
                assert (y.dtype, y.device.type) == (precision, place)
    assert seen == [(precision, precision)]  # and over open dimensions, and on a CPU, never


def test_a_norm_over_all_dimensions_has_the_bits_of_torchs() -> None:
    x, weight = NORM_INPUT.values()
    wanted = torch.nn.functional.rms_norm(x, (HIDDEN,), weight, EPS)
    assert torch.equal(kernels.rms_norm(x, weight, EPS), wanted)
    assert torch.equal(kernels.rms_norm(x, weight, EPS, torch.tensor(float(HIDDEN))), wanted)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_nobody_waits_for_the_number_of_open_dimensions(precision: torch.dtype) -> None:
    with FakeTensorMode():  # whose tensors have no values: reading one is an error
        count = torch.empty(())
        x = torch.empty(*TOKENS, HIDDEN, dtype=precision, requires_grad=True)
        weight = torch.empty(HIDDEN, dtype=precision, requires_grad=True)
        y = kernels.rms_norm(x, weight, EPS, count)
        y.backward(torch.empty_like(y))
        assert y.dtype == precision
        with pytest.raises(DataDependentOutputException):  # the twin
            count.item()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_norm_of_open_dimensions_is_that_of_the_cut_model(precision: torch.dtype) -> None:
    inputs = {name: value.to(precision) for name, value in OPEN_INPUT.items()}
    cut = {name: value[..., OPENED].contiguous() for name, value in inputs.items()}
    upstream = random(*TOKENS, HIDDEN, seed=11)

    def run(function: Function, inputs: Inputs, dy: Tensor) -> Inputs:
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        output = function(**leaves)
        output.backward(dy.to(precision))
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"output": output.detach()} | gradients

    def masked(num_open: int) -> Inputs:
        found = run(lambda x, weight: open_norm(x, weight, num_open), inputs, upstream)
        assert torch.count_nonzero(found["output"]) == torch.count_nonzero(
            found["output"][..., OPENED]
        )
        return {name: value[..., OPENED] for name, value in found.items()}

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.rms_norm(x, weight, EPS)

    wanted = run(plain, cut, upstream[..., OPENED])
    assert worst(masked(len(OPENED)), wanted) < CUT[precision]
    assert worst(masked(HIDDEN), wanted) > 100 * CUT[precision]  # the twin: the mean over all


def test_the_twin_of_a_rotation_is_noticed() -> None:
    def backwards(x: Tensor) -> Tensor:
        return kernels.rotate(x, angles_of(x).cos(), -angles_of(x).sin())

    wanted = with_gradients(written_out_rotation, HEADS, torch.float64)
    assert worst(with_gradients(backwards, HEADS), wanted) > 100 * FLOAT32


@pytest.mark.parametrize("case", CASES)
def test_inputs_alone_are_kept_for_the_backward_pass(case: str) -> None:
    ours, formula, inputs = CASES[case]

    def kept(function: Function) -> int:
        """Return the elements of activation size that are kept besides inputs."""
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        known = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
        found: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = function(**leaves)
        smallest = output.numel() // 2
        return sum(
            tensor.numel()
            for place, tensor in found.items()
            if place not in known and tensor.numel() >= smallest
        )

    assert kept(ours) == 0
    assert kept(formula) > 0  # and autograd's own nodes do keep more
