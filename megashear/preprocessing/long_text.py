"""Long texts, encoded in parts with the ids of the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

PART = 1 << 20
"""Number of characters encoded at a time; a tokenizer takes some 50 bytes of memory for each."""
WINDOW = 256
"""Number of characters on each side of a place that are encoded to test it."""
TRIES = 64
"""Number of places tested before the rest is encoded as a whole."""
PLACES = re.compile(r"(?<=\S)[ \n](?=\S)")
"""Places where most tokenizers begin a new word, whatever comes before."""

Encoder = Callable[[str], list[int]]
"""Function that returns the ids of a text, without special tokens."""


def encode_parts(encode: Encoder, text: str) -> Iterator[list[int]]:
    """Yield the ids of a text in parts; joined, they are those of the whole.

    A tokenizer's memory grows with the text it is given. Text is cut at a space or a line end
    between two words where the ids of the text around that place are those of its two parts. So
    the tokenizer itself decides where a cut is allowed, and in which of three ways the next part
    begins: SentencePiece puts a space before each text, so the space between two parts is left
    out; byte-level tokenizers need it. Where no place passes, as in text without spaces, the rest
    is encoded as a whole.

    Args:
        encode: returns the ids of a text.
        text: text of any length.
    """
    begin = 0
    while len(text) - begin > 2 * PART:
        cut = _find_cut(encode, text, begin + PART)
        if cut is None:
            break
        end, after = cut
        yield encode(text[begin:end])
        begin = after
    yield encode(text[begin:] if begin else text)


def _find_cut(encode: Encoder, text: str, earliest: int) -> tuple[int, int] | None:
    """Return where a part may end and the next one begin; None where no place is found."""
    for number, place in enumerate(PLACES.finditer(text, earliest)):
        if number == TRIES:
            return None
        at = place.start()
        before, after = max(at - WINDOW, 0), at + 1 + WINDOW
        whole = encode(text[before:after])
        for end, begin in ((at, at + 1), (at, at), (at + 1, at + 1)):
            if encode(text[before:end]) + encode(text[begin:after]) == whole:
                return end, begin
    return None
