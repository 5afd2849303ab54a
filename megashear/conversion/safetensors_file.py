"""Read and write safetensors files by weight, without a map of a file or a file in memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megashear.files.aside import forget
from megashear.files.pointers import refuse_pointer
from megashear.files.regular import open_regular
from megashear.files.structured import parse_json

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Number formats of weights by safetensors' names for them."""
DTYPE_OF = {dtype: name for name, dtype in _DTYPES.items()}
"""Safetensors' names of these formats."""
DTYPE_NAMES = tuple(sorted(_DTYPES))
"""The formats that can be read, as safetensors names them."""
_ALIGNMENT = 8
"""The header's length is a multiple of this, bytes. Source: the format's description."""
_MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors reads. Source: the library."""
_PIECE_BYTES = 2**22
"""Bytes written at a time: the kernel writes whole weights at once four times as slowly."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    """Number format as safetensors names it: "BF16"."""
    shape: tuple[int, ...]
    begin: int
    """Offset in the file, bytes."""
    num_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the number format, which must be one of `DTYPE_NAMES`."""
        return _DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, Entry]:
    """Return the places of all tensors of a file by name; no tensor is read.

    Raises:
        ValueError: it is no safetensors file, or truncated.
    """
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass  # holds lengths, offsets and the file's size to each other
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            # safe_open refuses a header of more than 100 MB
            header = parse_json(file.read(length), f"the header of {path}")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}; "
            f"{_way_out(path)}"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: Entry(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            begin=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _way_out(path: Path) -> str:
    """Return what is wrong with a file that is refused; damage only where it shows."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if not header.startswith(b"{"):
        return "it is no safetensors file, or damaged: download or write it again"
    try:
        entries = parse_json(header, "the header")
        end = 8 + length + max(e["data_offsets"][1] for n, e in entries.items() if n[:2] != "__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "its header is truncated or damaged: download or write it again"
    if size < end:
        return f"it is truncated, its header wants {end:,} bytes: download or write it again"
    return "nothing is cut off: another release of safetensors may read it"


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """Read one tensor into memory of its own: pages of a mapped file would count as the process's.

    Raises:
        ValueError: the file is shorter than its header says.
    """
    tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
    into = bytes_of(tensor)
    with open_regular(path, buffering=0) as file:
        file.seek(entry.begin)
        while into:
            count = file.readinto(into)
            if not count:
                raise ValueError(f"{path} ends within a weight: it changed while it was read")
            into = into[count:]
        forget(file.fileno(), entry.begin, entry.num_bytes)
    return tensor


class SafetensorsWriter:
    """A file whose names, shapes and formats are known, so that its weights may come in any order.

    Several threads may write, each other weights. Use in a ``with`` block; at its end the file is
    on the disk.

    Args:
        path: file to make.
        entries: shape and number format of every weight by name. Wider formats lie first, so that
            each weight is aligned to its own.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[Sequence[int], torch.dtype]]
    ) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}  # name -> begin, number of bytes
        end = 0
        for name in sorted(entries, key=lambda name: -entries[name][1].itemsize):
            shape, dtype = entries[name]
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {
                "dtype": DTYPE_OF[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
            self._places[name] = (begin, end - begin)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self._num_bytes = len(self._header) + end
        self._missing = set(entries)
        self._lock = threading.Lock()

    def __enter__(self) -> SafetensorsWriter:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.ftruncate(self._handle, self._num_bytes)
            self._write(memoryview(self._header), 0)
        except BaseException:
            os.close(self._handle)
            raise
        return self

    def write(self, name: str, weight: Tensor) -> None:
        """Put a weight, of the shape and format announced, into its place."""
        begin, num_bytes = self._places[name]
        assert weight.nbytes == num_bytes, f"{name} is not as it was announced"
        with self._lock:
            assert name in self._missing, f"{name} given twice"
            self._missing.remove(name)
        self._write(bytes_of(weight), len(self._header) + begin)
        forget(self._handle, len(self._header) + begin, num_bytes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                assert not self._missing, f"{self.path} lacks {sorted(self._missing)}"
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._handle, data[:_PIECE_BYTES], offset)
            data, offset = data[count:], offset + count


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    octets: npt.NDArray[np.uint8] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(octets.data)
