"""Context: tokens that are read and never predicted, stored in the same file as all others.

A token that is context is stored as its complement, -1 - id. So data that are instructions are
domains like any other, which are mapped, shuffled, read ahead and resumed as text is; every
reader of tokens gives stored numbers, and `micro_batch` makes ids and a loss mask of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # preprocessing does without torch
    from torch import Tensor

FILLING = -1
"""Token 0 as context: fills a sequence up."""

Stored = TypeVar("Stored", "Tensor", npt.NDArray[np.signedinteger])


def as_context(ids: Stored) -> Stored:
    """Return ids as they are stored where they are context; also the ids of stored context."""
    return ~ids


def ids_of(stored: Tensor) -> Tensor:
    """Return the ids of stored tokens, int64, shaped like them."""
    return stored.maximum(~stored)


def largest_id(stored: npt.NDArray[np.integer]) -> tuple[int, int]:
    """Return the largest id among stored tokens, and its first place."""
    if np.issubdtype(stored.dtype, np.signedinteger):
        stored = np.maximum(stored, ~stored)
    place = int(stored.argmax())
    return int(stored[place]), place
