"""Layers whose activations are gated, and which are their plain selves while no gates are set."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megashear.models import kernels
from megashear.models.core import RMSNorm


class StreamGates(NamedTuple):
    """All gates of this rank for one noise stream: leaves on the device, float32.

    A kind that is not pruned is None.
    """

    hidden: Tensor | None
    """[h]."""
    num_open_hidden: int | None
    """How many hidden gates are not 0, counted on the host so that no device has to wait."""
    heads: Tensor | None
    """[own L, heads/tp]; under grouped-query attention [own L, groups/tp, H/G]."""
    groups: Tensor | None
    """[own L, groups/tp], under grouped-query attention only."""
    intermediate: Tensor | None
    """[own L, ffn/tp]."""
    layer: Tensor | None
    """[own L]."""


class LayerGates(NamedTuple):
    """What gates one row-parallel linear."""

    units: Tensor | None
    """[units/tp]: query heads, whole groups of them, or neurons on the input side."""
    hidden: Tensor | None
    """[h], on the output side."""
    layer: Tensor | None
    """Scalar, on the output side."""


class NormGates(NamedTuple):
    """What gates one norm."""

    hidden: Tensor
    """[h]."""
    num_open: int
    """How many of ``hidden`` are not 0."""


class MaskedRMSNorm(RMSNorm):
    """RMSNorm over the open hidden dimensions, with a gated output.

    The stream is exactly 0 in closed dimensions, so with h' open of h the mean square over the
    open ones is h / h' times that over all: an ordinary norm with weight * z * sqrt(h' / h) and
    eps * h' / h gives the same, and nothing is gathered.
    """

    gates: NormGates | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``x``, [s, b, h]."""
        if self.gates is None:
            return super().forward(x)
        ratio = self.gates.num_open / x.size(-1)
        weight = self.weight.float() * self.gates.hidden * math.sqrt(ratio)
        return kernels.rms_norm(x, weight, self.eps * ratio)


class MaskedRowParallelLinear(RowParallelLinear):
    """Row-parallel linear with gated input units and gated output channels.

    Stands in for attention ``linear_proj`` (units are heads, or groups) and MLP ``linear_fc2``
    (whose units, neurons, the activation before it gates). Without gates it is exactly
    ``RowParallelLinear``.
    """

    gates: LayerGates | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate, multiply, gate, reduce.

        Args:
            x: [s, b, units * width/tp].

        Returns:
            [s, b, h] (under sequence parallelism this rank's part of s), and the gated bias.
        """
        y, bias = super().forward(x)
        outputs = self._outputs()
        if outputs is None:
            return y, bias
        if self._gates_after_bias:
            y = (y * outputs).to(y.dtype)
        return y, None if bias is None else (bias * outputs).to(bias.dtype)

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """The product of this rank's part; what the parent's forward reduces."""
        outputs = None if self._gates_after_bias else self._outputs()
        units = None if self.gates is None else self.gates.units
        if units is None and outputs is None:
            return super()._forward_impl(input, weight, **options)
        # Each tensor rank finds what its own columns add to the gradient of the output gates. The
        # binding adds them up with sequence parallelism and takes their mean without, where the
        # norms of all ranks give whole gradients.
        copies = 1 if self.sequence_parallel else self.tp_group.size()
        return kernels.gated_linear(input, weight, units, outputs, copies)

    def _outputs(self) -> Tensor | None:
        """Return the gates of the output channels, [h], or None where none is gated."""
        # The product is taken in every microbatch: taken once per step, it would be freed by the
        # first backward pass and missing in the second.
        if self.gates is None:
            return None
        _, hidden, layer = self.gates
        if layer is None:
            return hidden
        # one gate for each channel in any case: the kernels take no scalar
        return layer.expand(self.output_size) if hidden is None else hidden * layer

    @property
    def _gates_after_bias(self) -> bool:
        # a bias that the parent adds itself must be gated too
        return self.bias is not None and not self.skip_bias_add


class MaskedTransformerLayer(TransformerLayer):
    """Transformer layer that hands its parts the gates of the microbatch's noise stream.

    Full recompute runs a layer again long after other microbatches have passed, so the stream
    must travel with the layer's arguments. Causal attention needs no mask tensor: the argument
    ``attention_mask``, which megatron-core carries through its recompute, is the stream's number.
    ``context_mask``, carried in the same way and used by cross attention alone, which there is none
    of, is the mask where documents are kept apart.
    """

    streams: dict[int, StreamGates] | None = None
    """Gates by stream, set by MaskBinding for one step."""
    row: int = 0
    """Which of this rank's layers this is."""

    def forward(
        self,
        *args: Any,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``TransformerLayer``, gated by stream ``attention_mask`` (one int64 on the host)."""
        gates = None
        if self.streams is not None:
            assert attention_mask is not None
            gates = self.streams[int(attention_mask)]
        self._set(gates)
        return super().forward(*args, attention_mask=context_mask, **kwargs)

    def _set(self, gates: StreamGates | None) -> None:
        def own(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[self.row]

        norm = attention = neurons = mlp = None
        if gates is not None:
            norm = norm_gates(gates)
            layer = own(gates.layer)
            attention = LayerGates(
                head_gates(own(gates.heads), own(gates.groups)), gates.hidden, layer
            )
            neurons = own(gates.intermediate)
            mlp = LayerGates(None, gates.hidden, layer)
        self.input_layernorm.gates = norm
        self.pre_mlp_layernorm.gates = norm
        self.self_attention.linear_proj.gates = attention
        self.mlp.activation_func.units = neurons
        self.mlp.linear_fc2.gates = mlp


def head_gates(heads: Tensor | None, groups: Tensor | None) -> Tensor | None:
    """What gates one layer's attention context, unit by unit.

    Made in every microbatch's forward pass from the leaves: a product of both kinds belongs to the
    graph of one backward pass.

    Args:
        heads: [heads/tp], or [groups/tp, H/G] where they lie in groups.
        groups: [groups/tp]; given with ``heads``, these lie in groups.

    Returns:
        [units/tp]: query heads in Megatron's order, group by group; or groups, each as wide as its
        query heads together. None where neither kind is pruned.
    """
    if heads is None:
        return groups
    return (heads if groups is None else heads * groups[:, None]).flatten()


class EmbeddingGate:
    """Forward hook that gates the embedding's output; GPTModel builds its embedding itself."""

    hidden: Tensor | None = None
    """[h]."""

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Gate ``output``, [s, b, h]."""
        if self.hidden is None:
            return output
        return (output * self.hidden).to(output.dtype)


def norm_gates(gates: StreamGates) -> NormGates | None:
    """The gates of every norm in ``gates``; None where hidden is not pruned."""
    if gates.hidden is None:
        return None
    assert gates.num_open_hidden is not None
    return NormGates(gates.hidden, gates.num_open_hidden)
