"""Proposed shapes as text for people, and as values for programs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from megashear.masks.kinds import EXTENTS, HIDDEN
from megashear.masks.targets import target_units
from megashear.planning.budget import Budget, kv_bytes, weight_bytes
from megashear.planning.hardware import GB
from megashear.planning.proposals import (
    DEEPEST,
    DIVISOR,
    INDIVISIBLE,
    Deviation,
    Proposal,
    deviation,
)
from megashear.planning.published import Published, published_near
from megashear.planning.shapes import Shapes
from megashear.shape import ModelShape
from megashear.text_table import text_table

_HEAD = (
    *("layers", HIDDEN, "heads", "kv", "neurons", "parameters", "GB", "KV bytes", "ms"),
    *("tp", "distance", "what is off"),
)
MOST_RANKS = 8
"""Most tensor ranks that the table looks at, as many as a node has."""
WIDTH = 100
"""Characters of a line of text."""
NOTED = 0.005
"""Smallest logarithm of a ratio that is said in words."""


def shape_lines(shapes: Shapes, *, top: int) -> Iterator[str]:
    """Yield the lines about proposed shapes: a table, published shapes, the first as flags.

    Args:
        shapes: the proposals.
        top: rows of the table.
    """
    source, budget, first = shapes.source, shapes.budget, shapes.first
    forward = budget.forward
    yield (
        f"shapes for {budget.flags}, pruned from {source.num_params():,} parameters; ms for "
        f"{forward.sequences} x {forward.seq_length:,} tokens forward on one {forward.gpu.name}, "
        f"{100 * forward.share.value:.3g} % of its peak ({forward.share.source})"
    )
    yield ""
    near = published_near(first.shape.num_params())
    rows = [_row(one.shape, shapes, _off(one, shapes)) for one in shapes.found[:top]]
    beside = [_row(one.shape, shapes, _of_published(one, shapes)) for one in near]
    text = _table([_HEAD, *rows, *beside])
    yield from text[: 1 + len(rows)]
    if len(shapes.found) > top:
        yield f"and {len(shapes.found) - top} more; --top {len(shapes.found)} shows all"
    if near:
        yield ""
        yield "Published models of about this size:"
        yield from text[1 + len(rows) :]
    yield ""
    for reason in _reasons(shapes):
        yield from textwrap.wrap(reason, width=WIDTH)
    yield ""
    yield f"The first: {first.flags(source)}"


def shapes_as_dict(shapes: Shapes) -> list[dict[str, Any]]:
    """Return plain values of every proposed shape, for JSON: bytes and seconds."""
    return [
        {
            "shape": one.shape.to_dict(),
            "parameters": one.shape.num_params(),
            "weight_bytes": weight_bytes(one.shape),
            "kv_bytes_per_token": kv_bytes(one.shape),
            "forward_seconds": shapes.budget.forward.seconds(one.shape),
            "distance": one.deviation.distance,
            "deviation": asdict(one.deviation),
            "flags": one.flags(shapes.source),
        }
        for one in shapes.found
    ]


def _row(shape: ModelShape, shapes: Shapes, off: tuple[str, str]) -> tuple[str, ...]:
    """Return the cells of a shape."""
    return (
        str(shape.num_layers),
        str(shape.hidden_size),
        str(shape.num_attention_heads),
        str(shape.num_query_groups),
        f"{shape.ffn_hidden_size:,}",
        f"{shape.num_params():,}",
        f"{weight_bytes(shape) / GB:.2f}",
        f"{kv_bytes(shape):,}",
        f"{1e3 * shapes.budget.forward.seconds(shape):.1f}",
        str(_most_ranks(shape)),
        off[0],
        off[1],
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines whose last cell, a text, is aligned to the left."""
    numbers = text_table([row[:-1] for row in rows], left=0, rule=False).splitlines()
    return [f"{line}  {row[-1]}" for line, row in zip(numbers, rows)]


def _most_ranks(shape: ModelShape) -> int:
    """Return the most tensor ranks of a node that divide a shape."""
    extents = math.gcd(shape.num_query_groups, shape.ffn_hidden_size)
    return max(n for n in range(1, MOST_RANKS + 1) if extents % n == 0)


def _off(one: Proposal, shapes: Shapes) -> tuple[str, str]:
    """Return the distance of a proposal, and what it comes from in words."""
    same = [
        known.name
        for known in published_near(one.shape.num_params())
        if all(getattr(known.shape, e) == getattr(one.shape, e) for e in (*EXTENTS, "head_dim"))
    ]
    words = [f"the shape of {name}" for name in same] + _in_words(one.deviation, shapes.budget)
    return f"{one.deviation.distance:.3f}", "; ".join(words) or "nothing"


def _of_published(known: Published, shapes: Shapes) -> tuple[str, str]:
    """Return the distance of a published shape by the same measure, and what it was pruned from."""
    name = f"{known.name}, from {known.source}"
    extents = {extent: getattr(known.shape, extent) for extent in (*EXTENTS, "head_dim")}
    target = replace(shapes.source, **extents)
    try:
        target_units(shapes.source, target)
    except ValueError:
        return "-", f"{name}; no masks lead there from --model"
    found = deviation(target, shapes.source, shapes.budget)
    return f"{found.distance:.3f}", "; ".join([name, *_in_words(found, shapes.budget)])


def _in_words(found: Deviation, budget: Budget) -> list[str]:
    """Return the parts of a deviation that are worth a word, signed, as a person says them."""
    what = "parameters" if budget.params is not None else "budget"
    parts = [
        (found.budget, f"{what} {{}}"),
        (found.attention, "heads {} for the width"),
        (found.neurons, "neurons {} for the width"),
        (found.depth, "width per layer {} out of range"),
        (found.groups, "KV heads {}"),
    ]
    words = [
        text.format(f"{100 * math.expm1(value):+.1f} %")
        for value, text in parts
        if abs(value) > NOTED
    ]
    words += [f"layers not by {DIVISOR}"] * bool(found.layers_apart)
    words += [f"KV heads not by {DIVISOR}"] * bool(found.groups_apart)
    return words


def _reasons(shapes: Shapes) -> Iterator[str]:
    """Yield why the first is first, and how distances are counted."""
    source, shape = shapes.source, shapes.first.shape
    kept = ", ".join(
        f"{getattr(shape, extent):,} of {getattr(source, extent):,} {name}"
        for extent, name in (
            ("num_layers", "layers"),
            ("hidden_size", "hidden dimensions"),
            ("num_attention_heads", "heads"),
            ("ffn_hidden_size", "neurons"),
        )
    )
    yield (
        f"Why the first: it keeps {kept}; heads take {_width(shape):.2f} of the width and neurons "
        f"{shape.ffn_hidden_size / shape.hidden_size:.2f}, as {_width(source):.2f} and "
        f"{source.ffn_hidden_size / source.hidden_size:.2f} in the source; the hidden size per "
        f"layer is {_flatness(shape) / _flatness(source):.2f} of the source's."
    )
    yield (
        "Distance adds logarithms: of the budget's use, of heads and neurons for the width against "
        f"the source's, of the width per layer where it is outside of {DEEPEST:g} to 1 of the "
        f"source's (most published prunings are within), of KV heads; and {INDIVISIBLE:g} each for "
        f"layers and KV heads that {DIVISOR} does not divide."
    )


def _width(shape: ModelShape) -> float:
    return shape.num_attention_heads * shape.head_dim / shape.hidden_size


def _flatness(shape: ModelShape) -> float:
    return shape.hidden_size / shape.num_layers
