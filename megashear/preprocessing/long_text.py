"""Long texts encoded part by part, with the ids of the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

PART = 1 << 20
"""Characters encoded at a time; tokenizers take some 50 bytes of memory for each."""
WINDOW = 256
"""Characters on each side of a place by which it is tested."""
TRIES = 64
"""Places tested before the rest is encoded as a whole."""
PLACES = re.compile(r"(?<=\S)[ \n](?=\S)")
"""Where most tokenizers begin a new word, whatever comes before."""

Encode = Callable[[str], list[int]]


def encode_parts(encode: Encode, text: str) -> Iterator[list[int]]:
    """Yield the ids of a text in parts; joined, they are those of the whole.

    A tokenizer's memory grows with what it is given at once. Text is parted at a space or a line
    end between two words where the ids of the text around it are those of its two parts: so the
    tokenizer itself says whether words are apart there, and in which of three ways a part is to
    begin. SentencePiece puts a space before each text, so the space between two parts is left out;
    byte-level tokenizers want it. Where no place passes, as in text without spaces, the rest is
    encoded as a whole.

    Args:
        encode: ids of a text, without special tokens.
        text: of any length.
    """
    begin = 0
    while len(text) - begin > 2 * PART:
        parting = _parting(encode, text, begin + PART)
        if parting is None:
            break
        end, after = parting
        yield encode(text[begin:end])
        begin = after
    yield encode(text[begin:] if begin else text)


def _parting(encode: Encode, text: str, earliest: int) -> tuple[int, int] | None:
    """Return where a part may end and the next begin; None where no place is found."""
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
