"""Describe and compare checkpoints as text for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from megashear.checkpoint.details import RunDetails
from megashear.masks.kinds import HEAD, HIDDEN, INTERMEDIATE, KINDS, LAYER
from megashear.models import weight_table
from megashear.models.formats import dtypes_of, name_of
from megashear.models.kept import KeptUnits
from megashear.report.comparison import Difference, GateDifference, WeightDistance
from megashear.report.kept import MaskReading, Mode
from megashear.report.open_model import OpenModel
from megashear.shape import ModelShape
from megashear.text_table import text_table

_NAMES = {
    **{k.extent: f"{k.units} per layer" if k.per_layer else k.units for k in KINDS.values()},
    "head_dim": "width of a head",
    "vocab_size": "vocabulary",
}
EXTENT_NAMES = {of.name: _NAMES[of.name] for of in fields(ModelShape) if of.name in _NAMES}
"""Extents of a model that a table lists, as a person says them."""
BINS = 24
"""Characters in which the neurons of a layer are drawn."""
SHADES = " .:-=+*#"
"""Share of kept units in a bin, from none to all."""
LISTED = 20
"""Lines of a list that a terminal gets; JSON has all."""


def describe(opened: OpenModel, *, mode: Mode = "exact") -> str:
    """Describe a model in words and tables: extents, parameters, masks where it has some.

    Args:
        opened: the model.
        mode: gates that the map by layer shows.
    """
    parts = [f"{opened.path}: {opened.title}", _extents(opened)]
    if opened.masks is not None:
        parts += [mask_table(opened.masks), layer_map(opened.masks, mode)]
    parts.append(_facts(opened))
    return "\n\n".join(part for part in parts if part)


def mask_table(masks: MaskReading) -> str:
    """Return a table of masks, a line for each kind: target, kept and undecided gates."""
    rows = [
        ["masks", "of", "target", "expected", "exact", "undecided", "changed by rounding"],
    ]
    for kind, summary in masks.kinds.items():
        fewest, most = summary.fewest_open, summary.most_open
        outer = KINDS[kind].outer(masks.source)
        each = "" if outer is None else f" in each {outer.unit}"
        rows.append(
            [
                KINDS[kind].units + each,
                f"{summary.num_units:,}",
                f"{summary.target:,}",
                f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}",
                f"{summary.target:,}",
                f"{summary.num_undecided:,} of {summary.num_gates:,}",
                f"{summary.num_changed:,} of {summary.num_gates:,}",
            ]
        )
    whole = masks.source.num_params()
    rows.append(
        [
            "parameters",
            f"{whole:,}",
            f"{masks.target.num_params():,}",
            f"{masks.expected.num_params():,}",
            f"{masks.exact.num_params():,}",
            "",
            "",
        ]
    )
    return text_table(rows)


def layer_map(masks: MaskReading, mode: Mode) -> str:
    """Return which units of which layer are kept: heads one by one, neurons in bins."""
    kept = masks.kept(mode)
    source = masks.source
    rows = [[KINDS[LAYER].unit, "heads", "kept", f"neurons, {BINS} bins", "kept"]]
    for layer in range(source.num_layers):
        if not kept.units[LAYER][0, layer]:
            rows.append([f"{layer}", "a pruned layer", "", "", ""])
            continue
        neurons = kept.units[INTERMEDIATE][layer]
        rows.append(
            [
                f"{layer}",
                heads_as_text(kept, layer),
                f"{int(kept.units[HEAD][layer].sum())} of {source.num_attention_heads}",
                "|" + shares_as_text(neurons) + "|",
                f"{int(neurons.sum()):,} of {source.ffn_hidden_size:,}",
            ]
        )
    text = text_table(rows, left=4)
    pruned, hidden = kept.removed_layers, kept.units[HIDDEN][0]
    lines = [
        f"in {mode} mode (# kept, . pruned; bins from ' ' none to '{SHADES[-1]}' all kept):",
        text,
        f"hidden |{shares_as_text(hidden, 2 * BINS)}| {int(hidden.sum()):,} of "
        f"{source.hidden_size:,}",
    ]
    if pruned:
        lines.append(f"pruned layers: {', '.join(map(str, pruned))}")
    return "\n".join(lines)


def heads_as_text(kept: KeptUnits, layer: int) -> str:
    """Return a layer's query heads, ``#`` kept and ``.`` pruned, key/value groups apart."""
    width = kept.source.heads_per_group
    signs = "".join("#" if is_kept else "." for is_kept in kept.units[HEAD][layer].tolist())
    if width == 1:
        return signs
    return " ".join(signs[at : at + width] for at in range(0, len(signs), width))


