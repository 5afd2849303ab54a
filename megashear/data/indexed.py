"""Megatron's ``.bin/.idx`` files, written and read in memory that does not grow with the data.

megatron-core's own builder keeps a list of every document in memory, some 100 bytes each; at a
billion documents that is more than a machine has. This module writes the same bytes
(tests/unit/data/test_indexed.py compares them). It does not import megatron-core, which would cost
each process that tokenises seconds and hundreds of megabytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megashear.files.pointers import refuse_pointer

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8 + 8
"""Magic, version (u64), code of the token type (u8), sequences (u64), document borders (u64)."""
TOKEN_TYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Codes of the types in which tokens are stored. Source: megatron-core 0.16.1, class DType."""
UINT16_BELOW = 65500
"""Vocabularies smaller than this are stored in two bytes. Source: DType.optimal_dtype."""
BLOCK = 1 << 18
"""Number of index entries read or written at a time: 2 MiB of pointers."""


class IndexedText(NamedTuple):
    """Header of an ``.idx``, checked against the sizes of both files."""

    prefix: Path
    dtype: type[np.integer]
    num_sequences: int
    num_borders: int
    """Number of documents plus one."""
    num_tokens: int


def token_dtype(vocab_size: int) -> str:
    """Return the name of the numpy type in which Megatron stores tokens of a vocabulary."""
    return "uint16" if vocab_size < UINT16_BELOW else "int32"


def write_index(index: Path, lengths: Path, dtype: str) -> None:
    """Write an ``.idx`` of one sequence per document, whole or not at all.

    Args:
        index: file to write; it is on the disk when this returns.
        lengths: file of raw int32, the number of tokens of each document in order.
        dtype: numpy type of the tokens in the ``.bin``.
    """
    count = lengths.stat().st_size // 4
    token_type = np.dtype(dtype)
    aside = index.with_name(index.name + "~")
    with aside.open("wb") as out, lengths.open("rb") as stream:
        out.write(MAGIC)
        out.write(np.uint64(VERSION).tobytes())
        code = {name: code for code, name in TOKEN_TYPES.items()}[token_type.type]
        out.write(np.uint8(code).tobytes())
        out.write(np.array([count, count + 1], dtype=np.uint64).tobytes())
        for block in _blocks(stream, np.dtype(np.int32), count):
            out.write(block.tobytes())
        stream.seek(0)
        start = 0
        for block in _blocks(stream, np.dtype(np.int32), count):
            ends = start + np.cumsum(block, dtype=np.int64) * token_type.itemsize
            out.write(np.concatenate([[start], ends[:-1]]).astype(np.int64).tobytes())
            start = int(ends[-1])
        for first in range(0, count + 1, BLOCK):
            out.write(np.arange(first, min(first + BLOCK, count + 1), dtype=np.int64).tobytes())
        out.flush()
        os.fsync(out.fileno())
    aside.rename(index)


