"""Hold every pickle in a checkpoint to an allow-list before anything loads it."""

from __future__ import annotations

import argparse
import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megashear.files.pointers import refuse_pointer
from megashear.files.torch_files import only_known, unread

METADATA = ".metadata"
COMMON = "common.pt"
COMMON_ENTRY = "common_state/shard_0_1"
"""Byte entry that holds what ``common.pt`` held before. Source: megatron-core 0.19.2,
dist_checkpointing/serialization.py, `load_common_state_dict`: the first of a list."""

# What torch 2.13 and megatron-core 0.16.1 put into .metadata: records and enumerations that do
# nothing when they are made, and one lookup in a table of layouts.
_ALLOWED: dict[str, frozenset[str]] = {
    "torch": frozenset(
        {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8"}
    ),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.planner": frozenset(
        {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
}


_ARGUMENTS = "argparse.Namespace"
"""What Megatron-LM keeps the arguments of a run in: attributes, no code."""
_BESIDE_ARGUMENTS = (
    "_codecs.encode",
    "_io.BytesIO",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "torch._C.Generator",
    "types.SimpleNamespace",
)
"""What else Megatron-LM's checkpoints hold, none of which is needed. Source: megatron-core 0.16.1
and 0.19.2, safe_globals.py, and what these are made of when they are unpickled."""


def check_pickles(directory: Path) -> Metadata:
    """Read the index of a dist_checkpointing directory, and run none of its code.

    torch and megatron-core unpickle ``.metadata`` and byte entries without limits, so a
    checkpoint from elsewhere could run anything. Call this before they see the directory.

    Args:
        directory: one iteration of a checkpoint.

    Returns:
        The index: shapes, files and offsets of all entries.

    Raises:
        ValueError: a file is missing or broken, a pickle in it wants anything but plain records
            and tensors (the thing is named), or an entry lies outside of the directory.
    """
    metadata = check_index(directory)
    if (directory / COMMON).is_file():
        read_common(directory)
    for index, place in (metadata.storage_data or {}).items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            _read_byte_entry(directory, index.fqn, place)
    return metadata


def check_index(directory: Path) -> Metadata:
    """Check the index as `check_pickles` does, for callers that never read byte entries.

    Raises:
        ValueError: as `check_pickles`.
    """
    metadata = _read_metadata(directory / METADATA)
    sizes: dict[str, int | None] = {}  # of each file once; it has thousands of entries
    for index, place in (metadata.storage_data or {}).items():
        name = place.relative_path
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{directory / METADATA} puts {index.fqn} into {place.relative_path}, which is "
                f"not a file of its own directory; refused"
            )
        if not all(isinstance(n, int) and 0 <= n < 2**63 for n in (place.offset, place.length)):
            raise ValueError(
                f"{directory / METADATA} is broken: {index.fqn} has {place.length} bytes from byte "
                f"{place.offset} on; copy the checkpoint again"
            )
        if name not in sizes:
            path = directory / name
            refuse_pointer(path)
            sizes[name] = path.stat().st_size if path.is_file() else None
        size = sizes[name]
        if size is None or size < place.offset + place.length:
            raise ValueError(
                f"checkpoint {directory} is incomplete: {index.fqn} ends at byte "
                f"{place.offset + place.length:,} of {name}, which is "
                + ("missing" if size is None else f"{size:,} bytes")
                + "; copy it again"
            )
    return metadata


def read_common(
    directory: Path, *, foreign: bool = False, metadata: Metadata | None = None
) -> dict[str, Any]:
    """Read the common state of an iteration: tensors, plain values and Megatron-LM's arguments.

    Args:
        directory: one iteration of a checkpoint.
        foreign: Megatron-LM itself wrote it: let enumerations and the like pass, which are read as
            `torch_files.Unread` and not made.
        metadata: the index of the directory, as `check_index` gives it: where there is no
            ``common.pt``, the entry `COMMON_ENTRY` is read.

    Raises:
        ValueError: there is neither, or it is broken, or wants anything else (the thing is named).
    """
    known: list[tuple[type, str]] = [(argparse.Namespace, _ARGUMENTS)]
    known += unread(_BESIDE_ARGUMENTS) if foreign else []
    path = directory / COMMON
    where = f"{path}"
    if path.is_file():
        common = _read_plain(path.read_bytes(), where, known)
    else:
        places = {} if metadata is None else metadata.storage_data or {}
        place = next((at for index, at in places.items() if index.fqn == COMMON_ENTRY), None)
        if place is None:
            raise ValueError(
                f"checkpoint {directory} is incomplete: neither a {COMMON} nor, as from "
                f"megatron-core 0.19, an entry {COMMON_ENTRY} in its index; copy it again"
            )
        found = _read_byte_entry(directory, COMMON_ENTRY, place, known)
        where = f"{COMMON_ENTRY} in {directory / place.relative_path}"
        common = found[0] if isinstance(found, list) and len(found) == 1 else found
    if not isinstance(common, dict):
        raise ValueError(f"{where} holds a {type(common).__name__}, not a checkpoint's values")
    return common


def _read_byte_entry(
    directory: Path, name: str, place: Any, known: Sequence[tuple[type, str]] = ()
) -> Any:
    path = directory / place.relative_path
    where = f"{name} in {path}"
    if transformed := getattr(place, "transform_descriptors", None):
        raise ValueError(f"{where} is transformed by {transformed}, which is not known; refused")
    with path.open("rb") as file:
        file.seek(place.offset)
        return _read_plain(file.read(place.length), where, known)


class _Restricted(pickle.Unpickler):
    """Unpickler that makes only objects on the allow-list."""

    def __init__(self, file: io.BufferedIOBase, where: Path) -> None:
        super().__init__(file)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle asks for by name.

        Raises:
            ValueError: it is not on the allow-list.
        """
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(
                f"{self.where} wants to load {module}.{name} when it is read, which no checkpoint "
                f"needs and which could run code; refused"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Refuse an object outside of the pickle.

        Raises:
            ValueError: always; no checkpoint has such a thing.
        """
        raise ValueError(f"{self.where} refers to something outside of itself ({pid}); refused")


def _read_metadata(path: Path) -> Metadata:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no checkpoint, or was never finished: no {path.name}")
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            metadata = _Restricted(file, path).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is broken: {error}; copy the checkpoint again") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, not a checkpoint's metadata")
    return metadata


def _read_plain(data: bytes, where: str, known: Sequence[tuple[type, str]] = ()) -> Any:
    """Read a torch.save file, refusing anything but tensors, plain containers and ``known``."""
    try:
        with only_known(known):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # only this part of torch's message: the rest explains how to load the file anyway
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to load {found[1]}" if found else "is no plain torch.save file"
        raise ValueError(
            f"{where} {what} when it is read; only tensors and plain values are, because anything "
            f"else could run code; refused"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{where} is broken: {error}; copy the checkpoint again") from None
