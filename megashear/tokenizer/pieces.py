"""Pieces of a SentencePiece model in a text with special tokens, and where they end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np


def encode_rendered(
    model: Any, specials: Mapping[str, int], text: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a text in which special tokens are spelled out, and where each ends.

    Text between special tokens is encoded by itself, as transformers does.

    Args:
        model: a ``SentencePieceProcessor``.
        specials: ids of special tokens by their text, at least one.
        text: any text.

    Returns:
        Ids, and the number of characters up to the end of each.
    """
    ids: list[int] = []
    ends: list[int] = []
    start = 0
    for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text):
        if part in specials:
            ids.append(specials[part])
            ends.append(start + len(part))
        elif part:
            found, of_part = _pieces(model, part)
            ids += found
            ends += [start + end for end in of_part]
        start += len(part)
    return ids, ends


def _pieces(model: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the ids of a text without special tokens, and their ends in characters."""
    from sentencepiece import sentencepiece_pb2

    # The class is made when the module is imported, unseen by type checkers.
    found: Any = getattr(sentencepiece_pb2, "SentencePieceText")()  # noqa: B009
    found.ParseFromString(model.encode(text, out_type="serialized_proto"))
    ends, last = [], len(text.encode())
    # a blank that SentencePiece puts first, and all but the last byte of a character that it
    # lacks, have no width: they end with the next piece
    for piece in reversed(found.pieces):
        last = piece.end if piece.end > piece.begin else last
        ends.append(last)
    sizes = np.cumsum([len(character.encode()) for character in text])  # bytes up to its end
    in_characters = np.searchsorted(sizes, ends[::-1], side="right")
    return [piece.id for piece in found.pieces], in_characters.tolist()
