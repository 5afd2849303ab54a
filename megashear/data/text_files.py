"""Records of jsonl files, plain or compressed, and of parquet files, read in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

CHUNK_BYTES = 1 << 20
"""Text handed to a worker at a time, bytes; a longer document is a chunk of its own."""
FEED_BYTES = (1 << 8, 1 << 12)
"""Zstandard input taken at a time, bytes, least and most: what it unfolds to is held at once, and
that can be 32,768 times as much where a text repeats itself; least after such a place."""
PARQUET_ROWS = 64
"""Rows decoded at a time; a chunk is made of as many of these as it takes."""
BEGINNINGS = {
    b"\x1f\x8b": ("gzip", ".jsonl.gz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".jsonl.zst"),
    b"PAR1": ("parquet", ".parquet"),
    b"BZh": ("bzip2", None),
    b"\xfd7zXZ": ("xz", None),
}
"""First bytes of what is no plain text, and the suffix it should have had; None: not read."""

Record = bytes | str | None | npt.NDArray[np.number]
"""A line of JSON; a text, or none where a row holds null; tokens."""


class Chunk(NamedTuple):
    """Consecutive records of one file."""

    file: Path
    unit: str
    """What a record is called: line, row, sample, document."""
    first: int
    """Number of the first record, 1-based, as editors count."""
    records: list[Record]
    position: int
    """Bytes of the file, as it lies on the disk, that have been read up to here."""
    set_name: str | None = None
    """The set that MDS samples say they are of."""


def read_jsonl(file: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut the lines of a jsonl file into chunks; ``.gz`` and ``.zst`` are unpacked on the way.

    One chunk is held at a time: whole lines, about ``chunk_bytes`` of them.

    Raises:
        ValueError: the file is damaged, or is of another kind than its name says.
    """
    lines: list[Record] = []
    first, size = 1, 0
    with ExitStack() as stack:
        raw: BinaryIO = stack.enter_context(file.open("rb"))
        stream = stack.enter_context(_unpacked(raw, file))
        try:
            for line in stream:
                lines.append(line)
                size += len(line)
                if size >= chunk_bytes:
                    yield Chunk(file, "line", first, lines, raw.tell())
                    first, lines, size = first + len(lines), [], 0
        except (EOFError, gzip.BadGzipFile, zlib.error, _DamagedError) as error:
            raise ValueError(
                f"{file} is damaged after line {first + len(lines) - 1}: {error}; download or pack "
                f"it again"
            ) from None
        if lines:
            yield Chunk(file, "line", first, lines, raw.tell())


def read_parquet(file: Path, column: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut the texts of one column of a parquet file into chunks of about ``chunk_bytes``.

    One chunk is held at a time, and one page of the column with its dictionary.

    Raises:
        ValueError: pyarrow is not installed, the file is damaged, or it has no such text column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{file}: parquet files are read by pyarrow, which is not installed; "
            f"pip install 'megashear[parquet]'"
        ) from None
    first = 1
    try:
        # Buffered: pages are read as they are wanted. Pre-buffered, whole row groups would be.
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            _check_column(file, table.schema_arrow, column)
            size = file.stat().st_size
            num_rows = table.metadata.num_rows
            batches = table.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False)
            rows: list[Record] = []
            length = 0
            for batch in batches:
                for text in _texts(file, batch.column(0), first + len(rows)):
                    rows.append(text)
                    length += len(text or "")
                    if length >= chunk_bytes:
                        position = size * (first - 1 + len(rows)) // num_rows
                        yield Chunk(file, "row", first, rows, position)
                        first, rows, length = first + len(rows), [], 0
            if rows:
                yield Chunk(file, "row", first, rows, size)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is damaged, or no parquet file: {_one_line(error)}; download or write it again"
        ) from None


def _check_column(file: Path, schema: Any, column: str) -> None:
    import pyarrow.types as kinds

    if column not in schema.names:
        raise ValueError(
            f"{file} has no column {column!r}, only {sorted(schema.names)}; name the column of the "
            f"text with --json-key"
        )
    kind = schema.field(column).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(kind) or kinds.is_large_string(kind)):
        raise ValueError(f"{file} has {kind} in column {column!r}; text is wanted")


def _texts(file: Path, column: Any, first: int) -> list[str | None]:
    try:
        texts: list[str | None] = column.to_pylist()
    except UnicodeDecodeError:
        for place, value in enumerate(column.cast("binary").to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, row {first + place} is not UTF-8: {error}") from None
        raise
    return texts


def _unpacked(raw: BinaryIO, file: Path) -> BinaryIO:
    """The lines of ``file`` as a stream over its bytes."""
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # reads like one
    if file.suffix in (".zst", ".zstd"):
        return io.BufferedReader(_ZstdStream(raw), 1 << 18)
    beginning = raw.read(max(map(len, BEGINNINGS)))
    raw.seek(0)
    for magic, (kind, suffix) in BEGINNINGS.items():
        if beginning.startswith(magic):
            way_out = f"name it *{suffix}" if suffix else "unpack it first"
            raise ValueError(f"{file} is a {kind} file, not plain text; {way_out}")
    return raw


class _DamagedError(Exception):
    """What zstandard found wrong."""


class _ZstdStream(io.RawIOBase):
    """Unpacked Zstandard frames.

    Not zstandard's own stream reader, which takes a frame that was cut short for a whole one.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        # As wide as any frame may ask for: archives of text are packed with --long.
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._unpacked = memoryview(b"")
        self._feed = min(FEED_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._raw.read(self._feed)
            if not packed:
                if self._frame is not None:
                    raise _DamagedError("it ends in the middle of a Zstandard frame")
                return 0
            self._unpacked = memoryview(self._unpack(packed))
            low, high = FEED_BYTES
            is_dense = len(self._unpacked) > CHUNK_BYTES
            self._feed = low if is_dense else min(2 * self._feed, high)
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        parts = []
        while packed:
            if self._frame is None:
                self._frame = self._unpacker.decompressobj()
            try:
                parts.append(self._frame.decompress(packed))
            except zstandard.ZstdError as error:
                raise _DamagedError(str(error)) from None
            packed = b""
            if self._frame.eof:
                packed, self._frame = self._frame.unused_data, None
        return b"".join(parts)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
