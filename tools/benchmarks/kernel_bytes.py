"""Count the bytes that the compiled functions of `models/kernels.py` read and write in one layer.

    python tools/benchmarks/kernel_bytes.py --preset llama2-7b --json kernel_bytes.json

The account is torch inductor's own, of the kernels that it makes here, on a CPU: a GPU's may be
fewer, where it adds up over tokens without writing the terms down. It says what gates cost beside
none; a GPU says how long that takes. Needs a C++ compiler. A table, then JSON, go to stdout, or
JSON to --json.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import environment, report, table
from torch import Tensor
from torch._inductor import config, metrics

from megashear.models import kernels
from megashear.shape import PRESETS, ModelShape


def counted(function: Callable[..., Any], *given: Tensor | None) -> int:
    """Bytes of one call of a fused function, compiled for these arguments."""
    torch.compiler.reset()
    metrics.reset()
    torch.compile(inspect.unwrap(function))(*given)
    assert metrics.num_bytes_accessed, "inductor counts where its log of metrics is on"
    return int(metrics.num_bytes_accessed)


def layer_bytes(shape: ModelShape, tokens: int) -> dict[str, dict[str, int]]:
    """Bytes by part, without gates and with them; under full recompute, the forward pass twice.

    The products themselves are left out, but for the float32 buffer that the gradient of a weight
    is added to, which an ungated product passes over itself, and the bfloat16 gradient that a gated
    one writes down before.
    """
    hidden, ffn, heads = shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads

    def bf16(*extents: int) -> Tensor:
        return torch.randn(extents).to(torch.bfloat16)

    both, product, units = bf16(tokens, 1, 2 * ffn), bf16(tokens, 1, ffn), torch.rand(ffn)
    swiglu = {
        way: 2 * counted(kernels._activate, both, gates)
        + counted(kernels._activation_gradients, product, both, gates)
        for way, gates in (("none gated", None), ("gated", units))
    }
    stream, context = bf16(tokens, 1, hidden), bf16(tokens, 1, heads * shape.head_dim)
    outputs, head_gates = torch.rand(hidden), torch.rand(heads)
    in_place = 2 * stream.nbytes  # y.mul_(outputs), one operator
    linears = {"none gated": 0, "gated": 0}
    for width in (heads * shape.head_dim, ffn):
        weight, buffer = bf16(hidden, width), torch.zeros(hidden, width)
        linears["none gated"] += 2 * buffer.nbytes
        linears["gated"] += (
            2 * in_place
            + counted(kernels._gate_outputs, stream, outputs)
            + weight.nbytes
            + counted(kernels._output_gradients, bf16(hidden, width), weight, outputs, buffer)
        )
    # heads gate the input of the first; neurons are gated in SwiGLU
    linears["gated"] += 3 * counted(kernels._gate_units, context, head_gates)
    linears["gated"] += counted(kernels._unit_gradients, context, context, head_gates)
    return {"SwiGLU": swiglu, "linears behind attention and MLP": linears}


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and print a table and JSON; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama2-7b", help="shape")
    parser.add_argument("--tokens", type=int, default=4096, help="of a microbatch")
    parser.add_argument("--json", type=Path, help="file for every count; stdout if none")
    args = parser.parse_args(argv)
    config.force_disable_caches = True  # what is found in a cache is not counted again
    torch._logging.set_logs(inductor_metrics=True)
    found = layer_bytes(PRESETS[args.preset], args.tokens)
    report(
        "kernel_bytes.py",
        [
            table(
                ["part", "none gated, MB", "gated, MB"],
                [
                    (part, f"{each['none gated'] / 1e6:,.0f}", f"{each['gated'] / 1e6:,.0f}")
                    for part, each in found.items()
                ],
            )
        ],
        {"environment": environment("kernel_bytes.py", argv), "bytes": found},
        args.json,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
