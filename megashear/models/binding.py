"""MaskBinding: which gates go to which layer of this rank, and how their gradients become whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megashear.masks.kinds import SPLIT_OVER_PIPELINE, SPLIT_OVER_TENSOR
from megashear.masks.mask_set import MaskPart, MaskSet, by_layer
from megashear.masks.optimizer import MaskOptimizer, clip_factor
from megashear.models.llama import unwrap
from megashear.models.masked_layers import MaskedTransformerLayer, StreamGates, norm_gates
from megashear.parallel import device
from megashear.parallel.agree import flat_all_reduce, gather_objects, ordered_sum
from megashear.parallel.groups import ParallelGroups


def own_layers(chunks: Sequence[torch.nn.Module]) -> tuple[int, ...]:
    """Global numbers, from 0, of the layers in this rank's chunks, rising."""
    return tuple(sorted(layer.layer_number - 1 for layer in _layers(chunks)))


class MaskBinding:
    """Hands sampled gates to the layers and brings the gates' gradients home.

    Gradient boundary: the model sees detached leaves, every microbatch adds to their gradients,
    and :meth:`backward` takes these, made whole inside the replica, into log_alpha once a step.

    Args:
        chunks: this rank's masked model chunks, wrapped or not.
        masks: this rank's masks, of :func:`own_parts`.
        groups: where this rank stands.
        sequence_parallel: whether tensor ranks see their own parts of the sequence, so that their
            gradients of replicated gates add up instead of being equal.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        masks: MaskSet,
        groups: ParallelGroups,
        *,
        sequence_parallel: bool,
    ) -> None:
        self.masks = masks
        self.groups = groups
        self.sequence_parallel = sequence_parallel
        self._chunks = [unwrap(chunk) for chunk in chunks]
        self._sampled: dict[int, dict[str, Tensor]] = {}
        self._leaves: dict[int, dict[str, Tensor]] = {}
        self._streams: dict[int, StreamGates] = {}
        rows = own_layers(chunks)
        for layer in _layers(chunks):
            layer.row = rows.index(layer.layer_number - 1)

    def bind(self, sampled: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Give the model the gates of the coming step.

        Args:
            sampled: for each noise stream that this replica's samples use, gates by kind,
                [own rows, own units], on the host; differentiable if :meth:`backward` follows.
        """
        self._sampled = {stream: dict(gates) for stream, gates in sampled.items()}
        self._leaves = {
            stream: {
                kind: device.pinned(z.detach())
                .to(device.device(), non_blocking=True)
                .requires_grad_(z.requires_grad)
                for kind, z in gates.items()
            }
            for stream, gates in sampled.items()
        }
        self._streams = {
            stream: _stream_gates(leaves, self._sampled[stream], self.masks.parts)
            for stream, leaves in self._leaves.items()
        }
        for layer in _layers(self._chunks):
            layer.streams = self._streams

    def select(self, chunk: torch.nn.Module, stream: int) -> Tensor:
        """Choose the stream of the microbatch that ``chunk`` runs next.

        Returns:
            The stream's number as the layers want it, for ``attention_mask``.
        """
        gates = self._streams[stream]
        gpt = unwrap(chunk)
        gpt.embedding_gate.hidden = gates.hidden
        if gpt.decoder.final_layernorm is not None:
            gpt.decoder.final_layernorm.gates = norm_gates(gates)
        return torch.tensor([stream])

    def release(self) -> None:
        """Take all gates away: the model is its unmasked self again."""
        self._sampled, self._leaves, self._streams = {}, {}, {}
        for gpt in self._chunks:
            gpt.embedding_gate.hidden = None
            if gpt.decoder.final_layernorm is not None:
                gpt.decoder.final_layernorm.gates = None
        for layer in _layers(self._chunks):
            layer.streams = None

    def whole_gradients(self) -> dict[int, dict[str, Tensor]]:
        """The loss's gradient of each bound gate, whole inside this replica, on the host.

        Collective over the tensor group and the pipeline group.

        Returns:
            By stream and kind, shaped like the gates; equal on ranks that hold the same gates.
        """
        gradients = {
            stream: {
                # a rank that runs no microbatch of a stream, or no use of a gate, has no gradient
                kind: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                for kind, leaf in leaves.items()
            }
            for stream, leaves in self._leaves.items()
        }
        replicated = [
            (stream, kind)
            for stream, of_kind in gradients.items()
            for kind in of_kind
            if kind not in SPLIT_OVER_TENSOR
        ]
        self._reduce(gradients, replicated, self.groups.tensor)
        if not self.sequence_parallel:
            # every tensor rank had the whole gradient already: the sum counts it tp times
            for stream, kind in replicated:
                gradients[stream][kind] /= self.groups.tensor_size
        everywhere = [(s, kind) for s, kind in replicated if kind not in SPLIT_OVER_PIPELINE]
        self._reduce(gradients, everywhere, self.groups.pipeline)
        return {s: {k: g.cpu() for k, g in of_kind.items()} for s, of_kind in gradients.items()}

    def backward(self) -> None:
        """Take the gates' gradients into log_alpha, averaged over replicas.

        Collective over the tensor, pipeline and data groups. The mean over streams and replicas
        comes after the chain rule, because each stream has its own noise.
        """
        gradients = self.whole_gradients()
        for stream, gates in self._sampled.items():
            torch.autograd.backward(list(gates.values()), [gradients[stream][k] for k in gates])
        grads: dict[str, Tensor] = {}
        for kind, log_alpha in self.masks.log_alpha.items():
            assert log_alpha.grad is not None
            grads[kind] = log_alpha.grad
        # What ranks of one replica hold copies of is added in one order everywhere; the slices,
        # most of the numbers, are held by the ranks of one data group alone.
        copied = [kind for kind in grads if kind not in SPLIT_OVER_TENSOR]
        sliced = [kind for kind in grads if kind in SPLIT_OVER_TENSOR]
        sums = dict(zip(copied, ordered_sum([grads[k] for k in copied], self.groups.data)))
        sums |= zip(sliced, flat_all_reduce([grads[k] for k in sliced], self.groups.data))
        for kind, total in sums.items():
            self.masks.log_alpha[kind].grad = total / self.groups.data_size

    def whole_closed_sums(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Expected closed units of every whole row, from what each rank holds.

        Collective over the replica's model group and the pipeline group.

        Args:
            own: :meth:`MaskSet.closed_sums`, [own rows] per kind.

        Returns:
            Detached, float64, [num_rows] per kind; equal on every rank.
        """
        whole = {}
        for kind, sums in own.items():
            part = self.masks.parts[kind]
            rows = torch.zeros(part.num_rows, dtype=torch.float64)
            rows[list(part.rows)] = sums.detach().double()
            whole[kind] = rows
        # Each value crosses exactly the ranks that hold different parts of it: summed over the
        # whole model group, layer would count tp times and hidden tp * pp times.
        for kinds, group in self._owners():
            named = [kind for kind in whole if kind in kinds]
            reduced = ordered_sum([whole[kind] for kind in named], group)
            whole.update(zip(named, reduced))
        return whole

    def clip(self, optimizer: MaskOptimizer, max_norm: float) -> tuple[float, float]:
        """Norm of the gradients of all masks and multipliers, each gate counted once.

        Collective over the replica's model group and the pipeline group.

        Returns:
            The norm, and the factor that brings it to at most ``max_norm``.
        """
        squares = {kind: s.double().reshape(1) for kind, s in optimizer.grad_square_sums().items()}
        for kinds, group in self._owners():
            named = [kind for kind in squares if kind in kinds]
            reduced = ordered_sum([squares[kind] for kind in named], group)
            squares.update(zip(named, reduced))
        norm = float(sum(square.item() for square in squares.values())) ** 0.5
        return norm, clip_factor(norm, max_norm)

    def gather_log_alpha(self) -> dict[str, Tensor]:
        """Whole log_alpha of every kind, [num_rows, num_units], on every rank.

        Collective over the replica's model group. For evaluations and checkpoints' readers: the k
        smallest gates are those of the whole row.
        """
        held = {
            kind: (part.rows, tuple(part.units), self.masks.log_alpha[kind].detach().numpy())
            for kind, part in self.masks.parts.items()
        }
        whole = {
            kind: torch.full((part.num_rows, part.num_units), float("nan"))
            for kind, part in self.masks.parts.items()
        }
        for theirs in gather_objects(held, self.groups.model):
            for kind, (rows, units, values) in theirs.items():
                index = (torch.tensor(rows)[:, None], torch.tensor(units)[None, :])
                whole[kind][index] = torch.from_numpy(values)
        assert not any(rows.isnan().any() for rows in whole.values())
        return whole

    def slice_gates(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of whole gates, [own rows, own units] per kind."""
        return {
            kind: whole[kind][list(part.rows)][:, list(part.units)]
            for kind, part in self.masks.parts.items()
        }

    def _owners(self) -> list[tuple[frozenset[str], torch.distributed.ProcessGroup]]:
        """Kinds with the ranks that hold different parts of them; hidden is whole everywhere."""
        return [
            (SPLIT_OVER_TENSOR & SPLIT_OVER_PIPELINE, self.groups.model),
            (SPLIT_OVER_PIPELINE - SPLIT_OVER_TENSOR, self.groups.pipeline),
        ]

    @staticmethod
    def _reduce(
        gradients: dict[int, dict[str, Tensor]],
        which: Sequence[tuple[int, str]],
        group: torch.distributed.ProcessGroup,
    ) -> None:
        reduced = ordered_sum([gradients[stream][kind] for stream, kind in which], group)
        for (stream, kind), total in zip(which, reduced):
            gradients[stream][kind] = total


def _stream_gates(
    leaves: Mapping[str, Tensor], sampled: Mapping[str, Tensor], parts: Mapping[str, MaskPart]
) -> StreamGates:
    num_open = None
    if "hidden" in sampled:
        num_open = int(torch.count_nonzero(sampled["hidden"]))
        assert num_open, "every hidden gate is closed: the objective checks before it binds"
    return StreamGates(
        hidden=leaves["hidden"][0] if "hidden" in leaves else None,
        num_open_hidden=num_open,
        heads=by_layer(parts["head"], leaves["head"]) if "head" in leaves else None,
        groups=leaves.get("group"),
        intermediate=leaves.get("intermediate"),
        layer=leaves["layer"][0] if "layer" in leaves else None,
    )


def _layers(chunks: Sequence[torch.nn.Module]) -> list[MaskedTransformerLayer]:
    return [layer for chunk in chunks for layer in unwrap(chunk).decoder.layers]