def check_pair(prefix: Path) -> IndexedText:
    """Check ``prefix``.bin and .idx and return what they hold.

    Reads a few bytes of the index, whatever its size.

    Raises:
        ValueError: a file is missing, the ``.idx`` is not an index, or the two do not belong
            together: one was cut short, or they are of different runs.
    """
    index, text = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file, other in ((index, text), (text, index)):
        if not file.is_file():
            beside = f", though {other.name} is there" if other.is_file() else ""
            raise ValueError(f"{file} does not exist{beside}; copy both files, or preprocess again")
        refuse_pointer(file)
    size = index.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
            raise ValueError(
                f"{index} ({size} bytes) is not an index of Megatron's indexed datasets; copy it "
                f"again, or preprocess again"
            )
        version, code, sequences, borders = _header_fields(header)
        if version != VERSION:
            raise ValueError(f"{index} has version {version}; wanted {VERSION}; preprocess again")
        if code not in TOKEN_TYPES:
            raise ValueError(
                f"{index} has token type {code}, which is none of the whole numbers "
                f"{sorted(TOKEN_TYPES)}; it holds no token ids: tokenise the text again"
            )
        item = np.dtype(TOKEN_TYPES[code]).itemsize
        wanted = HEADER_BYTES + (4 + 8) * sequences + 8 * borders
        # A multimodal index has one more byte a sequence, which says nothing of text.
        if size not in (wanted, wanted + sequences):
            raise ValueError(
                f"{index} has {size} bytes, its header wants {wanted} for {sequences} sequences; "
                f"it was cut short: copy it again, or preprocess again"
            )
        _check_border_ends(stream, index, sequences, borders)
        num_bytes = 0
        if sequences:
            stream.seek(HEADER_BYTES + 4 * (sequences - 1))
            length = int(np.frombuffer(stream.read(4), np.int32)[0])
            stream.seek(HEADER_BYTES + 4 * sequences + 8 * (sequences - 1))
            start = int(np.frombuffer(stream.read(8), np.int64)[0])
            num_bytes = start + length * item
    if text.stat().st_size != num_bytes:
        raise ValueError(
            f"{text} has {text.stat().st_size} bytes, but {index} ({size} bytes) describes "
            f"{num_bytes}: one of them was cut short or is of another run; copy both again, or "
            f"preprocess again"
        )
    return IndexedText(Path(prefix), TOKEN_TYPES[code], sequences, borders, num_bytes // item)


def read_documents(prefix: Path) -> Iterator[npt.NDArray[np.integer]]:
    """Yield the tokens of each document of ``prefix``, its sentences joined; one is held at a time.

    Raises:
        ValueError: as ``check_pair``, or the index's lengths, places and documents do not belong
            together; found before the first document is given.
    """
    text = check_pair(prefix)
    _check_entries(text)
    item = np.dtype(text.dtype).itemsize
    index = Path(f"{prefix}.idx")
    with (
        Path(f"{prefix}.bin").open("rb") as tokens,
        index.open("rb") as lengths_at,
        index.open("rb") as borders_at,
    ):
        lengths_at.seek(HEADER_BYTES)
        borders_at.seek(HEADER_BYTES + (4 + 8) * text.num_sequences)
        lengths = _items(lengths_at, np.dtype(np.int32), text.num_sequences)
        borders = _items(borders_at, np.dtype(np.int64), text.num_borders)
        begin = next(borders, 0)
        for end in borders:
            length = sum(next(lengths) for _ in range(end - begin))
            yield np.frombuffer(tokens.read(length * item), dtype=text.dtype)
            begin = end


def _check_border_ends(stream: BinaryIO, index: Path, sequences: int, borders: int) -> None:
    """Refuse documents that leave sequences out, for their text would silently be missing."""
    if not borders and not sequences:
        return
    ends = []
    if borders:
        begin = HEADER_BYTES + (4 + 8) * sequences
        for place in (begin, begin + 8 * (borders - 1)):
            stream.seek(place)
            ends.append(int(np.frombuffer(stream.read(8), np.int64)[0]))
    if ends != [0, sequences]:
        reach = f"goes from sequence {ends[0]} to {ends[1]}" if ends else "is empty"
        raise ValueError(
            f"{index} has {sequences} sequences, but its document index {reach}; wanted 0 to "
            f"{sequences}, or text is left out. Files that were merged can be so: put those that "
            f"they were merged from into one folder, which is a domain, or tokenise again"
        )


def _check_entries(text: IndexedText) -> None:
    """Check every length, place and border of an index against those before it."""
    index, count = Path(f"{text.prefix}.idx"), text.num_sequences
    item = np.dtype(text.dtype).itemsize
    with index.open("rb") as lengths_at, index.open("rb") as rest:
        lengths_at.seek(HEADER_BYTES)
        rest.seek(HEADER_BYTES + 4 * count)
        begin, number = 0, 1
        for lengths, places in zip(
            _blocks(lengths_at, np.dtype(np.int32), count),
            _blocks(rest, np.dtype(np.int64), count),
        ):
            ends = begin + np.cumsum(lengths, dtype=np.int64) * item
            wanted = np.concatenate([[begin], ends[:-1]])
            if (at := _first(lengths < 0)) is not None:
                fault = f"sequence {number + at} has {lengths[at]} tokens; wanted at least 0"
                raise _contradiction(index, fault)
            if (at := _first(places != wanted)) is not None:
                fault = (
                    f"sequence {number + at} begins at byte {places[at]} of the .bin; wanted "
                    f"{wanted[at]}, where the one before it ends"
                )
                raise _contradiction(index, fault)
            begin, number = int(ends[-1]), number + len(lengths)
        before = number = 0
        for borders in _blocks(rest, np.dtype(np.int64), text.num_borders):
            if (at := _first(np.diff(borders, prepend=before) < 0)) is not None:
                fault = f"document {number + at} ends at sequence {borders[at]}, before it begins"
                raise _contradiction(index, fault)
            before, number = int(borders[-1]), number + len(borders)


def _first(wrong: npt.NDArray[np.bool_]) -> int | None:
    """Return the place of the first True; None where there is none."""
    return int(wrong.argmax()) if wrong.any() else None


def _contradiction(index: Path, fault: str) -> ValueError:
    return ValueError(f"{index}: {fault}; copy both files again, or tokenise again")


def _header_fields(header: bytes) -> tuple[int, int, int, int]:
    at = len(MAGIC)
    version = int(np.frombuffer(header, np.uint64, count=1, offset=at)[0])
    counts = np.frombuffer(header, np.uint64, count=2, offset=at + 9)
    return version, header[at + 8], int(counts[0]), int(counts[1])


def _blocks(
    stream: BinaryIO, dtype: np.dtype[np.signedinteger], count: int
) -> Iterator[npt.NDArray[np.signedinteger]]:
    """Yield the next ``count`` numbers of a stream, ``BLOCK`` at a time."""
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        yield np.frombuffer(stream.read(size * dtype.itemsize), dtype=dtype)


def _items(stream: BinaryIO, dtype: np.dtype[np.signedinteger], count: int) -> Iterator[int]:
    for block in _blocks(stream, dtype, count):
        yield from block.tolist()
