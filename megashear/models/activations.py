"""Sizes of activations of every unit, by hooks on the modules of local layers, at any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megashear.masks.kinds import GROUP, HEAD, HIDDEN, INTERMEDIATE, KINDS, LAYER
from megashear.models.llama import own_layers, unwrap
from megashear.parallel import device
from megashear.parallel.agree import flat_all_reduce, ordered_sum
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape

FORMULAS = {
    HIDDEN: "mean over positions of |output of a norm|, root of the sum of squares over "
    "sequences, sum over all norms",
    HEAD: "mean over positions of the Euclidean norm of the head's part of the output "
    "projection's input, root of the sum of squares over sequences",
    GROUP: "sum of the scores of the query heads of the key/value head",
    INTERMEDIATE: "mean over positions of |input of the down projection|, root of the sum of "
    "squares over sequences",
    LAYER: "1 - cos(input, output), mean over positions and sequences",
}
"""The score of a unit, by kind.

Source: Muralidharan et al. 2024 (arXiv:2407.14679), section 2.2; heads are scored by their context,
before the output projection.
"""

_IN_PARTS = (HIDDEN, LAYER)
"""Kinds whose activations each tensor rank has for a part of the sequence, with sequence
parallelism. Heads and neurons are divided, and see the whole sequence."""


class ActivationScores:
    """Collects what passes through a model, and returns the importance of its units.

    Every forward pass leaves sums over positions, one for each microbatch; `add` squares them.

    Args:
        chunks: this rank's model chunks, of the local spec.
        shape: of the whole model.
        groups: ranks and groups of this process.
        sequence_parallel: whether tensor ranks see their own parts of the sequence.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        shape: ModelShape,
        groups: ParallelGroups,
        *,
        sequence_parallel: bool,
    ) -> None:
        self._shape, self._groups = shape, groups
        self._sequence_parallel = sequence_parallel
        self._layers = own_layers(chunks)
        self._passed: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._num_sequences = torch.zeros((), dtype=torch.float64, device=device.device())
        self._handles = [handle for chunk in chunks for handle in self._hook(chunk)]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def add(self, counts: Tensor, sequence_length: int) -> None:
        """Add the microbatches that passed since the last call.

        Collective over the tensor group with sequence parallelism.

        Args:
            counts: 1 for each sequence that counts, 0 for one that only fills a microbatch, [M, b].
            sequence_length: tokens of a sequence.
        """
        passed = {key: torch.stack(found) for key, found in self._passed.items()}
        self._passed.clear()
        if self._sequence_parallel:
            # before the square: the mean of |x| is one over the whole sequence
            partial_keys = [key for key in passed if key[0] in _IN_PARTS]
            parts = [passed[key] for key in partial_keys]
            passed |= zip(partial_keys, flat_all_reduce(parts, self._groups.tensor))
        counts = counts.to(self._num_sequences)  # [M, b]
        self._num_sequences += counts.sum()
        for key, sums in passed.items():
            assert sums.shape[:2] == counts.shape, f"{key}: {sums.shape} for {counts.shape}"
            means = sums.double() / sequence_length  # [M, b, units]
            values = means if key[0] == LAYER else means.square()
            total = torch.einsum("mb,mbu->u", counts, values)
            self._sums[key] = self._sums[key] + total if key in self._sums else total

    def whole(self) -> dict[str, Tensor]:
        """Return the scores of all units on every rank, by kind, float64, on the host.

        Collective over the data, pipeline and model groups.

        Returns:
            [L, units] for kinds whose units belong to layers; [1, units] for hidden and layer.
        """
        # over replicas: sums of squares, never of roots
        names = list(self._sums)
        *totals, num_sequences = flat_all_reduce(
            [*(self._sums[name] for name in names), self._num_sequences], self._groups.data
        )
        own = {
            name: total / num_sequences if name[0] == LAYER else total.sqrt()
            for name, total in zip(names, totals)
        }
        # hidden: over the norms of all stages
        hidden = sum(value for (kind, _), value in own.items() if kind == HIDDEN)
        assert isinstance(hidden, Tensor), "every stage has norms"
        (hidden,) = ordered_sum([hidden], self._groups.pipeline)
        # the others: each rank fills in its own
        divided = {kind: self._placed(kind, own) for kind in (HEAD, INTERMEDIATE)}
        whole = dict(zip(divided, flat_all_reduce([*divided.values()], self._groups.model)))
        (layer,) = flat_all_reduce([self._placed(LAYER, own)], self._groups.pipeline)
        whole |= {HIDDEN: hidden[None], LAYER: layer.T}
        groups = self._shape.num_query_groups
        whole[GROUP] = whole[HEAD].unflatten(1, (groups, -1)).sum(dim=2)
        return {kind: whole[kind].cpu() for kind in KINDS}

    def _placed(self, kind: str, own: dict[tuple[str, int], Tensor]) -> Tensor:
        """Return zeros for all units of all layers, with this rank's scores in their places."""
        width = len(own[kind, self._layers[0]])
        first, num_units = 0, 1
        if KINDS[kind].split_over_tensor:
            first, num_units = self._groups.tensor_rank * width, KINDS[kind].size(self._shape)
        whole = torch.zeros(self._shape.num_layers, num_units).to(self._num_sequences)
        for layer in self._layers:
            whole[layer, first : first + width] = own[kind, layer]
        return whole

    def _hook(self, chunk: torch.nn.Module) -> list[RemovableHandle]:
        decoder = unwrap(chunk).decoder
        norms, handles = [], []
        for module in decoder.layers:
            layer = module.layer_number - 1  # megatron counts from 1
            norms += [
                (2 * layer, module.input_layernorm),
                (2 * layer + 1, module.pre_mlp_layernorm),
            ]
            projection, down = module.self_attention.linear_proj, module.mlp.linear_fc2
            handles += [
                module.register_forward_hook(partial(self._of_layer, layer), with_kwargs=True),
                projection.register_forward_pre_hook(partial(self._of_heads, layer)),
                down.register_forward_pre_hook(partial(self._of_neurons, layer)),
            ]
        if decoder.final_layernorm is not None:
            norms.append((2 * self._shape.num_layers, decoder.final_layernorm))
        return handles + [
            norm.register_forward_hook(partial(self._of_norm, number)) for number, norm in norms
        ]

    def _of_neurons(self, layer: int, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs  # [s, b, ffn/tp]
        self._passed[INTERMEDIATE, layer].append(x.abs().sum(dim=0, dtype=torch.float32))

    def _of_heads(self, layer: int, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads = inputs[0].unflatten(-1, (-1, self._shape.head_dim))  # [s, b, heads/tp, d]
        norms = torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32)
        self._passed[HEAD, layer].append(norms.sum(dim=0))

    def _of_norm(
        self, number: int, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        # [s, b, h], with sequence parallelism s/tp
        self._passed[HIDDEN, number].append(output.abs().sum(dim=0, dtype=torch.float32))

    def _of_layer(
        self,
        layer: int,
        module: torch.nn.Module,
        inputs: tuple[Tensor, ...],
        named: dict[str, Any],
        outputs: tuple[Tensor, Any],
    ) -> None:
        before = named["hidden_states"] if "hidden_states" in named else inputs[0]
        u, v = (F.normalize(x.float(), dim=-1) for x in (before, outputs[0]))  # [s, b, h]
        # |u - v|^2 / 2 is 1 - cos; the difference from 1 would lose the digits of a small score
        self._passed[LAYER, layer].append((u - v).square().sum(dim=(0, 2))[:, None] / 2)
