"""Fold deterministic gates into the weights and drop the units that they close."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megashear.masks.kinds import KINDS, LAYER, ON_AXIS, kinds_of
from megashear.masks.targets import UNMASKED
from megashear.models import weight_table
from megashear.models.fold import Factors, fold
from megashear.models.kept import KeptUnits
from megashear.shape import ModelShape


def cut(
    weights: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
    source: ModelShape,
    target: ModelShape,
    *,
    power: int = 1,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the smaller model that computes what the masked one does.

    logits(masked with ``gates``) = logits(cut), to float32's rounding: what masks fold where is in
    the table (`weight_table.table`). Everything is checked before the first weight is read; weights
    are then read, folded in float32 and rounded once, one at a time.

    Args:
        weights: of the source by Hugging Face name; may read each weight when it is asked for.
        gates: whole deterministic gates by kind, 0 where closed: hidden [1, h], layer [1, L],
            head [L, H], group [L, G], intermediate [L, I]. An absent kind is fully open. With
            grouped queries head may come as [L * G, H/G], a row for each key/value head, and a
            query head is open where its own gate and its group's are.
        source: extents of ``weights``.
        target: extents of the model to make.
        power: power of the gates to multiply into kept values; 1 for weights.

    Returns:
        Name and weight, in the order of a Hugging Face file, layers renumbered from 0; each in
        the number format it came in.

    Raises:
        ValueError: a row of gates keeps another number of units than the target has, or target
            and source differ in something that no mask changes.

    Source: docs/algorithm.md section 3.
    """
    _check_unmasked(source, target)
    assert set(gates) <= set(KINDS), f"unknown kinds of gates in {sorted(gates)}"
    gates = {kind: gate.detach().float().cpu() for kind, gate in gates.items()}
    kept = KeptUnits.of(gates, source)
    _check_counts(kept, target)
    factors = Factors(gates, source, num_layers=source.num_layers)
    return _cut(weights, kept, factors, target, power)


def _cut(
    weights: Mapping[str, Tensor],
    kept: KeptUnits,
    factors: Factors,
    target: ModelShape,
    power: int,
) -> Iterator[tuple[str, Tensor]]:
    source, kept_layers = kept.source, kept.kept_layers
    for name, row, new_layer in weight_table.weights(target):
        layer = None if new_layer is None else kept_layers[new_layer]
        whole = weights[row.hf_name.format(layer=layer)]
        assert tuple(whole.shape) == row.extents(source), f"{name} is not of the source's shape"
        smaller = fold(whole, factors.of(row.folds, layer), power=power)
        for axis, units in enumerate(row.axes):
            indices = _kept_indices(kept, units, layer)
            if indices is not None:
                smaller = smaller.index_select(axis, indices)
        assert tuple(smaller.shape) == row.extents(target), f"{name} is not of the target's shape"
        yield name, smaller


def _kept_indices(kept: KeptUnits, axis: str, layer: int | None) -> Tensor | None:
    """Return the indices to keep along an axis of the table; None keeps all."""
    kind = ON_AXIS.get(axis)
    if kind is None:
        return None
    assert layer is not None or not kind.per_layer, f"{axis} outside the layers"
    units = _open(kept.units[kind.name][layer if kind.per_layer else 0])
    width = kind.unit_width(kept.source)
    return (units[:, None] * width + torch.arange(width)).flatten()


def _check_counts(kept: KeptUnits, target: ModelShape) -> None:
    """Refuse a kept row with another count than the target's: the cut must not fail midway."""
    source = kept.source
    for kind in kinds_of(source):
        outer, wanted = kind.outer(source), kind.row_length(target, source)
        for number, row in enumerate(kept.of_kind(kind.name)):
            if not kind.per_layer:
                _check_count("", f"the {kind.name} mask", row, wanted)
                continue
            layer, group = divmod(number, kind.rows_per_layer(source))
            where, around = f" layer {layer}", kept.units[LAYER][0, layer]
            if outer is not None:
                where += f" {outer.name} {group}"
                around = kept.units[outer.name][layer, group]
            if around:  # in a pruned layer or group, a row need keep nothing
                _check_count(where, f"its {kind.name} mask", row, wanted)


def _check_unmasked(source: ModelShape, target: ModelShape) -> None:
    for name in UNMASKED:
        found, wanted = getattr(target, name), getattr(source, name)
        if found != wanted:
            raise ValueError(
                f"cannot cut: target {name} is {found}, the source has {wanted}, and no mask "
                f"changes it; set the target's {name} to {wanted}"
            )


def _check_count(where: str, mask: str, row: Tensor, wanted: int) -> None:
    found = len(_open(row))
    if found != wanted:
        raise ValueError(
            f"cannot cut{where}: {mask} keeps {found} of {len(row)}, target wants {wanted}; train "
            f"the masks longer or cut with --exact-target, which keeps the {wanted} most open"
        )


def _open(row: Tensor) -> Tensor:
    return row.nonzero().flatten()
