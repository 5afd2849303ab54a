"""Read and write the weights of a Hugging Face LLaMA directory, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megashear.checkpoint import tokenizer_files
from megashear.checkpoint.aside import written_aside
from megashear.checkpoint.formats import DTYPES, dtype_of
from megashear.checkpoint.hf_config import CONFIG, config_of_shape, read_shape
from megashear.models import layout
from megashear.shape import ModelShape

__all__ = ["DTYPES", "MAX_SHARD_BYTES", "HfWeights", "dtype_of", "read_shape", "write_directory"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Largest weights file, bytes, unless one tensor alone is larger. Source: transformers."""

_STORED_DTYPES = {"F32", "BF16", "F16"}


class HfWeights(Mapping[str, Tensor]):
    """The weights of a Hugging Face directory by name, each read when it is asked for.

    Names and shapes are held to the table at once; no weight is read before it is asked for.

    Args:
        directory: holds config.json and safetensors, in one file or several with an index.
        shape: extents the weights must have; by default those of config.json.

    Raises:
        ValueError: no such directory, no safetensors, a file missing or truncated, names missing
            or unknown, a shape or a number format that the model cannot have.
    """

    def __init__(self, directory: Path | str, shape: ModelShape | None = None) -> None:
        self.directory = Path(directory)
        self.shape = read_shape(directory) if shape is None else shape
        self._file_of: dict[str, Any] = {}  # name -> open file
        found: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(self.directory):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                header = file.get_slice(name)
                found[name] = tuple(header.get_shape())
                self._check_entry(name, header.get_dtype(), path)
                self._file_of[name] = file
        layout.check_hf(found, self.shape, f"HF checkpoint {directory}")
        self._names = tuple(layout.hf_shapes(self.shape))

    def _check_entry(self, name: str, dtype: str, path: Path) -> None:
        if name in self._file_of:
            raise ValueError(f"{path}: {name} is in another file of the directory too")
        if dtype not in _STORED_DTYPES and not layout.NOT_WEIGHTS.fullmatch(name):
            raise ValueError(
                f"{path}: {name} is stored as {dtype}, wanted one of {sorted(_STORED_DTYPES)}; "
                f"save the model in {' or '.join(DTYPES)} first"
            )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file_of[name].get_tensor(name)

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """Part of a weight; the rest of it is not read."""
        return self._file_of[name].get_slice(name)[slices]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_directory(
    output: Path | str,
    weights: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    *,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a Hugging Face directory that transformers and vLLM load as a LlamaForCausalLM.

    It is written aside and renamed, so it appears whole or not at all. At most one file's
    weights are in memory.

    Args:
        output: directory to make; must not exist.
        weights: every weight of the model with its name, in any order; taken one at a time.
        shape: extents of the model.
        dtype: number format to store, a key of `DTYPES`; None keeps each weight's own.
        tokenizer: what `tokenizer_files.find` takes; its files are copied.
        token_ids: ``bos_token_id`` and the like; what they lack is taken from the tokenizer.
        max_shard_bytes: largest weights file, bytes.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: ``output`` exists; ``dtype`` is unknown; names or shapes of the weights are
            not the model's; a tokenizer file does not exist.
    """
    stored = dtype_of(dtype)
    files = tokenizer_files.find(tokenizer)
    ids = tokenizer_files.token_ids(files) | {
        name: value for name, value in (token_ids or {}).items() if value is not None
    }
    with written_aside(output) as aside:
        shards = _Shards(aside, max_shard_bytes, stored)
        for name, weight in weights:
            shards.add(name, weight)
        layout.check_hf(shards.shapes, shape, f"the model to be written to {output}")
        total_bytes = shards.finish()
        config = config_of_shape(shape, dtype=shards.main_dtype(), token_ids=ids)
        _write_json(aside / CONFIG, config)
        tokenizer_files.copy_for_transformers(files, aside)
    return total_bytes


class _Shards:
    """Safetensors files filled one after the other; the last names need the number of files."""

    def __init__(self, directory: Path, max_bytes: int, dtype: torch.dtype | None) -> None:
        self.directory, self.max_bytes, self.dtype = directory, max_bytes, dtype
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._names_of: list[list[str]] = []
        self._bytes_of_dtype: dict[str, int] = {}

    def add(self, name: str, weight: Tensor) -> None:
        assert name not in self.shapes, f"{name} given twice"
        weight = weight.detach().cpu().to(self.dtype or weight.dtype).contiguous()
        if self._pending and self._pending_bytes + weight.nbytes > self.max_bytes:
            self._flush()
        self.shapes[name] = tuple(weight.shape)
        self._pending[name] = weight
        self._pending_bytes += weight.nbytes
        self._total_bytes += weight.nbytes
        stored = str(weight.dtype).removeprefix("torch.")
        self._bytes_of_dtype[stored] = self._bytes_of_dtype.get(stored, 0) + weight.nbytes

    def main_dtype(self) -> str:
        """The number format that most bytes are in."""
        return max(self._bytes_of_dtype, key=self._bytes_of_dtype.__getitem__)

    def finish(self) -> int:
        """Give the files their final names, write the index, return the bytes of all weights."""
        self._flush()
        count = len(self._names_of)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names_of, start=1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            _write_json(self.directory / INDEX, index)
        return self._total_bytes

    def _flush(self) -> None:
        self._names_of.append(list(self._pending))
        part = self._part(len(self._names_of))
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(0o644)
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}.safetensors"


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        if list(directory.glob("pytorch_model*.bin")):
            raise ValueError(
                f"HF checkpoint {directory} has pytorch_model.bin files only, which can run code "
                f"when read; convert it with transformers' "
                f"save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"HF checkpoint {directory} has neither {SINGLE} nor {INDEX}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of safetensors: no weight_map in it") from None
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name}, which is not a file of its own directory")
        if not (directory / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing; download it again")
    return [directory / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}; it "
            f"may be truncated: download or write it again"
        ) from None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
