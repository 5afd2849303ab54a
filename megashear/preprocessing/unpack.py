"""Bytes of text files, unpacked where the name says that they are packed."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

PACKINGS = {".gz": "gzip", ".zst": "Zstandard", ".zstd": "Zstandard"}
"""Suffixes of packed text that is read, and the names of the packings."""
FEED_BYTES = (1 << 8, 1 << 12)
"""Least and most Zstandard input unpacked at a time, bytes. The output is held at once, and can be
32,768 times as large where a text repeats itself; after such a place the least is taken."""
DENSE_BYTES = 1 << 20
"""Size of the output, bytes, above which less input is taken next."""
BEGINNINGS = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".zst"),
    # Frames to skip, with which pzstd begins a file. Source: RFC 8878, section 3.1.2.
    **{bytes([low]) + b"\x2a\x4d\x18": ("Zstandard", ".zst") for low in range(0x50, 0x60)},
    b"PAR1": ("parquet", ".parquet"),
    b"BZh": ("bzip2", None),
    b"\xfd7zXZ": ("xz", None),
}
"""Kind and suffix of files that are not plain text, by their first bytes; None: not read."""


class DamagedError(Exception):
    """A packed file is damaged; the text says how."""


DAMAGES = (EOFError, gzip.BadGzipFile, zlib.error, DamagedError)
"""Exceptions from reading a stream of ``unpacked`` where the file is damaged."""


def unpacked(raw: BinaryIO, file: Path) -> io.BufferedReader:
    """Return the unpacked bytes of ``file`` as a stream over its bytes ``raw``.

    Raises:
        ValueError: the file is of another kind than its name says.
    """
    packing = PACKINGS.get(file.suffix.lower())
    beginning = raw.read(max(map(len, BEGINNINGS)))
    raw.seek(0)
    kind, suffix = next(
        (found for magic, found in BEGINNINGS.items() if beginning.startswith(magic)), (None, None)
    )
    if kind is not None and kind != packing:
        way_out = f"name it *{suffix}" if suffix else "unpack it first"
        raise ValueError(f"{file} is a {kind} file, which its name does not say; {way_out}")
    if kind != packing and beginning:
        raise ValueError(
            f"{file} is no {packing} file, though its name says so; download it again, or take "
            f"{file.suffix} off its name if it is not packed"
        )
    if packing == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 18)
    if packing == "Zstandard":
        return io.BufferedReader(_ZstdStream(raw), 1 << 18)
    assert isinstance(raw, io.BufferedReader)
    return raw


class _ZstdStream(io.RawIOBase):
    """Stream of the unpacked bytes of Zstandard frames.

    zstandard's own stream reader takes a frame that was cut short for a whole one.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        # The widest window of any frame: archives of text are packed with --long.
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
                    raise DamagedError("it ends in the middle of a Zstandard frame")
                return 0
            self._unpacked = memoryview(self._unpack(packed))
            low, high = FEED_BYTES
            is_dense = len(self._unpacked) > DENSE_BYTES
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
                raise DamagedError(str(error)) from None
            packed = b""
            if self._frame.eof:
                packed, self._frame = self._frame.unused_data, None
        return b"".join(parts)
