"""Masks as factors on the rows and columns of weights: W' = r * W * c, and its gradients.

Every gate of a mask multiplies a row or a column of a weight. The weight table says which kinds
multiply which axis (`weight_table.Weight.folds`). Training, evaluation under masks and both cuts
fold whole weights, or a rank's shards of them, with the functions of this module.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megashear.masks.kinds import KINDS
from megashear.models.fusion import fused
from megashear.parallel import device, kernel_choice
from megashear.shape import ModelShape


class Factors:
    """The factors that gates make for the axes of weights.

    Args:
        gates: gates by kind, of whole masks or of one rank's part, as `unit_values` takes them.
        shape: the whole model.
        num_layers: layers that the gates are for.
    """

    def __init__(self, gates: Mapping[str, Tensor], shape: ModelShape, *, num_layers: int) -> None:
        self._shape = shape
        self._of = unit_values(gates, shape, num_layers)
        self._stacked: dict[tuple[str, ...], Tensor | None] = {}

    def stacked(self, kinds: tuple[str, ...]) -> Tensor | None:
        """Return the factors of an axis for all layers.

        Args:
            kinds: kinds that the weight table folds into the axis.

        Returns:
            [L, n], or [1, n] where all layers have the same factors; n is the length of the axis,
            or 1 where all its places have the same factor. None where ``kinds`` has no gates.
        """
        if kinds not in self._stacked:
            values = [self._along_axis(kind) for kind in kinds if kind in self._of]
            self._stacked[kinds] = functools.reduce(torch.mul, values) if values else None
        return self._stacked[kinds]

    def of(self, folds: Sequence[tuple[str, ...]], layer: int | None) -> list[Tensor | None]:
        """Return the factor of each axis of one weight, [n] or [1].

        Args:
            folds: `Weight.folds` of the weight's row in the table.
            layer: the weight's layer, counted among the layers of the gates; None outside layers.
        """
        return [None if each is None else pick(each, layer) for each in map(self.stacked, folds)]

    def _along_axis(self, name: str) -> Tensor:
        """Return the values of a kind's units, each repeated over its places on the axis."""
        kind, values = KINDS[name], self._of[name]
        if kind.axis is None:  # a layer's factor is one for a whole axis: [L, 1]
            return values.T
        width = kind.unit_width(self._shape)
        return values if width == 1 else values.repeat_interleave(width, dim=1)


def unit_values(
    gates: Mapping[str, Tensor], shape: ModelShape, num_layers: int
) -> dict[str, Tensor]:
    """Return the value of every unit: its own gate, times the gate of the unit it is part of.

    Args:
        gates: gates by kind, of whole masks or of one rank's part: hidden [1, h], layer [1, L],
            head [L, H], group [L, G], intermediate [L, I]. With grouped queries head may also be
            [L * G, H/G], a row for each key/value head. An absent kind is fully open.
        shape: the whole model.
        num_layers: L.

    Returns:
        Values by kind, shaped as the gates, head always [L, H]. Only kinds that a gate acts on.
    """
    values = {}
    for name, kind in KINDS.items():
        found = []
        if name in gates:
            found.append(gates[name].reshape(num_layers if kind.per_layer else 1, -1))
        if kind.within is not None and kind.within in gates:
            each = kind.size(shape) // KINDS[kind.within].size(shape)
            found.append(gates[kind.within].repeat_interleave(each, dim=1))
        if found:
            values[name] = functools.reduce(torch.mul, found)
    return values


def pick(stacked: Tensor, layer: int | None) -> Tensor:
    """Return one layer's row of ``stacked``, which `Factors.stacked` made: a view."""
    return stacked[0 if layer is None or len(stacked) == 1 else layer]


