"""The table: every kind of mask, the units it prunes, who holds its gates, its words for people."""

from __future__ import annotations

from dataclasses import dataclass

from megashear.shape import ModelShape

HIDDEN, HEAD, GROUP, INTERMEDIATE, LAYER = "hidden", "head", "group", "intermediate", "layer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of mask: one gate for each of its units, in rows that are pruned to equal counts."""

    name: str
    """Stands in checkpoints, in TensorBoard's tags, and in the key of the noise."""
    unit: str
    """What people call one of its units; several have an s."""
    extent: str
    """The extent of :class:`ModelShape` that it lowers: how many units a model, or a layer, has."""
    per_layer: bool = False
    """Whether every layer has units, and rows, of its own; else one row has the whole model's."""
    within: str | None = None
    """Kind whose units hold this kind's, as key/value heads hold query heads. With several in each
    (grouped queries), rows are those of the outer units and both kinds have masks; with one in
    each, this kind's gate prunes both."""
    split_over_tensor: bool = False
    """Whether tensor ranks divide it, with its weights: the units of a row, or whole rows where a
    layer has several."""
    split_over_pipeline: bool = False
    """Whether pipeline stages divide it, with their layers: rows, or units that are layers."""
    axis: str | None = None
    """Axis of weights that its units lie along, which the cut shortens (the weight table's `AXES`);
    None for whole weights. Where its gates are multiplied in is said by `Weight.folds`."""
    width: str | None = None
    """Extent that says how many places of the axis a unit takes; one unless given."""
    crowded: bool = False
    """Whether it has thousands of units, of which pictures show neighbours together."""

    @property
    def units(self) -> str:
        """Return what people call several of its units."""
        return f"{self.unit}s"

    def size(self, shape: ModelShape) -> int:
        """Return its units in a model, or in each layer if they have units of their own."""
        found: int = getattr(shape, self.extent)
        return found

    def unit_width(self, shape: ModelShape) -> int:
        """Return the places that one unit takes of `axis`."""
        found: int = 1 if self.width is None else getattr(shape, self.width)
        return found

    def axis_length(self, shape: ModelShape) -> int:
        """Return the length of `axis` in a model of ``shape``."""
        return self.size(shape) * self.unit_width(shape)

    def extents(self, shape: ModelShape) -> tuple[int, int]:
        """Return the shape of a value for each unit: [L, units] or [1, units]."""
        return shape.num_layers if self.per_layer else 1, self.size(shape)

    def num_gates(self, shape: ModelShape) -> int:
        """Return its gates in a model, all rows together."""
        rows, units = self.extents(shape)
        return rows * units

    def outer(self, source: ModelShape) -> Kind | None:
        """Return the kind whose units hold several of this one's each, in a model that has such."""
        if self.within is None:
            return None
        outer = KINDS[self.within]
        return outer if outer.size(source) < self.size(source) else None

    def pruned_by(self, source: ModelShape) -> Kind:
        """Return the kind whose mask prunes its units: another where the two are one unit."""
        inside = (kind for kind in KINDS.values() if kind.within == self.name)
        return next((kind for kind in inside if kind.outer(source) is None), self)

    def rows_per_layer(self, source: ModelShape) -> int:
        """Return the rows of its mask in each layer of a model; 1 where a row is no layer's."""
        outer = self.outer(source)
        return 1 if outer is None else outer.size(source)

    def row_length(self, shape: ModelShape, source: ModelShape) -> int:
        """Return the units of ``shape`` in a row, where rows are those of masks on ``source``."""
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
"""Kinds of mask by name, in the order in which every process goes through them."""

SPLIT_OVER_TENSOR = frozenset(name for name, kind in KINDS.items() if kind.split_over_tensor)
"""Kinds that tensor ranks divide."""
SPLIT_OVER_PIPELINE = frozenset(name for name, kind in KINDS.items() if kind.split_over_pipeline)
"""Kinds that pipeline stages divide."""
EXTENTS = tuple(kind.extent for kind in KINDS.values())
"""Extents of a model that masks lower."""
ON_AXIS = {kind.axis: kind for kind in KINDS.values() if kind.axis is not None}
"""The kind whose units lie along an axis of weights."""


def kinds_of(source: ModelShape) -> list[Kind]:
    """Return the kinds that have masks of their own; without grouped queries ``group`` has none."""
    return [kind for kind in KINDS.values() if kind.pruned_by(source) is kind]
