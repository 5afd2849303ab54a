"""Numbers of the reference implementation for a tiny masked model, and errors of ours."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megashear.masks.gates import logistic_noise
from megashear.shape import ModelShape

DATA = Path(__file__).parents[2] / "data"

GOLDEN_KINDS = ("hidden", "head", "intermediate", "layer")


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "mask_a.safetensors")


@cache
def facts() -> dict[str, Any]:
    return json.loads((DATA / "mask_a.json").read_text())


def shape(which: str) -> ModelShape:
    base, found = facts()["base"], facts()[which]
    return ModelShape(
        num_layers=found["n_layers"],
        hidden_size=found["d_model"],
        num_attention_heads=found["n_heads"],
        num_query_groups=found["n_heads"],
        head_dim=base["d_model"] // base["n_heads"],
        ffn_hidden_size=found["intermediate_size"],
        vocab_size=found["vocab_size"],
    )


def log_alpha() -> dict[str, Tensor]:
    """Return whole masks, [num_rows, num_units], with hidden and layer as one row."""
    return {kind: rows(tensors()[f"log_alpha.{kind}"]) for kind in GOLDEN_KINDS}


def gates(prefix: str) -> dict[str, Tensor]:
    """Return the gates of ``train.z``, ``z_eval.expected`` or ``z_eval.target`` by kind."""
    names = dict(zip(GOLDEN_KINDS, ("hidden_z", "head_z", "intermediate_z", "head_layer_z")))
    masks = log_alpha()
    return {
        kind: tensors()[f"{prefix}.{name}"].reshape(masks[kind].shape)
        for kind, name in names.items()
    }


def noise(kind: str) -> Tensor:
    """Return the logistic noise of the file's uniform draws of a kind, [num_rows, num_units]."""
    return logistic_noise(rows(tensors()[f"noise.{kind}"]))


def rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor[None]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())
