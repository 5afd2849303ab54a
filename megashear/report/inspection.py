"""What `megashear inspect` does: open one model or two, say what is in them, write it down."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear.checkpoint.scores import read_scores
from megashear.files import durable
from megashear.files.output import check_writable, writing
from megashear.models import weight_table
from megashear.models.formats import dtypes_of, name_of
from megashear.monitor.console import progress
from megashear.monitor.drawing import check_image, save
from megashear.report import scores, tables
from megashear.report.comparison import (
    check_comparable,
    differing_fields,
    differing_gates,
    same_shapes,
    weight_distances,
)
from megashear.report.kept import Mode
from megashear.report.mask_map import mask_map
from megashear.report.open_model import OpenModel, open_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inspect(
    load: Path | str,
    compare: Path | str | None = None,
    *,
    mode: Mode = "exact",
    image: Path | str | None = None,
    json_file: Path | str | None = None,
    weights: bool = True,
    contents: bool = False,
) -> str:
    """Look into a model, or hold two to each other.

    Args:
        load: what `open_model` takes, or a file of `megashear score`.
        compare: another one.
        mode: gates that the map, the picture and the comparison of masks are about.
        image: figure to write of a pruning run's masks, or of scores.
        json_file: where to write everything, unabridged.
        weights: with ``compare``, measure the distance of every weight.
        contents: compare every file of a checkpoint with its checksum first.

    Returns:
        The text for the terminal.

    Raises:
        ValueError: an output exists; nothing to draw; see `open_model`.
    """
    if image is not None:
        check_image(Path(image), "--image")
    if json_file is not None and Path(json_file).exists():
        raise ValueError(f"--json {json_file} exists; choose another or remove it first")
    for flag, path in (("--image", image), ("--json", json_file)):
        if path is not None:
            check_writable(flag, path)
    if Path(load).suffix == ".json" and Path(load).is_file():
        return _inspect_scores(Path(load), compare, image, json_file)
    first = open_model(load, contents=contents)
    if image is not None and first.masks is None:
        raise ValueError(
            f"--image {image} draws masks, and {first.path} ({first.title}) has none; give a "
            f"checkpoint that megashear prune wrote"
        )
    if compare is None:
        text, found = tables.describe(first, mode=mode), as_values(first)
    else:
        text, found = _compare(first, open_model(compare, contents=contents), mode, weights)
    figure = None
    if image is not None:
        assert first.masks is not None, "checked above"
        figure = mask_map(first.masks.kept(mode), title=f"{first.title}, {mode} masks")
    return _written(text, found, figure, image, json_file)


def _inspect_scores(
    load: Path, compare: Path | str | None, image: Path | str | None, json_file: Path | str | None
) -> str:
    """Look into a file of importance scores; arguments are those of `inspect`."""
    if compare is not None:
        raise ValueError(
            f"--compare {compare} is for two models, and {load} is a file of scores; leave it out"
        )
    found = read_scores(load, "--load")
    figure = None if image is None else scores.draw_scores(found, title=f"{scores.KIND}, {load}")
    return _written(
        scores.describe_scores(found), scores.as_values(found), figure, image, json_file
    )


def _written(
    text: str,
    found: Mapping[str, Any],
    figure: Figure | None,
    image: Path | str | None,
    json_file: Path | str | None,
) -> str:
    """Write the figure and the plain values where asked, and return the text for the terminal."""
    written = []
    if image is not None:
        assert figure is not None, "drawn where asked for"
        with writing("--image", image):
            save(figure, Path(image))
        written.append(f"wrote {image}")
    if json_file is not None:
        with writing("--json", json_file):
            Path(json_file).parent.mkdir(parents=True, exist_ok=True)
            durable.replace(Path(json_file), json.dumps(_plain(found), indent=2) + "\n")
        written.append(f"wrote {json_file}")
    return "\n\n".join([text, *(["\n".join(written)] if written else [])])


def as_values(opened: OpenModel) -> dict[str, Any]:
    """Return all that is known of a model as plain values."""
    values: dict[str, Any] = {
        "path": str(opened.path),
        "kind": opened.kind,
        "shape": opened.shape.to_dict(),
        "parameters": opened.shape.num_params(),
        "formats": sorted({name_of(dtype) for dtype in dtypes_of(opened.weights).values()}),
    }
    if opened.description is not None:
        said = dataclasses.asdict(opened.description)
        values |= {name: said[name] for name in ("stage", "iteration", "token_ids", "details")}
    if (masks := opened.masks) is not None:
        values["masks"] = {
            "target": masks.target.to_dict(),
            "kinds": {kind: dataclasses.asdict(one) for kind, one in masks.kinds.items()},
            "expected": masks.expected.to_dict(),
            "exact": masks.exact.to_dict(),
            "log_alpha": {kind: rows.tolist() for kind, rows in masks.log_alpha.items()},
        }
    return values


def _compare(
    first: OpenModel, second: OpenModel, mode: Mode, with_weights: bool
) -> tuple[str, dict[str, Any]]:
    notes = []
    fields = differing_fields(first, second)
    gates = weights = None
    if first.masks is not None and second.masks is not None:
        reason = check_comparable(first.masks, second.masks)
        if reason is None:
            gates = differing_gates(first.masks, second.masks, mode)
        else:
            notes.append(f"masks are not compared: {reason}")
    elif (first.masks is None) is not (second.masks is None):
        other = first if first.masks is None else second
        notes.append(f"masks are not compared: {other.path} has none")
    if not same_shapes(first.shape, second.shape):
        notes.append(
            f"weights are not compared: the models are of different shapes, "
            f"{first.shape.num_params():,} and {second.shape.num_params():,} parameters"
        )
    elif with_weights:
        total = len(weight_table.hf_shapes(first.shape))
        with progress(total, desc="comparing", unit="weight", leave=False) as bar:
            weights = weight_distances(
                first.weights, second.weights, first.shape, progress=bar.update
            )
    head = f"first   {first.path}: {first.title}\nsecond  {second.path}: {second.title}"
    text = tables.compare_text(fields, gates, weights, notes)
    found = {
        "first": str(first.path),
        "second": str(second.path),
        "fields": [dataclasses.asdict(field) for field in fields],
        "mode": mode,
        "gates": None if gates is None else [dataclasses.asdict(row) for row in gates],
        "weights": None
        if weights is None
        else [dataclasses.asdict(w) | {"relative": w.relative} for w in weights],
        "notes": notes,
    }
    return f"{head}\n\n{text}", found


def _plain(value: Any) -> Any:
    """Return values for JSON, numbers that are not finite as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
