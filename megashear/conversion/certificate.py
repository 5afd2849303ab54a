"""Write certificate.json, which lists what a conversion read and wrote by tensor, and check it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear import __version__
from megashear.checkpoint.description import TRACKER, find_iteration, read_description
from megashear.checkpoint.weights import CheckpointWeights
from megashear.conversion.hf import HfWeights
from megashear.conversion.hf_config import CONFIG, read_shape
from megashear.conversion.safetensors_file import bytes_of
from megashear.files import durable
from megashear.files.regular import inside, open_regular
from megashear.files.structured import check_fields, read_json_object
from megashear.files.workers import byte_bar, run_all
from megashear.models import weight_table
from megashear.models.formats import DTYPES, dtypes_of, name_of, stored_bytes
from megashear.shape import ModelShape

CERTIFICATE = "certificate.json"
FORMAT = 1
"""Version of the certificate; raised when an older megashear cannot read it."""
_WEIGHT_FILES = {".safetensors", ".distcp"}


@dataclass(frozen=True, slots=True)
class Record:
    """One converted weight, in Hugging Face's layout on both sides."""

    shape: tuple[int, ...]
    source_dtype: str
    """Number format in which the weight was read: "bfloat16"."""
    source_sha256: str
    """SHA-256 of the bytes that were read, row by row, little-endian."""
    dtype: str
    """Number format in which the weight was written."""
    sha256: str
    """SHA-256 of the bytes that were written; ``source_sha256`` where formats are equal."""

    @property
    def num_bytes(self) -> int:
        """Return the size of the written weight, bytes."""
        return DTYPES[self.dtype].itemsize * torch.Size(self.shape).numel()


class Witness:
    """Record of every weight that is converted; several threads may call it."""

    def __init__(self, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        self.records: dict[str, Record] = {}
        self._advance = advance
        self._lock = threading.Lock()

    def __call__(self, name: str, source: Tensor, result: Tensor) -> None:
        """Hash a weight as it was read and as it was written."""
        digest = _digest(source)
        record = Record(
            tuple(source.shape),
            name_of(source.dtype),
            digest,
            name_of(result.dtype),
            digest if _same_bytes(source, result) else _digest(result),
        )
        with self._lock:
            self.records[name] = record
        self._advance(source.nbytes)

    @property
    def dtypes(self) -> list[str]:
        """Return the number formats that were written, sorted."""
        return sorted({record.dtype for record in self.records.values()})

    @property
    def rounded_to(self) -> torch.dtype | None:
        """Return the format to which weights were rounded; None where every value was kept."""
        for record in self.records.values():
            if record.dtype not in (record.source_dtype, "float32"):
                return DTYPES[record.dtype]
        return None


def write(
    directory: Path,
    witness: Witness,
    shape: ModelShape,
    *,
    source: Path | str,
    logits: Mapping[str, Any] | None = None,
    iteration: int | None = None,
) -> None:
    """Write the certificate of a conversion into its finished directory.

    Args:
        directory: the checkpoint's or the Hugging Face directory.
        witness: of all weights.
        shape: of the model.
        source: directory the weights came from; its name is noted.
        logits: what a comparison of logits found, if there was one.
        iteration: of a checkpoint.
    """
    records = {name: witness.records[name] for name in weight_table.hf_shapes(shape)}
    values = {
        "format": FORMAT,
        "megashear": __version__,
        "source": Path(source).resolve().name,
        "family": shape.family,
        "num_params": shape.num_params(),
        "num_weights": len(records),
        "bytes": sum(record.num_bytes for record in records.values()),
        "equal_to_source": all(r.sha256 == r.source_sha256 for r in records.values()),
        "shape": shape.to_dict(),
        "iteration": iteration,
        "logits": logits,
        "files": {name: _file_digest(directory / name) for name in _small_files(directory)},
        "weights": {name: dataclasses.asdict(record) for name, record in records.items()},
    }
    durable.replace(directory / CERTIFICATE, json.dumps(values, indent=1) + "\n")


def check(
    directory: Path | str, *, workers: int = 1, progress: bool | None = None
) -> dict[str, Any]:
    """Compare a converted directory with its certificate: read and hash every weight again.

    Args:
        directory: what `convert` wrote, either way.
        workers: threads.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        What was checked.

    Raises:
        ValueError: no certificate; weights or files are not those it describes: the first that
            differs is named, in the order of the model, and how many do.
    """
    directory = Path(directory)
    certificate = _read(directory)
    weights: HfWeights | CheckpointWeights
    if _is_hf(directory):
        shape = read_shape(directory)
        _check_shape(directory, certificate, shape)
        weights = HfWeights(directory, shape)
    else:
        found = find_iteration(directory, certificate["iteration"])
        shape = read_description(found).shape
        _check_shape(directory, certificate, shape)
        weights = CheckpointWeights(found, shape=shape)
    wanted = {name: Record(**record) for name, record in certificate["weights"].items()}
    weight_table.check_names(wanted.keys(), shape, f"certificate {directory / CERTIFICATE}")
    differing = _differing(weights, wanted, workers, progress)
    files = [
        name
        for name, digest in certificate["files"].items()
        if not (path := inside(directory, name, directory / CERTIFICATE)).is_file()
        or _file_digest(path) != digest
    ]
    if differing:
        first = differing[0]
        raise ValueError(
            f"{directory} is not what was converted: {first} differs from its certificate, the "
            f"first of {len(differing)} of {len(wanted)} weights that do; convert again"
        )
    if files:
        raise ValueError(
            f"{directory} is not what was converted: {files[0]} differs from its certificate or is "
            f"missing, the first of {len(files)} of {len(certificate['files'])} files beside the "
            f"weights that do; the weights are as they were"
        )
    return {
        "checked": str(directory),
        "weights": len(wanted),
        "bytes": certificate["bytes"],
        "files beside the weights": len(certificate["files"]),
        "equal to the source": certificate["equal_to_source"],
        "relative error of logits": (certificate["logits"] or {}).get("relative_error"),
    }


def _read(directory: Path) -> dict[str, Any]:
    path = directory / CERTIFICATE
    if not directory.is_dir():
        raise ValueError(f"nothing to check at {directory}: it is not a directory")
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {CERTIFICATE}: give the directory that `megashear convert` wrote "
            f"(of a checkpoint, the one with {TRACKER}), or convert its source again"
        )
    try:
        values = read_json_object(path, "it")
        found = values["format"]
        for record in values["weights"].values() if found == FORMAT else ():
            check_fields(Record, record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is broken: no JSON object with a format in it ({error})"
        ) from None
    if found != FORMAT:
        raise ValueError(
            f"{path} is of format {found}, this megashear reads {FORMAT}; use the megashear that "
            f"wrote it ({values.get('megashear')})"
        )
    return values


