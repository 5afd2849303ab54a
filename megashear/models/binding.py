"""MaskBinding: hands sampled gates to the model and makes their gradients whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megashear.masks.kinds import SPLIT_OVER_PIPELINE, SPLIT_OVER_TENSOR
from megashear.masks.mask_set import MaskSet
from megashear.masks.optimizer import MaskOptimizer, clip_factor
from megashear.models.folded import FoldedModel
from megashear.parallel.agree import flat_all_reduce, gather_objects, ordered_sum
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape


class MaskBinding:
    """Hands sampled gates to the model and brings their gradients home.

    Gradient boundary: the model folds copies of the gates into its weights. After a stream's last
    microbatch it has their gradients, which :meth:`backward` makes whole inside the replica and
    takes into log_alpha once a step.

    Args:
        chunks: this rank's model chunks, wrapped or not, of the local spec.
        masks: this rank's masks, of :func:`own_parts`.
        shape: of the whole model.
        groups: where this rank stands.
        sequence_parallel: whether tensor ranks see their own parts of the sequence.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        masks: MaskSet,
        shape: ModelShape,
        groups: ParallelGroups,
        *,
        sequence_parallel: bool,
    ) -> None:
        self.masks = masks
        self.groups = groups
        self._model = FoldedModel(
            chunks, masks.parts, shape, groups, sequence_parallel=sequence_parallel
        )
        self.select, self.release = self._model.select, self._model.release
        self._sampled: dict[int, dict[str, Tensor]] = {}

    def bind(
        self, sampled: Mapping[int, Mapping[str, Tensor]], streams: Sequence[int] = ()
    ) -> None:
        """Give the model the gates of the coming step or evaluation.

        Args:
            sampled: for each noise stream that this replica's samples use, gates by kind,
                [own rows, own units], on the host; differentiable if :meth:`backward` follows.
            streams: of every microbatch that goes backward before the gates are released, in the
                order in which they go backward.
        """
        self._sampled = {stream: dict(gates) for stream, gates in sampled.items()}
        self._model.bind(self._sampled, streams)

    def whole_gradients(self) -> dict[int, dict[str, Tensor]]:
        """Return the loss's gradient of each bound gate, whole inside this replica, on the host.

        Collective over the tensor group and the pipeline group.

        Returns:
            By stream and kind, shaped like the gates; equal on ranks that hold the same gates.
        """
        gradients = self._model.gradients()
        held = [(stream, kind) for stream, of_kind in gradients.items() for kind in of_kind]
        for split, group in (
            (SPLIT_OVER_TENSOR, self.groups.tensor),
            (SPLIT_OVER_PIPELINE, self.groups.pipeline),
        ):
            copied = [(stream, kind) for stream, kind in held if kind not in split]
            sums = ordered_sum([gradients[stream][kind] for stream, kind in copied], group)
            for (stream, kind), total in zip(copied, sums):
                gradients[stream][kind] = total
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
