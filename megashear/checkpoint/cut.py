"""Fold deterministic gates into the weights and drop what they closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megashear.masks.kinds import KINDS
from megashear.masks.targets import UNMASKED
from megashear.models import layout
from megashear.shape import ModelShape


def cut(
    weights: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
    source: ModelShape,
    target: ModelShape,
    *,
    power: int = 1,
) -> Iterator[tuple[str, Tensor]]:
    """The smaller model that computes what the masked one does.

    logits(masked with ``gates``) = logits(cut), to float32's rounding: what masks fold where is in
    the table (`layout.table`). Everything is checked before the first weight is read; weights are
    then read, folded in float32 and rounded once, one at a time.

    Args:
        weights: of the source by Hugging Face name; may read each weight when it is asked for.
        gates: whole deterministic gates by kind, 0 where closed: hidden [1, h], layer [1, L],
            head [L, H], group [L, G], intermediate [L, I]. An absent kind is fully open. With
            grouped queries head may come as [L * G, H/G], a row for each key/value head, and a
            query head is open where its own gate and its group's are.
        source: extents of ``weights``.
        target: extents of the model to make.
        power: of the gates that is multiplied into what stays; 1 for weights.

    Returns:
        Name and weight, in the order of a Hugging Face file, layers renumbered from 0; each in
        the number format it came in.

    Raises:
        ValueError: a row of gates keeps another number of units than the target has, or target
            and source differ in something that no mask changes.

    Source: docs/algorithm.md section 3.
    """
    _check_unmasked(source, target)
    opened = _Gates(gates, source)
    opened.check(target)
    return _cut(weights, opened, source, target, power)


def _cut(
    weights: Mapping[str, Tensor],
    opened: _Gates,
    source: ModelShape,
    target: ModelShape,
    power: int,
) -> Iterator[tuple[str, Tensor]]:
    kept_layers = opened.kept_layers()
    for name, row, new_layer in layout.weights(target):
        layer = None if new_layer is None else kept_layers[new_layer]
        whole = weights[row.hf_name.format(layer=layer)]
        assert tuple(whole.shape) == row.extents(source), f"{name} is not of the source's shape"
        folded = whole.float()
        for axis, (units, kinds) in enumerate(zip(row.axes, row.folds)):
            keep = opened.kept(units, layer)
            if keep is not None:
                folded = folded.index_select(axis, keep)
            for kind in kinds:
                factor = opened.factor(kind, layer)
                if len(factor) > 1 and keep is not None:
                    factor = factor[keep]
                factor = factor if power == 1 else factor**power
                folded = folded * factor.view(-1, *[1] * (whole.dim() - axis - 1))
        assert tuple(folded.shape) == row.extents(target), f"{name} is not of the target's shape"
        yield name, folded.to(whole.dtype)


class _Gates:
    """Whole gates of every kind, open where none were given, and the units they keep."""

    def __init__(self, gates: Mapping[str, Tensor], source: ModelShape) -> None:
        assert set(gates) <= set(KINDS), f"unknown kinds of gates in {sorted(gates)}"
        self.source = source
        self.of: dict[str, Tensor] = {}  # float32 [num_rows, num_units]
        for kind in KINDS:
            extents = KINDS[kind].extents(source)
            given = gates.get(kind, torch.ones(extents))
            self.of[kind] = given.detach().float().cpu().reshape(extents)
        groups = self.of["group"].repeat_interleave(source.heads_per_group, dim=1)
        self.heads = self.of["head"] * groups  # [L, H]
        # Without grouped queries a query head and its key/value head are one unit.
        self.groups = self.heads if source.heads_per_group == 1 else self.of["group"]  # [L, G]

    def kept_layers(self) -> list[int]:
        """Numbers of the open layers, from 0, rising."""
        return _open(self.of["layer"][0]).tolist()

    def kept(self, axis: str, layer: int | None) -> Tensor | None:
        """Indices to keep along an axis of the table; None keeps all."""
        if axis in ("vocab", "head_dim"):
            return None
        if axis == "hidden":
            return _open(self.of["hidden"][0])
        if axis == "intermediate":
            return _open(self.of["intermediate"][layer])
        assert axis in ("query", "key_value"), f"no mask is known for axis {axis}"
        units = _open((self.heads if axis == "query" else self.groups)[layer])
        width = torch.arange(self.source.head_dim)
        return (units[:, None] * self.source.head_dim + width).flatten()

    def factor(self, kind: str, layer: int | None) -> Tensor:
        """What to multiply into an axis for one kind of the table: its whole length, or [1]."""
        if kind == "layer":
            return self.of["layer"][0, layer].view(1)
        if kind == "head":
            return self.heads[layer].repeat_interleave(self.source.head_dim)
        return self.of[kind][0 if kind == "hidden" else layer]

    def check(self, target: ModelShape) -> None:
        """Hold every row that stays to the target's count, so that the cut cannot fail midway."""
        _check_count("", "the hidden mask", self.of["hidden"][0], target.hidden_size)
        _check_count("", "the layer mask", self.of["layer"][0], target.num_layers)
        for layer in self.kept_layers():
            at = f" layer {layer}"
            neurons = self.of["intermediate"][layer]
            _check_count(at, "its intermediate mask", neurons, target.ffn_hidden_size)
            if self.source.heads_per_group == 1:
                heads = self.heads[layer]
                _check_count(at, "its head mask", heads, target.num_attention_heads)
            else:
                _check_count(at, "its group mask", self.groups[layer], target.num_query_groups)
            by_group = self.heads[layer].unflatten(0, (self.source.num_query_groups, -1))
            for group in _open(self.groups[layer]).tolist():
                inside = f"{at} group {group}"
                _check_count(inside, "its head mask", by_group[group], target.heads_per_group)


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
