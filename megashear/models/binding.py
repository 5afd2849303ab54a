"""MaskBinding: gives sampled gates to the model and makes their gradients whole."""

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
    """Gives sampled gates to the model and takes their gradients into log_alpha.

    The gradient boundary: the model folds detached copies of the gates into its weights. After the
    last microbatch of a noise stream it has the gradients of these copies. Once a step `backward`
    makes them whole inside the replica and takes them into log_alpha.

    Args:
        chunks: this rank's model chunks, wrapped or not, of the local spec.
        masks: the masks of the parts that `parts.own_parts` returns for this rank.
        shape: of the whole model.
        groups: ranks and groups of this process.
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
            sampled: for each noise stream of this replica's samples, the gates by kind,
                [own rows, own units], on the host; differentiable if `backward` follows.
            streams: the noise stream of every microbatch that goes backward before the gates are
                released, in the order in which they go backward.
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
        # sums over ranks with copies
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
        # from gates into log_alpha
        gradients = self.whole_gradients()
        for stream, gates in self._sampled.items():
            torch.autograd.backward(list(gates.values()), [gradients[stream][k] for k in gates])
        grads: dict[str, Tensor] = {}
        for kind, log_alpha in self.masks.log_alpha.items():
            assert log_alpha.grad is not None
            grads[kind] = log_alpha.grad
        # Mean over replicas. Masks that ranks of one replica hold copies of are added in one order
        # everywhere. Slices, most of the numbers, are held by the ranks of one data group alone.
        copied = [kind for kind in grads if kind not in SPLIT_OVER_TENSOR]
        sliced = [kind for kind in grads if kind in SPLIT_OVER_TENSOR]
        sums = dict(zip(copied, ordered_sum([grads[k] for k in copied], self.groups.data)))
        sums |= zip(sliced, flat_all_reduce([grads[k] for k in sliced], self.groups.data))
        for kind, total in sums.items():
            self.masks.log_alpha[kind].grad = total / self.groups.data_size

    def whole_sums(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over whole rows, such as the expected closed units of every row.

        Collective over the replica's model group and the pipeline group.

        Args:
            own: this rank's sums, `MaskSet.closed_sums` or `row_sums`, [own rows, ...] per kind.

        Returns:
            Detached, float64, [num_rows, ...] per kind; equal on every rank.
        """
        whole = {}
        for kind, sums in own.items():
            part = self.masks.parts[kind]
            rows = torch.zeros(part.num_rows, *sums.shape[1:], dtype=torch.float64)
            rows[list(part.rows)] = sums.detach().double()
            whole[kind] = rows
        return self._summed(whole)

    def clip(self, optimizer: MaskOptimizer, max_norm: float) -> tuple[float, float]:
        """Return the norm of the gradients of all masks and multipliers, and a factor to clip it.

        Each gate counts once. Collective over the replica's model group and the pipeline group.

        Returns:
            The norm, and the factor that brings it to at most ``max_norm``.
        """
        own = {kind: s.double().reshape(1) for kind, s in optimizer.grad_square_sums().items()}
        norm = float(sum(square.item() for square in self._summed(own).values())) ** 0.5
        return norm, clip_factor(norm, max_norm)

    def gather_log_alpha(self) -> dict[str, Tensor]:
        """Return the whole log_alpha of every kind, [num_rows, num_units], on every rank.

        Evaluations and the cut need it, because the k smallest gates are those of a whole row.
        Collective over the replica's model group.
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
        """Return this rank's part of whole gates, [own rows, own units] per kind."""
        return {
            kind: whole[kind][list(part.rows)][:, list(part.units)]
            for kind, part in self.masks.parts.items()
        }

    def _summed(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values by kind, each summed over exactly the ranks that hold different parts.

        Summed over the whole model group, layer would count tp times and hidden tp * pp times.
        """
        whole = dict(own)
        for kinds, group in self._owners():
            named = [kind for kind in whole if kind in kinds]
            whole.update(zip(named, ordered_sum([whole[kind] for kind in named], group)))
        return whole

    def _owners(self) -> list[tuple[frozenset[str], torch.distributed.ProcessGroup]]:
        """Return kinds, and the ranks that hold different parts of them; all ranks hold hidden."""
        return [
            (SPLIT_OVER_TENSOR & SPLIT_OVER_PIPELINE, self.groups.model),
            (SPLIT_OVER_PIPELINE - SPLIT_OVER_TENSOR, self.groups.pipeline),
        ]
