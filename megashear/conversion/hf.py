"""Read and write the weights of a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import logging
import operator
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megashear.conversion.hf_config import CONFIG, check_expressible, config_of_shape, read_shape
from megashear.conversion.safetensors_file import (
    DTYPE_NAMES,
    DTYPE_OF,
    Entry,
    SafetensorsWriter,
    read_header,
    read_tensor,
)
from megashear.files.aside import check_space, written_aside
from megashear.files.regular import inside
from megashear.files.structured import read_json_object
from megashear.files.torch_files import load_mapped, tensors_of
from megashear.files.workers import run_all
from megashear.models import loadable, weight_table
from megashear.models.finite import first_not_finite
from megashear.models.formats import (
    DTYPES,
    NOT_FINITE,
    dtype_of,
    dtypes_of,
    name_of,
    rounded,
    stored_bytes,
    widest,
)
from megashear.shape import ModelShape
from megashear.tokenizer import tokenizer_files

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
_OLD_SINGLE = "pytorch_model.bin"
_OLD_INDEX = "pytorch_model.bin.index.json"
_OF_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
MAX_SHARD_BYTES = 5_000_000_000
"""Largest weights file, bytes, unless one tensor alone is larger. Source: transformers."""

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_AT_ONCE = 2**24
"""Values of a tied pair that are in memory at a time."""


class HfWeights(Mapping[str, Tensor]):
    """The weights of a Hugging Face directory by name, each read when it is asked for.

    Names and shapes are held to the table at once; no weight is read before it is asked for.
    Several threads may read.

    Args:
        directory: holds config.json and safetensors, in one file or several with an index.
        shape: extents the weights must have; by default those of config.json.

    Raises:
        ValueError: no such directory, no safetensors, a file missing or truncated, an index that
            does not say where the weights are, names missing or unknown, a shape or a number
            format that the model cannot have. When a weight is read: a number that is not finite.
    """

    def __init__(self, directory: Path | str, shape: ModelShape | None = None) -> None:
        self.directory = Path(directory)
        self.shape = read_shape(directory) if shape is None else shape
        self._places: dict[str, tuple[Path, Entry]] = {}
        self._mapped: dict[Path, dict[str, Tensor]] = {}  # of files that torch.save wrote
        self._stored_as: dict[str, str] = {}  # where a file has another name for a weight
        single, index_path = _names_of_files(self.directory)
        index = _read_index(single, index_path)
        for path in _weight_files(single, index_path, index):
            for name, entry in self._header(path).items():
                self._check_entry(name, entry, path)
                if name not in self._places or (
                    index is not None and index["weight_map"].get(name) == path.name
                ):
                    self._places[name] = (path, entry)
        if index is not None:
            self._check_index(index, index_path)
        if self.shape.tied_embeddings and _OUTPUT in self._places:
            if _EMBEDDING in self._places:
                self._check_tied()
            else:  # a writer that stores what is shared once may keep either name
                self._places[_EMBEDDING] = self._places[_OUTPUT]
                self._stored_as[_EMBEDDING] = _OUTPUT
            del self._places[_OUTPUT]
        found = {name: entry.shape for name, (_, entry) in self._places.items()}
        if weight_table.hf_shapes(self.shape).keys() - found.keys() == {_OUTPUT}:
            raise ValueError(
                f"HF checkpoint {directory} lacks one weight, {_OUTPUT}, and its {CONFIG} does not "
                f"say tie_word_embeddings true; say it if the output layer is the embedding"
            )
        weight_table.check_hf(found, self.shape, f"HF checkpoint {directory}")
        self._names = tuple(weight_table.hf_shapes(self.shape))

    def _header(self, path: Path) -> dict[str, Entry]:
        if path.suffix != ".bin":
            return read_header(path)
        mapped = self._mapped[path] = tensors_of(load_mapped(path), str(path))
        return {
            name: Entry(
                DTYPE_OF.get(tensor.dtype, name_of(tensor.dtype)),
                tuple(tensor.shape),
                0,
                tensor.nbytes,
            )
            for name, tensor in mapped.items()
        }

    def _check_entry(self, name: str, entry: Entry, path: Path) -> None:
        if name in self._places and not weight_table.NOT_WEIGHTS.fullmatch(name):
            other, same = self._places[name]
            if (entry.dtype, entry.shape) != (same.dtype, same.shape) or not torch.equal(
                self._read(name, other, same), self._read(name, path, entry)
            ):
                raise ValueError(
                    f"{path}: {name} is in {other.name} too, with another value; keep the file "
                    f"that the model has it from"
                )
        if entry.dtype not in DTYPE_NAMES and not weight_table.NOT_WEIGHTS.fullmatch(name):
            raise ValueError(
                f"{path}: {name} is stored as {entry.dtype}, wanted one of {list(DTYPE_NAMES)}; "
                f"save the model in {' or '.join(DTYPES)} first"
            )

    def _check_tied(self) -> None:
        """Refuse an output layer beside a tied embedding unless both are equal."""
        rows = max(1, _COMPARED_AT_ONCE // self.shape.hidden_size)
        shapes = [self._places[name][1].shape for name in (_EMBEDDING, _OUTPUT)]
        if shapes[0] == shapes[1] and all(
            torch.equal(self.read_slice(_EMBEDDING, (at,)), self.read_slice(_OUTPUT, (at,)))
            for at in (slice(first, first + rows) for first in range(0, shapes[0][0], rows))
        ):
            return
        raise ValueError(
            f"HF checkpoint {self.directory}: {CONFIG} has tie_word_embeddings true, but "
            f"{_OUTPUT} is not {_EMBEDDING}; set it to false if the model has an output layer of "
            f"its own, or remove {_OUTPUT}"
        )

    def _check_index(self, index: Mapping[str, Any], path: Path) -> None:
        """Compare the index with the files, which may belong to two models."""
        listed = index["weight_map"]
        way_out = (
            "the files may be of two downloads: download all of them again, or, if they are known "
            "to be of one model, correct the index"
        )
        for name, file in listed.items():
            if weight_table.NOT_WEIGHTS.fullmatch(name):
                continue
            held_by = self._places[name][0].name if name in self._places else None
            if held_by is None and self._is_optional(name, self._places):
                continue
            if held_by != file:
                found = held_by or "none of them"
                raise ValueError(f"{path} puts {name} into {file}, it is in {found}; {way_out}")
        for name, (place, _) in self._places.items():
            if name not in listed and not self._is_optional(name, listed):
                raise ValueError(f"{path} does not list {name} of {place.name}; {way_out}")
        said = (index.get("metadata") or {}).get("total_size")
        held = sum(entry.num_bytes for _, entry in self._places.values())
        if said is not None and int(said) not in (held, self._distinct_bytes()):
            # nothing is lost: names, files and extents agree, and no reader needs this number
            logger.warning(
                "%s gives total_size %s bytes, the files hold %s; passed over, for all weights "
                "that it lists are there",
                path,
                f"{int(said):,}",
                f"{held:,}",
            )

    def _is_optional(self, name: str, names: Collection[str]) -> bool:
        """Return whether ``names`` may lack a name: of a tied pair writers list and store either
        name or both, and nobody reads stored rotary tables."""
        if self.shape.tied_embeddings and name in (_EMBEDDING, _OUTPUT):
            return not {_EMBEDDING, _OUTPUT}.isdisjoint(names)
        return weight_table.NOT_WEIGHTS.fullmatch(name) is not None

    def _distinct_bytes(self) -> int:
        """Return the bytes of all files' tensors, of those that share memory one."""
        sizes: dict[Any, int] = {}
        for name, (path, entry) in self._places.items():
            mapped = self._mapped.get(path, {}).get(name)
            key = (path, name) if mapped is None else (path, mapped.data_ptr())
            sizes[key] = max(entry.num_bytes, sizes.get(key, 0))
        return sum(sizes.values())

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the number format of every weight."""
        return {name: self._places[name][1].torch_dtype for name in self._names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        found = self._read(self._stored_as.get(name, name), *self._places[name])
        self._check_finite(name, found)
        return found

    def _read(self, stored: str, path: Path, entry: Entry) -> Tensor:
        if path in self._mapped:
            return self._mapped[path][stored].clone()
        return read_tensor(path, entry)

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """Read part of a weight, and no more.

        Raises:
            ValueError: the file cannot be read any longer, or holds a number that is not finite.
        """
        path, stored = self._places[name][0], self._stored_as.get(name, name)
        if path in self._mapped:
            found = self._mapped[path][stored][slices].clone()
        else:
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    found = file.get_slice(stored)[slices]
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}; is it being changed?") from None
        self._check_finite(name, found, slices)
        return found

    def _check_finite(self, name: str, found: Tensor, slices: tuple[slice, ...] = ()) -> None:
        """Refuse a weight that would make every loss NaN, by the file, the name and the place."""
        if (bad := first_not_finite([(name, found)])) is not None:
            starts = [part.start or 0 for part in slices] + [0] * len(bad.place)
            bad = bad._replace(place=tuple(map(operator.add, starts, bad.place)))
            raise ValueError(f"{self._places[name][0]}: {bad}; {NOT_FINITE}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_directory(
    output: Path | str,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    **options: Any,
) -> int:
    """Write a Hugging Face directory, which appears whole or not at all.

    Args:
        output: directory to make; must not exist.
        weights: see `fill_directory`.
        shape: extents of the model.
        options: those of `fill_directory`.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: ``output`` exists; see `fill_directory`.
    """
    with written_aside(output) as aside:
        return fill_directory(aside, weights, shape, **options)


def fill_directory(
    directory: Path,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    *,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    kept_fields: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
    witness: Callable[[str, Tensor, Tensor], None] | None = None,
) -> int:
    """Write the files of a Hugging Face directory that transformers and vLLM load.

    Memory holds the weights of one Megatron parameter for each worker.

    Args:
        directory: an empty directory.
        weights: every weight of the model by name, each read once. Pairs are gathered first, so
            weights on disk come as a mapping.
        shape: extents of the model.
        dtype: number format to store, a key of `formats.DTYPES`; None keeps each weight's own.
        tokenizer: what `tokenizer_files.find` takes; its files are copied.
        token_ids: ``bos_token_id`` and the like; missing ones are taken from the tokenizer.
        kept_fields: `hf_fields.kept_fields` of the config.json that the model came with.
        max_shard_bytes: largest weights file, bytes.
        workers: threads; the bytes written do not depend on their number.
        witness: called by all workers with the name of every weight that they write, the weight as
            it was given, and the weight as it is stored.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: ``dtype`` is unknown; names or shapes of the weights are not the model's; no
            config.json describes it; a tokenizer file does not exist; the disk is full, or will be.
    """
    # check what can be checked
    stored = dtype_of(dtype)
    check_expressible(shape)
    loadable.warn(shape)
    files = tokenizer_files.find(tokenizer)
    ids = tokenizer_files.token_ids(files) | {
        name: value for name, value in (token_ids or {}).items() if value is not None
    }
    weights = weights if isinstance(weights, Mapping) else dict(weights)
    where = "the model to be written"
    weight_table.check_names(weights.keys(), shape, where)
    kept = {name: stored or found for name, found in dtypes_of(weights).items()}
    num_bytes = stored_bytes(kept, shape)
    check_space(directory, num_bytes)
    # write the weights
    with _opened(directory, shape, kept, max_shard_bytes) as writer_of:

        def write(
            row: weight_table.MegatronTensor, layer: int | None
        ) -> Generator[int, None, None]:
            # weights of one Megatron parameter are read together
            for part in row.parts:
                name = part.hf_name.format(layer=layer)
                weight = weights[name]
                weight_table.check_extents(name, weight.shape, part.extents(shape), where)
                result = rounded(name, weight, kept[name])
                writer_of[name].write(name, result)
                if witness is not None:
                    witness(name, weight, result)
                yield result.nbytes

        run_all([write(row, layer) for row, layer in weight_table.tensors(shape)], workers)
    # write the small files
    config = config_of_shape(
        shape, dtype=name_of(widest(kept.values())), token_ids=ids, kept=kept_fields
    )
    _write_json(directory / CONFIG, config)
    tokenizer_files.copy_for_transformers(files, directory)
    _complete_generation_config(directory / GENERATION, ids)
    return num_bytes


@contextlib.contextmanager
def _opened(
    directory: Path, shape: ModelShape, dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> Iterator[dict[str, SafetensorsWriter]]:
    """Open the weight files, give the one of each weight, and write the index of several files."""
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = []
    room = 0
    for name, extents in weight_table.hf_shapes(shape).items():
        num_bytes = dtypes[name].itemsize * torch.Size(extents).numel()
        if not shards or num_bytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = (extents, dtypes[name])
        room -= num_bytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        total = {"total_size": stored_bytes(dtypes, shape)}
        _write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})
    with contextlib.ExitStack() as stack:
        writer_of: dict[str, SafetensorsWriter] = {}
        for file, shard in zip(names, shards):
            writer = stack.enter_context(SafetensorsWriter(directory / file, shard))
            writer_of |= dict.fromkeys(shard, writer)
        yield writer_of


def _names_of_files(directory: Path) -> tuple[Path, Path]:
    """Return the paths of a single weights file and of an index.

    They have the names of old releases of transformers where no others exist.
    """
    found = {name for name in (SINGLE, INDEX) if (directory / name).is_file()}
    old = {name for name in (_OLD_SINGLE, _OLD_INDEX) if (directory / name).is_file()}
    if old and not found:
        return directory / _OLD_SINGLE, directory / _OLD_INDEX
    return directory / SINGLE, directory / INDEX


def _read_index(single: Path, path: Path) -> dict[str, Any] | None:
    """Read the index of several files; None where one file holds all."""
    if single.is_file() or not path.is_file():
        return None
    index = read_json_object(path)
    try:
        sorted(set(index["weight_map"].values()))
        int((index.get("metadata") or {}).get("total_size") or 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not an index of safetensors: no weight_map in it") from None
    return index


def _weight_files(
    single: Path, index_path: Path, index: Mapping[str, Any] | None
) -> Sequence[Path]:
    directory = single.parent
    if index is None:
        if single.is_file():
            return [single]
        found = sorted(path.name for path in directory.iterdir() if path.suffix in _OF_WEIGHTS)
        beside = f"; of weights it holds {', '.join(found[:3])}" if found else ""
        if any("-of-" in name for name in found):
            beside += ", whose index is missing: download it too"
        elif found:
            beside += ": save the model with transformers' save_pretrained"
        raise ValueError(
            f"HF checkpoint {directory} has neither {SINGLE} nor {INDEX}, nor {_OLD_SINGLE} nor "
            f"{_OLD_INDEX}{beside}"
        )
    names = sorted(set(index["weight_map"].values()))
    for name in names:
        path = inside(directory, name, index_path)
        if path.suffix != single.suffix:
            raise ValueError(f"{index_path} names {name}, wanted a *{single.suffix} file")
        if path.parent != directory:
            raise ValueError(f"{index_path} names {name}, which is not a file of its own directory")
        if not (directory / name).is_file():
            raise ValueError(f"{index_path} names {name}, which is missing; download it again")
    return [directory / name for name in names]


def _complete_generation_config(path: Path, ids: Mapping[str, Any]) -> None:
    """Write the file that says where text ends, or add to a file the end tokens that it lacks.

    Generation takes the end from this file alone where it is there, and not from config.json. A
    file none of whose end tokens the checkpoint has was made so on purpose, and stays.
    """
    if not path.is_file():
        if ids:
            _write_json(path, {"_from_model_config": True, **ids})
        return
    said = read_json_object(path, wide_integers=True)
    known, ours = (_ids(values.get("eos_token_id")) for values in (said, ids))
    missing = [number for number in ours if number not in known]
    if not known and ours:
        _write_json(path, said | {"eos_token_id": ids["eos_token_id"]})
    elif missing and len(missing) < len(ours):
        _write_json(path, said | {"eos_token_id": [*known, *missing]})


def _ids(value: Any) -> list[Any]:
    """Return the token ids of a field that has one, several or none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
