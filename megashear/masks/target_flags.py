"""The shape that --target and the --target-* flags describe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megashear.config import TargetConfig
from megashear.masks.kinds import EXTENTS
from megashear.shape import PRESETS, ModelShape, read_extents


def target_shape(asked: TargetConfig, source: ModelShape) -> ModelShape:
    """Return the shape that the flags describe; extents that they leave out are the source's.

    Raises:
        ValueError: an unknown preset, no file of extents, or extents that do not belong together.
    """
    shape = source
    if asked.target is not None:
        shape = dataclasses.replace(source, **_named_extents(asked.target))
    wanted: dict[str, Any] = {extent: getattr(asked, f"target_{extent}") for extent in EXTENTS}
    wanted["num_attention_heads"], wanted["num_query_groups"] = _target_heads(asked, shape)
    return dataclasses.replace(shape, **{k: v for k, v in wanted.items() if v is not None})


def nearest_multiples(value: int, step: int, most: int) -> str:
    """Return the multiples of ``step`` nearest to ``value`` on both sides, in 1 to ``most``."""
    below = min(value, most) // step * step
    found = [str(n) for n in (below, below + step) if 0 < n <= most]
    return " or ".join(found) or f"none up to {most}"


def _named_extents(name: str) -> dict[str, Any]:
    """Return the extents of a preset, or those that a JSON file has."""
    if name in PRESETS:
        # of a preset only extents count: the rest is as in the source
        return {e: getattr(PRESETS[name], e) for e in (*EXTENTS, "head_dim")}
    if not Path(name).exists():
        raise ValueError(
            f"--target {name} is not known; presets: {', '.join(PRESETS)}; or name a JSON file of "
            f"extents, or give the --target-* extents"
        )
    return read_extents(name, flag="--target")


def _target_heads(asked: TargetConfig, source: ModelShape) -> tuple[int | None, int | None]:
    """Return the query heads and key/value heads of the target; None as in the source."""
    heads, groups = asked.target_num_attention_heads, asked.target_num_query_groups
    each = source.heads_per_group
    if heads is None:
        # a key/value head is pruned with all its query heads
        return None if groups is None else groups * each, groups
    if groups is None:
        # a key/value head with one query head is pruned with it; one with several is kept
        groups = heads if each == 1 else source.num_query_groups
    if heads > 0 and groups > 0 and heads % groups:
        others = [
            str(n)
            for n in range(1, source.num_query_groups + 1)
            if heads % n == 0 and heads // n <= each
        ]
        kept = "" if asked.target_num_query_groups else " (all are kept unless it is given)"
        instead = ""
        if others:
            instead = f"; {heads} fits --target-num-query-groups {' or '.join(others)}"
        raise ValueError(
            f"--target-num-attention-heads {heads} is not a multiple of --target-num-query-groups "
            f"{groups}{kept}, and every key/value head serves the same number of query heads; the "
            f"nearest --target-num-attention-heads is "
            f"{nearest_multiples(heads, groups, groups * each)}{instead}"
        )
    return heads, groups