def shares_as_text(row: Tensor, bins: int = BINS) -> str:
    """Return the kept share of a row's units, bin by bin; blank is none and ``#`` is all."""
    text = ""
    bins = min(bins, len(row))
    for number in range(bins):
        part = row[len(row) * number // bins : len(row) * (number + 1) // bins]
        share = float(part.double().mean())
        # none and all have signs of their own
        inner = 1 + min(int(share * (len(SHADES) - 2)), len(SHADES) - 3)
        text += SHADES[0] if share == 0 else SHADES[-1] if share == 1 else SHADES[inner]
    return text


def compare_text(
    fields: Sequence[Difference],
    gates: Sequence[GateDifference] | None,
    weights: Sequence[WeightDistance] | None,
    notes: Sequence[str],
) -> str:
    """Return what differs between two models.

    Args:
        fields: of their descriptions.
        gates: of their masks; None where there was nothing to compare.
        weights: distances of all weights; None where they were not compared.
        notes: why something was not compared.
    """
    parts = [_fields_text(fields)]
    if gates is not None:
        parts.append(_gates_text(gates))
    if weights is not None:
        parts.append(_weights_text(weights))
    return "\n\n".join([*parts, *notes])


def _extents(opened: OpenModel) -> str:
    shapes: dict[str, ModelShape] = {"model": opened.shape}
    known = RunDetails() if opened.description is None else opened.description.known
    if known.source_shape is not None:
        shapes = {"source": known.source_shape, "model": opened.shape}
    elif opened.masks is not None:
        shapes = {"model": opened.shape, "target": opened.masks.target}
    rows = [["", *shapes]]
    for field, name in EXTENT_NAMES.items():
        rows.append([name, *(f"{getattr(shape, field):,}" for shape in shapes.values())])
    for name, wanted in PARTS.items():
        rows.append([name, *(f"{part_params(shape, wanted):,}" for shape in shapes.values())])
    rows.append(["parameters", *(f"{shape.num_params():,}" for shape in shapes.values())])
    return text_table(rows)


PARTS = {
    "parameters of the embedding": r"model\.embed_tokens\..*|lm_head\..*",
    "parameters of attention": r".*\.self_attn\..*",
    "parameters of the MLPs": r".*\.mlp\..*",
    "parameters of the norms": r".*layernorm\..*|model\.norm\..*",
}
"""Parts of a model by the names of their weights; together they are all of it."""


def part_params(shape: ModelShape, wanted: str) -> int:
    """Return the number of parameters in weights whose names a pattern matches."""
    return sum(
        math.prod(extents)
        for name, extents in weight_table.hf_shapes(shape).items()
        if re.fullmatch(wanted, name)
    )


def _facts(opened: OpenModel) -> str:
    shape = opened.shape
    lines = [f"family {shape.family}, rotary base {shape.rotary_base:g}"]
    lines[0] += ", tied embeddings" if shape.tied_embeddings else ""
    formats = sorted({name_of(dtype) for dtype in dtypes_of(opened.weights).values()})
    lines.append(f"weights in {', '.join(formats)}")
    if opened.description is None:
        return "\n".join(lines)
    known = opened.description.known
    if known.pruned_for is not None:
        lines.append(f"pruned for {known.pruned_for:,} steps")
    if (origin := origin_text(known)) is not None:
        lines.append(origin)
    if known.rounding:
        changed = ", ".join(f"{n:,} {KINDS[kind].units}" for kind, n in known.rounding.items())
        lines.append(f"gates that rounding to the target changed: {changed}")
    if known.consumed_samples is not None and known.loader is not None:
        length = known.loader["sequence_length"]
        lines.append(f"{known.consumed_samples:,} sequences read, of {length:,} tokens now")
    for mode, losses in known.held_out_loss.items():
        what = "held-out loss" if mode == "loss" else f"held-out loss under {mode} masks"
        mean = sum(losses.values()) / len(losses)
        lines.append(
            f"{what}: {mean:.4f} ({', '.join(f'{n} {loss:.4f}' for n, loss in losses.items())})"
        )
    return "\n".join(lines)


def origin_text(known: RunDetails) -> str | None:
    """Return in a sentence how scores chose a model's units; None for a model without them."""
    measured = known.importance_scores
    if not measured:
        return None
    file = f" ({measured['file']})" if "file" in measured else ""
    return f"units were chosen by importance scores{measured_text(measured)}{file}"


def measured_text(measured: Mapping[str, Any]) -> str:
    """Return what scores are of; scores of a script may leave out all of it."""
    parts = []
    if "model" in measured:
        parts.append(f" of {measured['model']}")
    if "sequences" in measured:
        parts.append(f" on {measured['sequences']} sequences")
    if "sequence length" in measured:
        parts.append(f" of {measured['sequence length']} tokens")
    return "".join(parts)


def _fields_text(fields: Sequence[Difference]) -> str:
    if not fields:
        return "descriptions: the same"
    rows = [["descriptions differ in", "first", "second"]]
    rows += [[f.field, _short(f.first), _short(f.second)] for f in fields[: 3 * LISTED]]
    more = len(fields) - 3 * LISTED
    return text_table(rows, left=3) + (f"\n... and {more} more, see --json" if more > 0 else "")


def _gates_text(gates: Sequence[GateDifference]) -> str:
    if not gates:
        return "masks: the same gates open"
    rows = [["gates that differ", "row", "kept by the first alone", "kept by the second alone"]]
    for found in gates[:LISTED]:
        rows.append(
            [
                KINDS[found.kind].units,
                str(found.row),
                _numbers(found.only_first),
                _numbers(found.only_second),
            ]
        )
    more = len(gates) - LISTED
    total: dict[str, int] = {}
    for found in gates:
        num = len(found.only_first) + len(found.only_second)
        total[found.kind] = total.get(found.kind, 0) + num
    sums = ", ".join(f"{num:,} {KINDS[kind].units}" for kind, num in total.items())
    text = text_table(rows, left=4)
    text += f"\n... and {more} more rows, see --json" if more > 0 else ""
    return f"{text}\nin all: {sums}"


def _weights_text(weights: Sequence[WeightDistance]) -> str:
    equal = sum(weight.distance == 0 for weight in weights)
    if equal == len(weights):
        return f"weights: all {equal} are equal, bit for bit or as values"
    rows = [["weights that differ, by kind", "equal", "differ", "mean", "largest", "of"]]
    kinds: dict[str, list[WeightDistance]] = {}
    for weight in weights:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", weight.name), []).append(weight)
    for kind, members in kinds.items():
        # what is not a number counts as farther than all else
        worst = max(members, key=lambda w: math.inf if math.isnan(w.relative) else w.relative)
        same = sum(weight.distance == 0 for weight in members)
        mean = sum(weight.relative for weight in members) / len(members)
        rows.append(
            [
                kind,
                str(same),
                str(len(members) - same),
                f"{mean:.3g}",
                f"{worst.relative:.3g}",
                worst.name if len(members) > 1 else "",
            ]
        )
    return (
        text_table(rows)
        + "\ndistances are relative, ||a - b|| / ||a|| of each weight; --json lists every one"
    )


def _short(value: Any, most: int = 60) -> str:
    text = "-" if value is None else str(value)
    if isinstance(value, Mapping):
        text = f"({len(value)} fields)"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _numbers(units: Sequence[int], most: int = 12) -> str:
    text = ", ".join(map(str, units[:most]))
    return text + (f" and {len(units) - most:,} more" if len(units) > most else "")
