"""The table of kinds of mask: the units of each, who holds its gates, and its words for people."""

from __future__ import annotations

from dataclasses import dataclass

from megashear.shape import ModelShape

HIDDEN, HEAD, GROUP, INTERMEDIATE, LAYER = "hidden", "head", "group", "intermediate", "layer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of mask: one gate for each of its units, in rows that are pruned to equal counts."""

    name: str
    """Its name in checkpoints, in TensorBoard tags, and in the key of the noise."""
    unit: str
    """Word for one of its units; the plural adds an s."""
    extent: str
    """Extent of `ModelShape` that it lowers: the number of units in a model, or in a layer."""
    per_layer: bool = False
    """Whether every layer has its own units and rows; else one row has the units of the model."""
    within: str | None = None
    """Kind whose units contain this kind's units, as key/value heads contain query heads. If each
    contains several (grouped queries), both kinds have masks, and this kind has a row for each
    outer unit. If each contains one, only this kind has a mask, which prunes both."""
    split_over_tensor: bool = False
    """Whether tensor ranks divide the mask as they divide its weights: the units of a row, or whole
    rows where a layer has several."""
    split_over_pipeline: bool = False
    """Whether pipeline stages divide the mask as they divide layers: by rows, or by units."""
    axis: str | None = None
    """Axis of weights along which its units lie, a key of the weight table's `AXES`, which the cut
    shortens; None if its units are whole weights. `Weight.folds` says where gates are folded in."""
    width: str | None = None
    """Extent that is the number of places of a unit on the axis; one place if None."""
    crowded: bool = False
    """Whether it has thousands of units, so that pictures put neighbours together."""

    @property
    def units(self) -> str:
        """Return the word for several of its units."""
        return f"{self.unit}s"

    def size(self, shape: ModelShape) -> int:
        """Return the number of its units in a model, or in each layer if layers have their own."""
        found: int = getattr(shape, self.extent)
        return found

    def unit_width(self, shape: ModelShape) -> int:
        """Return the number of places that one unit takes on `axis`."""
        found: int = 1 if self.width is None else getattr(shape, self.width)
        return found

    def axis_length(self, shape: ModelShape) -> int:
        """Return the length of `axis` in a model of ``shape``."""
        return self.size(shape) * self.unit_width(shape)

    def extents(self, shape: ModelShape) -> tuple[int, int]:
        """Return the shape of a value for each unit: [L, units] or [1, units]."""
        return shape.num_layers if self.per_layer else 1, self.size(shape)

    def num_gates(self, shape: ModelShape) -> int:
        """Return the number of its gates in a model, in all rows."""
        rows, units = self.extents(shape)
        return rows * units

    def outer(self, source: ModelShape) -> Kind | None:
        """Return the kind whose units each contain several of this kind's units, or None."""
        if self.within is None:
            return None
        outer = KINDS[self.within]
        return outer if outer.size(source) < self.size(source) else None

    def pruned_by(self, source: ModelShape) -> Kind:
        """Return the kind whose mask prunes this kind's units: another one if both are one unit."""
        inside = (kind for kind in KINDS.values() if kind.within == self.name)
        return next((kind for kind in inside if kind.outer(source) is None), self)

    def rows_per_layer(self, source: ModelShape) -> int:
        """Return the number of rows of its mask in a layer; 1 if rows do not belong to layers."""
        outer = self.outer(source)
        return 1 if outer is None else outer.size(source)

    def row_length(self, shape: ModelShape, source: ModelShape) -> int:
        """Return the units of ``shape`` in a row, with rows as masks on ``source`` have them."""
        outer = self.outer(source)
        return self.size(shape) // (1 if outer is None else outer.size(shape))


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name=HIDDEN, unit="hidden dimension", extent="hidden_size", axis="hidden", crowded=True
        ),
        Kind(
            name=HEAD,
            unit="query head",
            extent="num_attention_heads",
            per_layer=True,
            within=GROUP,
            split_over_tensor=True,
            split_over_pipeline=True,
            axis="query",
            width="head_dim",
        ),
        Kind(
            name=GROUP,
            unit="key/value head",
            extent="num_query_groups",
            per_layer=True,
            split_over_tensor=True,
            split_over_pipeline=True,
            axis="key_value",
            width="head_dim",
        ),
        Kind(
            name=INTERMEDIATE,
            unit="neuron",
            extent="ffn_hidden_size",
            per_layer=True,
            split_over_tensor=True,
            split_over_pipeline=True,
            axis="intermediate",
            crowded=True,
        ),
        Kind(name=LAYER, unit="layer", extent="num_layers", split_over_pipeline=True),
    )
}
"""Kinds of mask by name, in the order in which every process handles them."""

SPLIT_OVER_TENSOR = frozenset(name for name, kind in KINDS.items() if kind.split_over_tensor)
"""Kinds that tensor ranks divide."""
SPLIT_OVER_PIPELINE = frozenset(name for name, kind in KINDS.items() if kind.split_over_pipeline)
"""Kinds that pipeline stages divide."""
EXTENTS = tuple(kind.extent for kind in KINDS.values())
"""Extents of a model that masks lower."""
ON_AXIS = {kind.axis: kind for kind in KINDS.values() if kind.axis is not None}
"""The kind of mask whose units lie along an axis of weights, by axis."""


def kinds_of(source: ModelShape) -> list[Kind]:
    """Return the kinds that have masks; without grouped queries ``group`` has none."""
    return [kind for kind in KINDS.values() if kind.pruned_by(source) is kind]
