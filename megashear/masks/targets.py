"""The masks that lead from a source shape to a target shape."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

from megashear.masks.kinds import EXTENTS, KINDS, kinds_of
from megashear.shape import ModelShape

UNMASKED = tuple(
    field.name
    for field in fields(ModelShape)
    # the longest sequence is no part of what a model computes
    if field.name not in (*EXTENTS, "max_position_embeddings")
)
"""Fields that a cut model has in common with its source, because no mask changes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskPart:
    """The rows and units of one kind's whole log_alpha, [num_rows, num_units], that are held here.

    A kind has one row for the model or one row per layer. With grouped queries ``head`` has a row
    for each key/value head, layer by layer, with its query heads as units. With virtual pipeline
    stages rows and units may have gaps.
    """

    kind: str
    """Kind of mask, of ``KINDS``."""
    num_rows: int
    """Rows of the whole mask."""
    num_units: int
    """Units in a whole row."""
    rows: tuple[int, ...]
    """Rows held here, by their numbers in the whole mask, rising."""
    units: tuple[int, ...] | range
    """Units held here of each row, by their numbers in the whole row, rising."""
    rows_per_layer: int = 1
    """Rows of each layer: G for ``head`` with grouped queries."""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"unknown kind of mask {self.kind!r}"
        for name, held, total in (
            ("rows", self.rows, self.num_rows),
            ("units", self.units, self.num_units),
        ):
            assert all(a < b for a, b in pairwise(held)), f"{self.kind} {name} {held} do not rise"
            assert not held or (held[0] >= 0 and held[-1] < total), (
                f"{self.kind} {name} {held} are not within 0..{total - 1}"
            )

    @property
    def extents(self) -> tuple[int, ...]:
        """Return the shape of the whole log_alpha in a checkpoint, [rows, units] or [L, G, H/G]."""
        if self.rows_per_layer == 1:
            return self.num_rows, self.num_units
        return self.num_rows // self.rows_per_layer, self.rows_per_layer, self.num_units

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers, rising, with rows or units held here, if stages divide the kind."""
        if not KINDS[self.kind].per_layer:
            return tuple(self.units)
        return tuple(sorted({row // self.rows_per_layer for row in self.rows}))

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the whole mask, if stages divide the kind."""
        return self.extents[0] if KINDS[self.kind].per_layer else self.num_units


def whole_parts(source: ModelShape, target: ModelShape) -> dict[str, MaskPart]:
    """Return the whole masks to learn in order to prune ``source`` to ``target``.

    A kind exists only where the target is smaller: otherwise, because its sparsity cannot fall to
    0, its multipliers would grow without end. Without grouped queries, attention has ``head`` masks
    over all heads of a layer. With them it has two kinds, so that every key/value head of the
    target serves the same number of query heads: ``group`` (a key/value head with its query heads)
    and ``head`` (the query heads of one key/value head, in a row).

    Args:
        source: the model to prune.
        target: the model after pruning.

    Returns:
        Whole parts by kind, in the order of ``KINDS``.

    Raises:
        ValueError: no set of masks leads from ``source`` to ``target``.
    """
    parts = {}
    for name in target_units(source, target):
        kind = KINDS[name]
        rows_per_layer = kind.rows_per_layer(source)
        num_rows = source.num_layers * rows_per_layer if kind.per_layer else 1
        num_units = kind.row_length(source, source)
        parts[name] = MaskPart(
            kind=name,
            num_rows=num_rows,
            num_units=num_units,
            rows=tuple(range(num_rows)),
            units=range(num_units),
            rows_per_layer=rows_per_layer,
        )
    return parts


def target_units(source: ModelShape, target: ModelShape) -> dict[str, int]:
    """Return the units that stay open in each row by kind, for the kinds of `whole_parts`.

    Raises:
        ValueError: no set of masks leads from ``source`` to ``target``.
    """
    check_reachable(source, target)
    units: dict[str, int] = {}
    for kind in kinds_of(source):
        wanted = kind.row_length(target, source)
        if wanted < kind.row_length(source, source):
            units[kind.name] = wanted
    if not units:
        extents = ", ".join(f"{name} {getattr(source, name)}" for name in EXTENTS)
        raise ValueError(
            f"nothing to prune: target and source both have {extents}; lower at least one of them "
            f"in the target"
        )
    return units


def check_reachable(source: ModelShape, target: ModelShape) -> None:
    """Refuse a target that has what no mask changes, or more than the source.

    Raises:
        ValueError: with the flag to set.
    """
    for name in UNMASKED:
        found, wanted = getattr(target, name), getattr(source, name)
        if found != wanted:
            raise ValueError(
                f"target {name} is {found}, the source has {wanted}, and no mask changes it; set "
                f"the target's {name} to {wanted} (a target given by --target-* extents alone "
                f"keeps the source's)"
            )
    for name in EXTENTS:
        found, most = getattr(target, name), getattr(source, name)
        if found > most:
            raise ValueError(
                f"target {name} is {found}, the source has {most}, and pruning only removes; set "
                f"{target_flag(name)} to at most {most}"
            )
    _check_heads(source, target)


def target_flag(extent: str) -> str:
    """Return the flag that sets an extent of the target, as a user types it."""
    return "--target-" + extent.replace("_", "-")


def _check_heads(source: ModelShape, target: ModelShape) -> None:
    heads, groups = target.num_attention_heads, target.num_query_groups
    most = source.heads_per_group
    if target.heads_per_group <= most:
        return
    if most == 1:
        raise ValueError(
            f"target has {heads} query heads in num_query_groups {groups}, but in the source "
            f"every query head has its own key/value head and masks do not merge them; set the "
            f"target's num_query_groups to {heads} ({target_flag('num_query_groups')})"
        )
    ways_out = [f"{target_flag('num_attention_heads')} to {groups * most}"]
    enough = range(groups + 1, source.num_query_groups + 1)
    ways_out += [
        f"{target_flag('num_query_groups')} to {more}"
        for more in enough
        if heads % more == 0 and heads // more <= most
    ][:1]
    raise ValueError(
        f"target has {heads} query heads in num_query_groups {groups}, {heads // groups} for each "
        f"key/value head; in the source each serves {most}, and masks only remove; set "
        f"{' or '.join(ways_out)}"
    )
