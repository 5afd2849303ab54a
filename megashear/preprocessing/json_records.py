"""Cuts JSON text into its records: lines, or the items of one array; none longer than a limit."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

BLOCK = 1 << 18
"""Bytes of an array that are scanned together."""
MARKS = re.compile(rb'["\[\]{},]')
"""Characters that structure an array, outside of strings."""
STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
"""Inside of a string, as far as the block holds it."""
SPACE = b" \t\r\n"
"""White space of JSON."""
BOM = b"\xef\xbb\xbf"


class TooLongError(Exception):
    """The next record is longer than the limit."""


class ArrayError(Exception):
    """The array is broken at the next record."""


def is_array(stream: io.BufferedReader) -> bool:
    """Return whether a stream begins an array; consumes nothing."""
    return stream.peek(4096).removeprefix(BOM).lstrip(SPACE).startswith(b"[")


def split_lines(stream: io.BufferedReader, limit: int) -> Iterator[bytes]:
    """Yield the lines of a stream, with their ends.

    Args:
        stream: stream of bytes.
        limit: longest line, bytes.

    Raises:
        TooLongError: the next line is longer.
    """
    while line := stream.readline(limit + 1):
        if len(line) > limit:
            raise TooLongError
        yield line


def split_array(stream: io.BufferedReader, limit: int) -> Iterator[bytes]:
    """Yield the items of a JSON array as they are written.

    The caller's parser finds out whether an item is valid JSON. One item and one block are held.

    Args:
        stream: stream of bytes for which ``is_array`` is True.
        limit: longest item, bytes.

    Raises:
        TooLongError: the next item is longer.
        ArrayError: the array does not end, ends before the file, or lacks an item.
    """
    item = bytearray()
    depth, num_items = 0, 0
    in_string, skip, is_over = False, 0, False

    def take(part: bytes) -> None:
        if len(item) + len(part) > limit:
            raise TooLongError
        item.extend(part)

    def taken() -> bytes:
        whole = bytes(item).strip(SPACE)
        if not whole:
            raise ArrayError("is missing: there is a comma too many")
        item.clear()
        return whole

    while block := stream.read(BLOCK):
        begin, at, skip = 0, skip, 0
        while not is_over:
            # Skip a string.
            if in_string:
                inside = STRING.match(block, at)
                assert inside is not None
                at = inside.end()
                if at == len(block):
                    break
                if block[at : at + 1] == b"\\":  # the other half of the escape is to come
                    skip = 1
                    break
                in_string, at = False, at + 1
            # Find the next mark.
            mark = MARKS.search(block, at)
            if mark is None:
                break
            at = mark.end()
            if mark[0] == b'"':
                in_string = True
            elif mark[0] in (b"[", b"{"):
                depth += 1
                if depth == 1:
                    begin = at
                    item.clear()
            elif depth > 1:
                depth -= mark[0] != b","
            elif mark[0] == b"}":
                raise ArrayError("is followed by a '}' that closes nothing")
            else:
                take(block[begin : at - 1])
                begin = at
                is_over = mark[0] == b"]"
                if not is_over or num_items or item.strip(SPACE):
                    yield taken()
                    num_items += 1
        # Keep the rest of the block.
        if is_over:
            if block[begin:].strip(SPACE):
                raise ArrayError("is no part of the array, which has ended before it")
            begin = len(block)
        take(block[begin:])
    if not is_over:
        raise ArrayError("is the last: the file ends before the array does")