def _check_shape(directory: Path, certificate: Mapping[str, Any], shape: ModelShape) -> None:
    found, wanted = shape.to_dict(), certificate["shape"]
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"{directory} is not what was converted: {name} of the model is {found[name]}, its "
                f"certificate says {value}; convert again"
            )


def _differing(
    weights: HfWeights | CheckpointWeights,
    wanted: Mapping[str, Record],
    workers: int,
    progress: bool | None,
) -> list[str]:
    """Return the names of weights that have changed, in the order of the model."""
    dtypes, bad = dtypes_of(weights), set()
    with byte_bar("checking", stored_bytes(dtypes, weights.shape), progress) as advance:

        def check(
            row: weight_table.MegatronTensor, layer: int | None
        ) -> Generator[int, None, None]:
            for part in row.parts:
                name = part.hf_name.format(layer=layer)
                weight = weights[name]
                found = (name_of(weight.dtype), _digest(weight))
                if found != (wanted[name].dtype, wanted[name].sha256):
                    bad.add(name)
                advance(weight.nbytes)
                yield weight.nbytes

        run_all([check(row, layer) for row, layer in weight_table.tensors(weights.shape)], workers)
    return [name for name in wanted if name in bad]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor.detach().cpu())).hexdigest()


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same bits, which is faster than hashing the second."""
    if one.dtype != other.dtype:
        return False
    if (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()):
        return True
    wide = torch.int64 if one.nbytes % 8 == 0 else torch.uint8
    bits = (tensor.detach().cpu().contiguous().view(-1).view(wide) for tensor in (one, other))
    return torch.equal(*bits)


def _is_hf(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def _small_files(directory: Path) -> list[str]:
    """Return all files but weights, the certificate, and the tracker, which a run changes."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix not in _WEIGHT_FILES
        if path.name not in (CERTIFICATE, TRACKER)
    )


def _file_digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
