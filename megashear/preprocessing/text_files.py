"""Records of JSON, plain text and parquet files, packed or not, read in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megashear.config.defaults import MOST_DOCUMENT_MB
from megashear.files.pointers import refuse_pointer
from megashear.files.regular import open_regular
from megashear.preprocessing.json_records import (
    ArrayError,
    TooLongError,
    is_array,
    split_array,
    split_lines,
)
from megashear.preprocessing.unpack import DAMAGES, unpacked

CHUNK_BYTES = 1 << 20
"""Text handed to a worker at a time, bytes; a longer document is a chunk of its own."""
PARQUET_ROWS = 64
"""Number of rows decoded at a time; a chunk takes as many batches as it needs."""

Record = bytes | str | None | npt.NDArray[np.number]
"""A line or an item of JSON (bytes), a text (None where a row holds null), or tokens."""


class Chunk(NamedTuple):
    """Consecutive records of one file."""

    file: Path
    unit: str
    """Name of a record in messages: line, item, row, sample or document."""
    first: int
    """Number of the first record, from 1, as editors count."""
    records: list[Record]
    position: int
    """Bytes of the file on the disk that were read up to the chunk's end."""
    set_name: str | None = None
    """Name of the set that MDS samples say they belong to."""

    @property
    def last_place(self) -> str:
        """File and number of the last record, for messages."""
        return f"{self.file}, {self.unit} {self.first + len(self.records) - 1}"

    @property
    def size(self) -> int:
        """Size of the records, in bytes, characters, or 4 per token."""
        return sum(
            4 * len(record) if isinstance(record, np.ndarray) else len(record or "")
            for record in self.records
        )


def read_json(file: Path, chunk_bytes: int, max_document_mb: int) -> Iterator[Chunk]:
    """Cut the lines of a file of JSON, or the items of its one array, into chunks.

    A file that begins with ``[`` is an array. ``.gz`` and ``.zst`` files are unpacked while they
    are read. One chunk is held at a time: whole records of about ``chunk_bytes`` together.

    Raises:
        ValueError: the file is damaged, is of another kind than its name says, or has a record
            longer than the limit.
    """
    records: list[Record] = []
    first, size, unit = 1, 0, "line"
    with ExitStack() as stack:
        raw: BinaryIO = stack.enter_context(open_regular(file))
        stream = stack.enter_context(unpacked(raw, file))
        try:
            split = split_lines
            if is_array(stream):
                split, unit = split_array, "item"
            for record in split(stream, max_document_mb * 1_000_000):
                records.append(record)
                size += len(record)
                if size >= chunk_bytes:
                    yield Chunk(file, unit, first, records, raw.tell())
                    first, records, size = first + len(records), [], 0
        except DAMAGES as error:
            raise ValueError(
                f"{file} is damaged after {unit} {first + len(records) - 1}: {error}; download or "
                f"pack it again"
            ) from None
        except TooLongError:
            raise _too_long(f"{file}, {unit} {first + len(records)}", max_document_mb) from None
        except ArrayError as error:
            raise ValueError(
                f"{file}, item {first + len(records)} {error}; correct the file, download it "
                f"again, or write one object per line"
            ) from None
        if records:
            yield Chunk(file, unit, first, records, raw.tell())


def read_plain(file: Path, max_document_mb: int) -> Iterator[Chunk]:
    """Read a file of plain text, packed or not, as one document.

    Raises:
        ValueError: the file is damaged, is of another kind than its name says, is not UTF-8, or is
            longer than the limit.
    """
    limit = max_document_mb * 1_000_000
    with ExitStack() as stack:
        raw: BinaryIO = stack.enter_context(open_regular(file))
        stream = stack.enter_context(unpacked(raw, file))
        try:
            content = stream.read(limit + 1)
        except DAMAGES as error:
            raise ValueError(f"{file} is damaged: {error}; download or pack it again") from None
        position = raw.tell()
    if len(content) > limit:
        raise _too_long(f"{file}, one document of plain text,", max_document_mb)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{file}, line {line} is not UTF-8: {error.reason}; convert the file to UTF-8"
        ) from None
    yield Chunk(file, "document", 1, [text], position)


def _too_long(place: str, max_document_mb: int) -> ValueError:
    return ValueError(
        f"{place} has more than {max_document_mb} MB; split or remove it, or allow longer "
        f"documents with --max-document-mb (at most {MOST_DOCUMENT_MB})"
    )


def read_parquet(
    file: Path,
    column: str,
    chunk_bytes: int,
    max_document_mb: int,
) -> Iterator[Chunk]:
    """Cut the texts of one column of a parquet file into chunks of about ``chunk_bytes``.

    One chunk is held at a time, and one page of the column with its dictionary.

    Raises:
        ValueError: pyarrow is not installed, or the file is damaged, has no such text column, or
            has a text longer than the limit.
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
    refuse_pointer(file)
    try:
        # Buffered, pages are read when they are needed; pre-buffered, whole row groups would be.
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            _check_column(file, table.schema_arrow, column)
            _check_groups(file, table.metadata, column, max_document_mb)
            size = file.stat().st_size
            num_rows = table.metadata.num_rows
            batches = table.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False)
            rows: list[Record] = []
            length = 0
            for batch in batches:
                for text in _texts(file, batch.column(0), first + len(rows)):
                    if text and _is_longer(text, max_document_mb * 1_000_000):
                        raise _too_long(f"{file}, row {first + len(rows)}", max_document_mb)
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


def _is_longer(text: str, limit: int) -> bool:
    """Return whether a text has more bytes than ``limit``; encodes it only if it may have."""
    return 4 * len(text) > limit and len(text.encode(errors="surrogatepass")) > limit


def _check_groups(file: Path, metadata: Any, column: str, max_document_mb: int) -> None:
    """Refuse rows before they are unpacked where one must be longer than the limit."""
    first = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        last = first + group.num_rows - 1
        for place in range(group.num_columns):
            chunk = group.column(place)
            most = max_document_mb * 1_000_000 * max(group.num_rows, 1)
            # Times 2, for pages also hold headers and lengths.
            if chunk.path_in_schema == column and chunk.total_uncompressed_size > 2 * most:
                raise _too_long(f"{file}: one of the rows {first} to {last}", max_document_mb)
        first = last + 1


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
