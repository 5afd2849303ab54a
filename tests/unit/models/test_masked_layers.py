"""Masked layers against their formulas written out, and their plain selves without gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megashear.models.masked_layers import (
    EmbeddingGate,
    LayerGates,
    MaskedRMSNorm,
    MaskedRowParallelLinear,
    NormGates,
    StreamGates,
    head_gates,
    norm_gates,
)
from megashear.parallel.groups import ParallelGroups
from tests.ranks import run_ranks
from tests.tiny import layout, relative_error

FLOAT32 = 2e-6
"""Relative, against float64: some tens of roundings at 6e-8; measured up to 9e-8."""
HIDDEN, UNITS, WIDTH = 40, 8, 3
EPS = 0.05  # beside activations of about 1: a wrong eps must show


def config(dtype: torch.dtype = torch.float32, tp: int = 1) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=UNITS,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
    )


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gates(size: int, seed: int) -> Tensor:
    """Between 0 and 1, a third of them exactly 0."""
    z = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    z[::3] = 0.0
    return z


# --- norm


def norm_inputs() -> dict[str, Tensor]:
    z = gates(HIDDEN, 1)
    x = random(5, 2, HIDDEN, seed=2) * (z != 0)  # the stream is 0 where it is closed
    return {"x": x, "weight": random(HIDDEN, seed=3) + 1.0, "z": z}


def masked_norm(inputs: dict[str, Tensor], **broken: float) -> dict[str, Tensor]:
    """Output and gradients of MaskedRMSNorm."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    norm = MaskedRMSNorm(config(), HIDDEN, eps=broken.get("eps", EPS))
    norm.weight = torch.nn.Parameter(leaves["weight"].detach().clone())
    norm.gates = NormGates(
        leaves["z"], int(broken.get("num_open", torch.count_nonzero(inputs["z"])))
    )
    output = norm(leaves["x"])
    (output * random(*output.shape, seed=4)).sum().backward()
    assert leaves["x"].grad is not None
    assert leaves["z"].grad is not None
    assert norm.weight.grad is not None
    return {
        "output": output.detach(),
        "x": leaves["x"].grad,
        "z": leaves["z"].grad,
        "weight": norm.weight.grad,
    }


