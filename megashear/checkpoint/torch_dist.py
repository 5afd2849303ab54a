"""Read and write megatron-core's torch_dist format by tensor, without a process group."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megashear.checkpoint.pickles import COMMON, METADATA
from megashear.files.aside import forget
from megashear.files.integrity import FileSum, HashingFile
from megashear.files.regular import open_regular

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json. Source: megatron-core 0.16.1, dist_checkpointing `CheckpointingConfig`."""
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)
"""Errors of `read_entry` where bytes have changed."""


def read_entry(directory: Path, place: _StorageInfo) -> Tensor:
    """Read one box of a tensor, as it was written, and nothing else.

    Args:
        directory: an iteration's directory, whose pickles were checked.
        place: place of the box, from the index.

    Raises:
        Exception: one of `UNREADABLE`.
    """
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"it is transformed by {place.transform_descriptors}, which is not known")
    with open_regular(directory / place.relative_path, buffering=0) as file:
        window = cast(IO[bytes], _Window(file, place.offset, place.length))
        found = torch.load(window, map_location="cpu", weights_only=True)
    if not isinstance(found, Tensor):
        raise ValueError(f"it holds a {type(found).__name__}, not a tensor")
    return found


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """Let torch.save leave out its own checksums, a sixth of the time that a checkpoint takes.

    torch.load does not look at them, and `integrity` has stronger ones of the whole file. Some
    releases of torch keep the setting for each thread, others for the process: use it around all
    threads and in each.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class EntryFile(HashingFile):
    """A ``*.distcp`` file being written: entries of ``torch.save``, one after the other.

    Source: torch 2.13, torch.distributed.checkpoint.filesystem.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._name = path.name
        self._error: OSError | None = None

    def __enter__(self) -> EntryFile:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes and return their number."""
        try:
            return super().write(data)
        except OSError as error:
            self._error = error
            raise

    def append(self, data: Tensor | io.BytesIO) -> _StorageInfo:
        """Append one entry and return its place.

        Args:
            data: a tensor on the CPU, or the bytes of an entry that is none.

        Raises:
            OSError: the file cannot be written.
        """
        begin = self.tell()
        if isinstance(data, io.BytesIO):
            self.write(data.getbuffer())
        else:
            if data.untyped_storage().nbytes() != data.nbytes:
                data = data.clone()  # torch.save would write the whole storage
            try:
                torch.save(data, cast(IO[bytes], self))
            except RuntimeError:
                if self._error is not None:  # torch hides it behind an error of its own
                    raise self._error from None
                raise
        return _StorageInfo(self._name, begin, self.tell() - begin)

    def forget(self, place: _StorageInfo) -> None:
        """Let the kernel write an entry to the disk now, and drop its copy."""
        self.flush()
        forget(self._file.fileno(), place.offset, place.length)


class TorchDistWriter:
    """Writer of ``*.distcp`` files and of the index that makes a checkpoint of them.

    Each file may have a thread of its own. Nothing can read the directory as a checkpoint before
    `finish`.

    Args:
        directory: exists, and holds no checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], _StorageInfo]] = {}
        self._tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._lock = threading.Lock()
        self.sums: dict[str, FileSum] = {}
        """Size and checksum of every file that is written, by name."""

    def file(self, number: int) -> TorchDistFile:
        """Return the ``number``-th file, to be filled in a ``with`` block."""
        return TorchDistFile(self, f"__0_{number}.distcp")

    def finish(self, common: Mapping[str, Any]) -> None:
        """Write plain values and the index, which make the directory a checkpoint.

        Args:
            common: values for ``common.pt``.
        """
        metadata = Metadata({}, storage_data={}, storage_meta=StorageMeta())
        for (key, offsets), (sizes, place) in sorted(self._entries.items()):
            extents, dtype = self._tensors[key]
            tensor = metadata.state_dict_metadata.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(extents), [])
            )
            assert isinstance(tensor, TensorStorageMetadata)
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            metadata.storage_data[MetadataIndex(key, offsets)] = place
        torch.save(dict(common), self.directory / COMMON)
        (self.directory / METADATA).write_bytes(pickle.dumps(metadata))
        (self.directory / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")

    def _check_dtype(self, key: str, extents: Sequence[int], dtype: torch.dtype) -> None:
        with self._lock:
            first = self._tensors.setdefault(key, (tuple(extents), dtype))
        assert first[0] == tuple(extents), f"{key} has two shapes"
        if first[1] != dtype:
            raise ValueError(
                f"{key} is of {first[1]} in one layer and of {dtype} in another, but Megatron "
                f"keeps all layers in one tensor; choose one dtype for the output"
            )

    def _add(self, key: str, offsets: Sequence[int], sizes: Sequence[int], place: Any) -> None:
        with self._lock:
            assert (key, tuple(offsets)) not in self._entries, f"{key} at {offsets} written twice"
            self._entries[key, tuple(offsets)] = (tuple(sizes), place)


class TorchDistFile:
    """One ``*.distcp`` file of a `TorchDistWriter`, in a ``with`` block."""

    def __init__(self, writer: TorchDistWriter, name: str) -> None:
        self.writer, self.name = writer, name
        self.num_bytes = 0

    def __enter__(self) -> TorchDistFile:
        self._file = EntryFile(self.writer.directory / self.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.__exit__(kind, *rest)
        self.writer.sums[self.name] = self._file.sum

    def add(self, key: str, tensor: Tensor, extents: Sequence[int], offsets: Sequence[int]) -> None:
        """Append one box of a tensor.

        Args:
            key: of the tensor in the checkpoint.
            tensor: what the box holds, on the CPU, in the format it is stored in.
            extents: global shape of the whole tensor.
            offsets: where in it the box begins.

        Raises:
            ValueError: another box of the tensor is of another format.
            OSError: the file cannot be written to.
        """
        self.writer._check_dtype(key, extents, tensor.dtype)
        assert len(tensor.shape) == len(extents) == len(offsets), f"{key} {list(tensor.shape)}"
        place = self._file.append(tensor.contiguous())
        self._file.forget(place)
        self.writer._add(key, offsets, tensor.shape, place)
        self.num_bytes += tensor.nbytes


class _Window(io.RawIOBase):
    """Part of a file, with the methods of ``io.RawIOBase``."""

    def __init__(self, file: io.RawIOBase, begin: int, length: int) -> None:
        self._file, self._begin, self._length = file, begin, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(f"no byte {start + offset} in an entry")
        self._position = start + offset
        return self._position

    def readinto(self, into: Any) -> int:
        left = max(self._length - self._position, 0)
        view = memoryview(into).cast("B")[:left]
        self._file.seek(self._begin + self._position)
        count = self._file.readinto(view) or 0
        self._position += count
        return count