@torch.no_grad()
def fold(
    weight: Tensor, factors: Sequence[Tensor | None], *, power: int = 1, out: Tensor | None = None
) -> Tensor:
    """Multiply factors into the axes of a weight, in float32, and round once.

    Args:
        weight: a matrix or a vector, of any precision.
        factors: the factor of each axis, float32 [n] or [1]; None leaves an axis as it is.
        power: exponent of the factors.
        out: the tensor to write, shaped like ``weight``; a new one, typed like ``weight``, if None.

    Returns:
        ``out``.
    """
    # compiled: one pass
    out = torch.empty_like(weight) if out is None else out
    given = [each if each is None or power == 1 else each**power for each in factors]
    if weight.dim() == 2 and _is_compiled(weight):
        rows, columns = _for_all(weight, given)
        _fold_matrix(weight, rows, columns, out)
        return out
    # Else by torch's operators. Factors are shaped to broadcast: [m, 1] for rows, [n] for columns.
    shaped = [
        each if axis == weight.dim() - 1 else each[:, None]
        for axis, each in enumerate(given)
        if each is not None
    ]
    wide = weight
    for each in shaped[:-1]:
        wide = torch.mul(wide, each, out=out) if out.dtype == torch.float32 else wide * each
    if shaped:
        torch.mul(wide, shaped[-1], out=out)
    else:
        out.copy_(weight)
    return out


@torch.no_grad()
def unfold(
    raw: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> None:
    """Turn the gradient of a folded weight into gradients of the weight and of its factors.

    W'_ij is r_i W_ij c_j. Let G be its gradient. By the chain rule the gradient of W_ij is
    r_i c_j G_ij, that of r_i is sum_j W_ij c_j G_ij, and that of c_j is sum_i W_ij r_i G_ij.

    Args:
        raw: G, float32; overwritten with the gradient of the weight.
        weight: W, of any precision.
        factors: the factors that `fold` was given.
        gradients: for each axis the tensor to which the factor's gradient is added, shaped like the
            factor; None where it is not wanted.
    """
    if weight.dim() == 1:
        (factor,), (total,) = factors, gradients
        if factor is not None:
            if total is not None:
                total.add_((raw * weight).sum_to_size(total.shape))
            raw.mul_(factor)
        return
    sums: tuple[Tensor | None, Tensor | None]
    if _is_compiled(weight):
        rows, columns = _for_all(weight, factors)
        sums = _unfold_matrix(raw, weight, rows, columns)
    else:
        sums = _unfold_blocks(raw, weight, *factors)
    for total, found in zip(gradients, sums):
        if total is not None and found is not None:
            total.add_(found.sum_to_size(total.shape))


def _is_compiled(weight: Tensor) -> bool:
    """Return whether kernels are compiled for the device of a weight; cuts fold on the host."""
    return kernel_choice.compiles_kernels() and weight.device == device.device()


def _for_all(weight: Tensor, factors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return a factor for every index of each axis, so that the compiler sees only one case."""
    rows, columns = (
        torch.ones(n, device=weight.device) if each is None else each.expand(n).contiguous()
        for n, each in zip(weight.shape, factors)
    )
    return rows, columns


@fused
def _fold_matrix(weight: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    out.copy_(weight.float() * rows[:, None] * columns)


@fused
def _unfold_matrix(
    raw: Tensor, weight: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    product = raw * weight.float()
    sums = (product * columns).sum(dim=1), (product * rows[:, None]).sum(dim=0)
    raw.mul_(rows[:, None]).mul_(columns)
    return sums


_BLOCK = 1 << 17
"""Elements of a block of rows on a CPU; block, product and weight together fit into a cache."""


def _unfold_blocks(
    raw: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Do what `_unfold_matrix` does, with torch's own operators and a block of rows at a time.

    Each operator reads and writes all its tensors, and a block stays in the cache between them.
    """
    # a GPU has no such cache, and every block would cost six kernels
    height = len(raw) if raw.is_cuda else max(1, _BLOCK // weight.size(1))
    of_rows: list[Tensor] = []
    columns = None if columns is None else columns.expand_as(raw[0])
    of_columns = None if columns is None else torch.zeros_like(raw[0])
    row_blocks = itertools.repeat(None) if rows is None else rows.expand(len(raw)).split(height)
    for gradient, values, factor in zip(raw.split(height), weight.split(height), row_blocks):
        product = gradient * values
        if of_columns is not None:
            if factor is None:
                of_columns.add_(product.sum(dim=0))
            else:
                of_columns.addmv_(product.T, factor)
        if factor is not None:
            of_rows.append(product.sum(dim=1) if columns is None else product @ columns)
            gradient.mul_(factor[:, None])
        if columns is not None:
            gradient.mul_(columns)
    return torch.cat(of_rows) if of_rows else None, of_columns