def written_out_norm(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean square over the open dimensions only, gathered; then weight and gate; float64."""
    leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
    opened = inputs["z"] != 0
    x = leaves["x"][..., opened]
    scale = (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    output = torch.zeros_like(leaves["x"])
    output[..., opened] = x * scale * (leaves["weight"] * leaves["z"])[opened]
    (output * random(*output.shape, seed=4).double()).sum().backward()
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        found[name] = leaf.grad
    return found


def test_masked_norm_is_the_norm_over_open_dimensions_gradients_included() -> None:
    inputs = norm_inputs()
    ours, wanted = masked_norm(inputs), written_out_norm(inputs)
    for name in wanted:
        assert relative_error(ours[name], wanted[name]) < FLOAT32, name
    closed = inputs["z"] == 0
    for name in ("output", "x", "z", "weight"):
        assert not ours[name][..., closed].any(), name


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"num_open": HIDDEN}, id="mean-over-all"),
        pytest.param({"eps": EPS * HIDDEN / 26}, id="eps-of-all"),  # 26 of 40 are open
    ],
)
def test_norm_parity_notices(broken: dict[str, float]) -> None:
    inputs = norm_inputs()
    assert int(torch.count_nonzero(inputs["z"])) == 26
    ours, wanted = masked_norm(inputs, **broken), written_out_norm(inputs)
    for name in wanted:
        assert relative_error(ours[name], wanted[name]) > 1e-3, name


def test_norm_without_gates_is_the_plain_norm() -> None:
    norm, x = MaskedRMSNorm(config(), HIDDEN, eps=EPS), random(5, 2, HIDDEN)
    plain = torch.nn.functional.rms_norm(x, (HIDDEN,), norm.weight, EPS)
    assert torch.equal(norm(x), plain)
    norm.gates = NormGates(torch.ones(HIDDEN), HIDDEN)
    assert (
        relative_error(norm(x).detach(), plain.detach()) < FLOAT32
    )  # and open gates change nothing


def test_norms_are_not_gated_where_hidden_is_not_pruned() -> None:
    none = StreamGates(**dict.fromkeys(StreamGates._fields))  # type: ignore[arg-type]
    assert norm_gates(none) is None
    z = torch.ones(3)
    assert norm_gates(none._replace(hidden=z, num_open_hidden=2)) == NormGates(z, 2)


# --- heads and groups


def test_heads_in_groups_are_gated_in_megatrons_order() -> None:
    heads, groups = gates(12, 5).view(3, 4), torch.tensor([0.5, 0.0, 2.0])
    found = head_gates(heads, groups)
    assert found is not None
    assert found.tolist() == [
        float(heads[group, head] * groups[group]) for group in range(3) for head in range(4)
    ]
    assert not torch.equal(found, (heads * groups[:, None]).T.flatten())  # the twin: transposed
    in_groups = head_gates(heads, None)
    assert in_groups is not None
    assert torch.equal(in_groups, heads.flatten())
    for alone in (groups, None):
        assert head_gates(None, alone) is alone
    flat = head_gates(heads[0], None)  # without grouped queries
    assert flat is not None
    assert torch.equal(flat, heads[0])


# --- row-parallel linear


def linear(kind: type[Any], tp: int = 1, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """This rank's part of one and the same linear, whatever its class."""
    groups = ParallelGroups.create(layout(tp=tp))
    torch.manual_seed(3)
    options = {"bias": False, "skip_bias_add": True} | more
    built = kind(
        UNITS * WIDTH,
        HIDDEN,
        config=config(dtype, tp),
        init_method=torch.nn.init.normal_,
        input_is_parallel=True,
        tp_group=groups.tensor,
        **options,
    )
    groups.destroy()
    if built.bias is not None:
        torch.nn.init.normal_(built.bias)
    return built


def layer_gates() -> LayerGates:
    return LayerGates(gates(UNITS, 5), gates(HIDDEN, 6), torch.tensor(0.7))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_linear_without_gates_is_row_parallel_linear_bit_by_bit(
    bias: bool, skip_bias_add: bool
) -> None:
    def body(rank: int) -> None:
        results = []
        for kind in (RowParallelLinear, MaskedRowParallelLinear):
            built = linear(kind, tp=2, bias=bias, skip_bias_add=skip_bias_add)
            x = random(5, 2, UNITS * WIDTH // 2, seed=rank).requires_grad_()
            y, returned = built(x)
            y.square().sum().backward()
            assert (returned is not None) == (bias and skip_bias_add)
            results.append([y, returned, x.grad, built.weight.grad, list(built.state_dict())])
        for plain, masked in zip(*results):
            assert (
                plain == masked
                if isinstance(plain, (list, type(None)))
                else torch.equal(plain, masked)
            )

    run_ranks(2, body)


@pytest.mark.parametrize("tp", [1, 2])
def test_gated_linear_is_the_formula_written_out(tp: int) -> None:
    whole = random(5, 2, UNITS * WIDTH, seed=9)

    def body(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        built = linear(MaskedRowParallelLinear, tp=tp, bias=True)
        every = layer_gates()
        assert every.units is not None
        built.gates = every._replace(units=every.units.chunk(tp)[rank])
        y, bias = built(whole.chunk(tp, dim=-1)[rank])
        return (
            y.detach(),
            bias.detach(),
            torch.cat([built.weight.detach(), built.bias.detach()[:, None]], 1),
        )

    ranks = run_ranks(tp, body)
    units, hidden, layer = (gate.double() for gate in layer_gates() if gate is not None)
    weight = torch.cat([held[:, :-1] for _, _, held in ranks], dim=1).double()
    output = hidden * layer
    gated = whole.double() * units.repeat_interleave(WIDTH)
    for y, bias, held in ranks:
        assert relative_error(y, gated @ weight.T * output) < FLOAT32
        assert relative_error(bias, held[:, -1].double() * output) < FLOAT32
        # the twin: units interleaved instead of side by side is another product
        assert relative_error(y, whole.double() * units.repeat(WIDTH) @ weight.T * output) > 0.1


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_biases_do_not_leak_into_closed_dimensions(skip_bias_add: bool) -> None:
    # or the norm's identity breaks: it holds only if the stream is exactly 0 there
    def body(rank: int) -> tuple[Tensor, Tensor | None, Tensor]:
        built = linear(MaskedRowParallelLinear, bias=True, skip_bias_add=skip_bias_add)
        built.gates = layer_gates()
        y, bias = built(random(5, 2, UNITS * WIDTH))
        return y.detach(), None if bias is None else bias.detach(), built.bias.detach()

    [(y, bias, ungated)] = run_ranks(1, body)
    hidden = layer_gates().hidden
    assert hidden is not None
    closed = hidden == 0
    total = y if bias is None else y + bias
    assert not total[..., closed].any()
    assert ungated[closed].all()  # it would have leaked
    assert total[..., ~closed].all()


@pytest.mark.parametrize("missing", ["units", "hidden", "layer"])
def test_a_kind_that_is_not_pruned_acts_like_gates_of_one(missing: str) -> None:
    def body(rank: int) -> None:
        built, x = linear(MaskedRowParallelLinear), random(5, 2, UNITS * WIDTH)
        every = layer_gates()
        gate = getattr(every, missing)
        built.gates = every._replace(**{missing: torch.ones_like(gate)})
        wanted, _ = built(x)
        built.gates = every._replace(**{missing: None})
        assert torch.equal(built(x)[0], wanted)
        built.gates = every
        assert not torch.equal(built(x)[0], wanted)

    run_ranks(1, body)


# --- bfloat16


def test_a_gate_times_an_activation_is_rounded_once_to_bfloat16() -> None:
    def body(rank: int) -> None:
        built = linear(MaskedRowParallelLinear, dtype=torch.bfloat16)
        x = random(5, 2, UNITS * WIDTH, dtype=torch.bfloat16)
        units, hidden, layer = layer_gates()
        assert units is not None
        assert hidden is not None
        assert layer is not None
        built.gates = LayerGates(units, None, None)
        gated = (x.float() * units.repeat_interleave(WIDTH)).bfloat16()
        plain = linear(RowParallelLinear, dtype=torch.bfloat16)
        y = plain(gated)[0]
        assert y.dtype == torch.bfloat16
        assert torch.equal(built(x)[0], y)
        built.gates = LayerGates(units, hidden, layer)
        wanted = (y.float() * (hidden * layer)).bfloat16()
        assert torch.equal(built(x)[0], wanted)
        # the twins: gates rounded first, and one rounding for each gate
        assert not torch.equal(y * (hidden * layer).bfloat16(), wanted)
        assert not torch.equal((y * hidden).bfloat16() * layer, wanted.float())
        assert not torch.equal(x * units.bfloat16().repeat_interleave(WIDTH), gated)

    run_ranks(1, body)


def test_the_embedding_gate_rounds_once_and_passes_without_gates() -> None:
    gate, x, z = EmbeddingGate(), random(5, 2, HIDDEN, dtype=torch.bfloat16), gates(HIDDEN, 7)
    module = torch.nn.Identity()
    assert gate(module, (), x) is x
    gate.hidden = z
    wanted = (x.float() * z).bfloat16()
    assert torch.equal(gate(module, (), x), wanted)
    assert not torch.equal(x * z.bfloat16(), wanted)


def test_the_norm_is_taken_in_float32_and_rounded_once() -> None:
    inputs = norm_inputs()
    norm = MaskedRMSNorm(config(torch.bfloat16), HIDDEN, eps=EPS)
    norm.weight = torch.nn.Parameter(inputs["weight"].bfloat16())
    norm.gates = NormGates(inputs["z"], 26)
    x = inputs["x"].bfloat16()
    whole = MaskedRMSNorm(config(), HIDDEN, eps=EPS)
    whole.weight = torch.nn.Parameter(norm.weight.detach().float())
    whole.gates = norm.gates
    wanted = whole(x.float()).bfloat16()
    assert torch.equal(norm(x), wanted)
    norm.gates = NormGates(inputs["z"].bfloat16().float(), 26)  # the twin: gates rounded first
    assert not torch.equal(norm(x), wanted)
