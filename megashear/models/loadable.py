"""Which shapes stock runtimes load from a Hugging Face directory."""

from __future__ import annotations

import logging
from collections.abc import Callable

from megashear.shape import Family, ModelShape

logger = logging.getLogger(__name__)

HEADS_DIVIDE_HIDDEN: frozenset[Family] = frozenset({"llama"})
"""Families whose hidden size must be a multiple of the heads, in transformers from release 5,
whether ``head_dim`` is given or not. Source: LlamaConfig.validate_architecture. The configurations
of other families have no such check (`tests/unit/models/test_loadable.py` tries them)."""


def why_refused(shape: ModelShape) -> str | None:
    """Return why transformers refuses to load a model of this shape, or None where it loads it."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if shape.family not in HEADS_DIVIDE_HIDDEN or hidden % heads == 0:
        return None
    return (
        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}: transformers from "
        f"release 5 refuses such a {shape.family} model, although head_dim is given"
    )


def check_target(target: ModelShape, source: ModelShape, *, force: bool) -> None:
    """Refuse a target that no stock runtime would load.

    Args:
        target: shape after pruning.
        source: shape before pruning.
        force: warn instead of refusing.

    Raises:
        ValueError: with the nearest targets that load.
    """
    why = why_refused(target)
    if why is not None and not force:
        raise ValueError(
            f"target {why}; the nearest that it loads: {_nearest(target, source)}; or add "
            f"--force-unloadable-target, for a runtime of your own"
        )
    warn(target, "target ", source=source)


def warn(shape: ModelShape, of_what: str = "", *, source: ModelShape | None = None) -> None:
    """Log a warning for each stock runtime that would not load a model of this shape.

    Args:
        shape: the model.
        of_what: first words of the warning.
        source: shape before pruning, where the nearest shapes that load are to be named.
    """
    why = why_refused(shape)
    if why is not None:
        nearest = f"; the nearest that it loads: {_nearest(shape, source)}" if source else ""
        logger.warning("%s%s%s", of_what, why, nearest)
    if shape.family == "qwen2" and shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        # Source: vLLM's model_executor/models/qwen2.py, early 2025
        logger.warning(
            "%shead_dim %d is not hidden_size %d over num_attention_heads %d: vLLM may take the "
            "width of a Qwen2's heads from these two and cannot load it then, transformers can",
            *(of_what, shape.head_dim, shape.hidden_size, shape.num_attention_heads),
        )


def _nearest(target: ModelShape, source: ModelShape) -> str:
    """Return the flags of the nearest hidden sizes and numbers of heads that load."""
    hidden, heads = target.hidden_size, target.num_attention_heads
    # the ratio of query heads to key/value heads stays; without grouped queries it is 1
    groups = 1 if source.heads_per_group == 1 else target.num_query_groups
    most = groups * source.heads_per_group if groups > 1 else source.num_attention_heads
    ways = {
        "--target-hidden-size": _around(hidden, source.hidden_size, lambda size: size % heads == 0),
        "--target-num-attention-heads": _around(
            heads, most, lambda count: hidden % count == 0 and count % groups == 0
        ),
    }
    return ", or ".join(f"{flag} {' or '.join(found)}" for flag, found in ways.items() if found)


def _around(value: int, most: int, fits: Callable[[int], bool]) -> list[str]:
    """Return the nearest numbers below and above ``value``, from 1 to ``most``, that fit."""
    sides = (range(min(value, most), 0, -1), range(value + 1, most + 1))
    found = (next((n for n in side if fits(n)), None) for side in sides)
    return [str(n) for n in found if n is not None]
