"""Files of importance scores: written whole, read and checked against a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.files import durable
from megashear.files.structured import LARGE_JSON_BYTES, read_json_object
from megashear.masks.kinds import KINDS
from megashear.shape import ModelShape

FORMAT = "megashear-scores-1"
"""Name of the file's format; a changed format gets another name."""
FINGERPRINTED = ("model.layers.0.self_attn.o_proj.weight", "model.norm.weight")
"""Weights by which a model is recognised: every step of training moves them, and a file of scores
and a model are compared without reading the whole model."""
_DIGITS = 9
"""Significant digits of a score in the file; float32 has no more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImportanceScores:
    """Importance of the units of one model, and how it was measured."""

    shape: ModelShape
    """Shape of the scored model."""
    values: Mapping[str, Tensor]
    """Scores of every kind, float64: [L, units], or [1, units] for hidden and layer."""
    fingerprint: str | None = None
    """`fingerprint` of the scored model; None where it is not known, for scores of a script."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """How the scores were measured: model, data, sequences, seed, formulas, versions; and of scores
    that were read, their file and its SHA-256."""

    def write(self, path: Path) -> None:
        """Write a file that `read_scores` reads.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "measured": dict(self.measured),
            "shape": self.shape.to_dict(),
            "fingerprint": self.fingerprint,
            "scores": {kind: _to_lists(kind, self.values[kind]) for kind in KINDS},
        }
        durable.replace(path, json.dumps(content) + "\n")

    def check_model(
        self, shape: ModelShape, weights: Mapping[str, Tensor], *, flag: str, model: str
    ) -> None:
        """Refuse scores of another model.

        Args:
            shape: of the model.
            weights: of the model by Hugging Face name; those of `FINGERPRINTED` are read.
            flag: the flag and the file of the scores, for the message.
            model: the flag and the path of the model, for the message.

        Raises:
            ValueError: with what differs.
        """
        for name in (one.name for one in fields(ModelShape)):
            found, wanted = getattr(self.shape, name), getattr(shape, name)
            # the longest sequence is no part of what a model computes
            if found != wanted and name != "max_position_embeddings":
                raise ValueError(
                    f"{flag} is of a model with {name} {found}, and {model} has {wanted}; measure "
                    f"this model with `megashear score`"
                )
        if self.fingerprint is not None and self.fingerprint != fingerprint(weights):
            raise ValueError(
                f"{flag} is of another model of the same shape than {model}: their weights differ; "
                f"measure this model with `megashear score`"
            )


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the weights `FINGERPRINTED`, hex.

    They are rounded to bfloat16 first, so that a --bf16 run, its float32 masters and what is
    converted from it have one fingerprint.

    Args:
        weights: of a model by Hugging Face name.
    """
    digest = hashlib.sha256()
    for name in FINGERPRINTED:
        # through float32, because float16 has another range
        rounded = weights[name].float().bfloat16().contiguous()
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def read_scores(path: Path | str, flag: str) -> ImportanceScores:
    """Read a file of scores.

    Args:
        path: of the file.
        flag: what the user typed to name it.

    Raises:
        ValueError: it is not there, of another format, or a kind of unit has not one finite number
            >= 0 for each of its units.
    """
    name = f"{flag} {path}"
    content = read_json_object(path, name, max_bytes=LARGE_JSON_BYTES)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{name} is of format {content.get('format')!r}, wanted {FORMAT!r}; make such a file "
            f"with `megashear score`"
        )
    lists, print_of = content.get("scores"), content.get("fingerprint")
    try:
        shape = ModelShape(**content["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: its shape is that of no model: {error}") from None
    if not isinstance(lists, dict) or not isinstance(content.get("measured", {}), dict):
        raise ValueError(f"{name}: scores and measured are objects in files of `megashear score`")
    if print_of is not None and not isinstance(print_of, str):
        raise ValueError(f"{name}: fingerprint is {print_of!r}, wanted text or null")
    return ImportanceScores(
        shape=shape,
        values={kind: _from_lists(kind, lists.get(kind), shape, name) for kind in KINDS},
        fingerprint=print_of,
        measured=content.get("measured", {})
        | {"file": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()},
    )


def _to_lists(kind: str, values: Tensor) -> list[Any]:
    rows = [[float(f"{value:.{_DIGITS}g}") for value in row] for row in values.tolist()]
    return rows if KINDS[kind].per_layer else rows[0]


def _from_lists(kind: str, lists: object, shape: ModelShape, name: str) -> Tensor:
    num_rows, num_units = KINDS[kind].extents(shape)
    rows = lists if KINDS[kind].per_layer else [lists]
    wanted = f"{num_units} finite numbers >= 0"
    if KINDS[kind].per_layer:
        wanted = f"{num_rows} lists of {wanted}, one for each layer"
    if not (
        isinstance(rows, list)
        and len(rows) == num_rows
        and all(isinstance(row, list) and len(row) == num_units for row in rows)
        and all(_is_score(value) for row in rows for value in row)
    ):
        found = "is missing" if lists is None else "has something else"
        raise ValueError(f"{name}: scores of kind {kind!r} are to be {wanted}; it {found}")
    return torch.tensor(rows, dtype=torch.float64)


def _is_score(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0
