"""Write and read the weights of a Megatron checkpoint by tensor, in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megashear.checkpoint.description import (
    TOKENIZER,
    TRACKER,
    Description,
    find_iteration,
    iteration_name,
    read_description,
    write_description,
)
from megashear.checkpoint.megatron_lm_args import common_state
from megashear.checkpoint.pickles import check_pickles
from megashear.checkpoint.torch_dist import (
    UNREADABLE,
    TorchDistFile,
    TorchDistWriter,
    read_entry,
    without_crc32,
)
from megashear.files import durable, integrity
from megashear.files.aside import check_space, written_aside
from megashear.files.workers import run_all
from megashear.models import weight_table
from megashear.models.finite import first_not_finite
from megashear.models.formats import NOT_FINITE, dtypes_of, rounded, stored_bytes
from megashear.shape import ModelShape
from megashear.tokenizer import tokenizer_files

EXTRA_STATE = "_extra_state"
"""Last part of the names of megatron-core's byte entries, which megashear does not need."""
FILE_BYTES = 2**30
"""A file of a checkpoint ends with the parameter that makes it this long, bytes: some files of any
large model, so that several are written and read at a time, and not one for every layer."""

MASTERS = "optimizer.state.fp32_param."
"""Prefix of a weight's key for its float32 master, in a checkpoint of a bfloat16 run."""

Row = tuple[weight_table.MegatronTensor, int | None]
"""A Megatron parameter and its layer."""
Witness = Callable[[str, Tensor, Tensor], None]
"""Function of a weight: its Hugging Face name, its given value, its stored value."""

_WHERE = "the model to be written"


def without_extra_state(sharded_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's ``sharded_state_dict()`` without byte entries, for saving and loading.

    Linear layers add an empty pickle each, and loading fails where the checkpoint lacks it.
    """
    return {
        name: entry
        for name, entry in sharded_state_dict.items()
        if not name.rpartition(".")[2].startswith(EXTRA_STATE)
    }


def write_weights(
    output: Path | str,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    description: Description,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    workers: int = 1,
    witness: Witness | None = None,
) -> int:
    """Write a Megatron checkpoint of one iteration, which appears whole or not at all.

    Args and errors are those of `fill_checkpoint`.

    Args:
        output: directory to make; must not exist.

    Raises:
        ValueError: ``output`` exists.
    """
    with written_aside(output) as aside:
        return fill_checkpoint(
            aside,
            weights,
            description,
            dtype=dtype,
            tokenizer=tokenizer,
            workers=workers,
            witness=witness,
        )


def fill_checkpoint(
    checkpoint: Path,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    description: Description,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    workers: int = 1,
    witness: Witness | None = None,
) -> int:
    """Write a Megatron checkpoint of one iteration that loads at any layout.

    It consists of ``iter_NNNNNNN/`` (dist_checkpointing, format torch_dist, with megashear.json
    and tokenizer/) and ``latest_checkpointed_iteration.txt``. No process group is needed; of
    several processes only one may call this function. Memory holds the weights of one Megatron
    parameter for each worker, not the model.

    Args:
        checkpoint: an empty directory.
        weights: every weight of the model by its Hugging Face name, each read once; or pairs of
            both (what `cut` gives) in any order, taken one at a time by one worker.
        description: content of megashear.json; the tokenizer's fingerprint and missing token ids
            are added.
        dtype: number format to store; None keeps each weight's own.
        tokenizer: what `tokenizer_files.find` takes; its files are copied.
        workers: threads, each at its own file; the bytes written do not depend on their number.
        witness: called by all workers with every weight that they write.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: names or shapes are not the model's; weights that Megatron keeps in one tensor
            are of different formats; the disk is full, or will be.
    """
    shape, files = description.shape, tokenizer_files.find(tokenizer)
    directory = checkpoint / iteration_name(description.iteration)
    directory.mkdir()
    model = _Model(TorchDistWriter(directory), shape, dtype, witness)
    with without_crc32():
        if isinstance(weights, Mapping):
            num_bytes = model.write_by_name(weights, workers)
        else:
            num_bytes = model.write_pairs(weights)
    model.writer.finish(common_state(shape, description.iteration))
    (directory / TOKENIZER).mkdir()
    tokenizer_files.copy(files, directory / TOKENIZER)
    write_description(directory, _with_tokenizer(description, files))
    integrity.write(directory, model.writer.sums)
    durable.replace(checkpoint / TRACKER, str(description.iteration))
    return num_bytes


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a Megatron checkpoint by Hugging Face name, each read when it is asked for.

    Pickles, names and shapes are checked at once; no weight is read before it is asked for. What
    Megatron fuses is read together: ask for q, k, v one after the other, in one thread. Several
    threads may read. Moments and masks beside the weights are passed over; of a bfloat16 run the
    float32 masters are read, which its weights round.

    Args:
        checkpoint: a checkpoint's directory, or one iteration's.
        iteration: which one; by default the newest.
        shape: extents that the weights must have; by default those of megashear.json.

    Raises:
        ValueError: no checkpoint there; it is incomplete, another model's, or could run code. When
            a weight is read: a number that is not finite.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        iteration: int | None = None,
        shape: ModelShape | None = None,
    ) -> None:
        directory = find_iteration(checkpoint, iteration)
        description = read_description(directory)
        if shape is not None:
            description = dataclasses.replace(description, shape=shape)
        metadata = check_pickles(directory)
        # a bfloat16 run's weights are its float32 masters, rounded
        has_masters = any(key.startswith(MASTERS) for key in metadata.state_dict_metadata)
        self._open(directory, metadata, description, prefix=MASTERS if has_masters else "")

    def _open(
        self,
        directory: Path,
        metadata: Metadata,
        description: Description,
        *,
        prefix: str = "",
        padded: Collection[str] = (),
    ) -> None:
        """Compare what is stored with the table.

        Args:
            directory: one iteration's.
            metadata: its index, which is safe to use.
            description: of the model.
            prefix: what stands before every key of the model.
            padded: keys of tensors that may be stored with more rows than the model has.
        """
        self.directory, self.description, self.shape = directory, description, description.shape
        wanted = weight_table.checkpoint_shapes(self.shape)
        self._prefix = prefix
        self._stored = {
            key.removeprefix(prefix): entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            if key.startswith(prefix)
            if key.removeprefix(prefix) in wanted or self._is_weight(key.removeprefix(prefix))
        }
        found = {key: tuple(entry.size) for key, entry in self._stored.items()}
        for key in padded:
            if key in found and key in wanted and found[key][0] > wanted[key][0]:
                found[key] = (wanted[key][0], *found[key][1:])
        weight_table.check_stored(found, self.shape, f"checkpoint {directory}")
        self._places = metadata.storage_data
        self._owners = weight_table.owners(self.shape)
        self._last = (
            threading.local()
        )  # weights of each thread's last parameter that were not asked for

    def _is_weight(self, key: str) -> bool:
        """Return whether a tensor that is not in the table belongs to the model.

        Beside the weights a run keeps optimizer states and masks.
        """
        return key.startswith(("decoder.", "embedding.", "output_layer."))

    @property
    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer's files, which may be empty."""
        return self.directory / TOKENIZER

    def __getitem__(self, name: str) -> Tensor:
        row, layer = self._owners[name]
        last = self._last.__dict__  # this thread's
        if name not in last:
            last.clear()  # or memory would hold it beside the next one
            parts = weight_table.split(row, self._read(row, layer), self.shape)
            named = dict(zip(_names(row, layer), parts))
            if (bad := first_not_finite(named.items())) is not None:
                raise ValueError(f"checkpoint {self.directory}: {bad}; {NOT_FINITE}")
            last.update(named)
        found: Tensor = last.pop(name)  # usually asked for once, and not held beside its user
        return found

    @property
    def trained_in(self) -> str | None:
        """Return "bfloat16" of what a --bf16 run made, or of its cut, which are read in float32."""
        flags = self.description.known.flags
        return "bfloat16" if self._prefix == MASTERS or flags.bf16 else None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the number format of every weight."""
        return {n: self._stored[row.key].properties.dtype for n, (row, _) in self._owners.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def _read(self, row: weight_table.MegatronTensor, layer: int | None) -> Tensor:
        # find the parts in the index
        extents = row.extents(self.shape)
        entry = self._stored[row.key]
        first: list[int] = [] if layer is None else [layer]
        box = ChunkStorageMetadata(
            offsets=torch.Size([*first, *[0] * len(extents)]),
            sizes=torch.Size([*[1 for _ in first], *extents]),
        )
        where = row.key if layer is None else f"{row.key} of layer {layer}"
        items = create_read_items_for_chunk_list(self._prefix + row.key, entry, [box])
        if sum(item.lengths.numel() for item in items) < box.sizes.numel():
            # a place that no part covers would hold old memory
            raise ValueError(f"checkpoint {self.directory} lacks part of {where}; copy it again")
        whole: Tensor | None = None
        for item in items:
            # read one part
            try:
                saved = read_entry(self.directory, self._places[item.storage_index])
            except UNREADABLE as error:
                raise ValueError(
                    f"checkpoint {self.directory} is damaged: {where} cannot be read: {error}; "
                    f"copy it again"
                ) from error
            part = _box(saved, item.storage_offsets, item.lengths)
            if part.dtype != entry.properties.dtype or part.shape != item.lengths:
                raise ValueError(
                    f"checkpoint {self.directory} is damaged: {where} holds {part.dtype} "
                    f"{list(part.shape)} where its index says {entry.properties.dtype} "
                    f"{list(item.lengths)}; copy it again"
                )
            # put it into the whole
            if part.shape == box.sizes:  # a converted checkpoint has one part
                return part.reshape(extents)
            if whole is None:
                whole = torch.empty(box.sizes, dtype=part.dtype)
            _box(whole, item.dest_offsets, item.lengths).copy_(part)
        assert whole is not None, "an empty parameter"
        return whole.reshape(extents)


def _box(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return the part of a tensor that begins at ``offsets``; shorter where the tensor ends."""
    return tensor[tuple(slice(at, at + length) for at, length in zip(offsets, lengths))]


class _Model:
    """Writer of a model into a checkpoint, one Megatron parameter after the other."""

    def __init__(
        self,
        writer: TorchDistWriter,
        shape: ModelShape,
        dtype: torch.dtype | None,
        witness: Witness | None,
    ) -> None:
        self.writer, self.shape, self.dtype, self.witness = writer, shape, dtype, witness

    def write_by_name(self, weights: Mapping[str, Tensor], workers: int) -> int:
        """Write all files, several at a time, and return the bytes written."""
        weight_table.check_names(weights.keys(), self.shape, _WHERE)
        kept = {name: self.dtype or dtype for name, dtype in dtypes_of(weights).items()}
        check_space(self.writer.directory.parent, stored_bytes(kept, self.shape))
        files: list[list[Row]] = []
        size = FILE_BYTES
        for row, layer in weight_table.tensors(self.shape):
            if size >= FILE_BYTES:
                files.append([])
                size = 0
            files[-1].append((row, layer))
            dtype = kept[_names(row, layer)[0]]
            size += dtype.itemsize * torch.Size(row.extents(self.shape)).numel()

        def fill(number: int, rows: list[Row]) -> Generator[int, None, None]:
            with without_crc32(), self.writer.file(number) as file:
                for row, layer in rows:
                    parts = {name: weights[name] for name in _names(row, layer)}
                    yield self._add(file, row, layer, parts)

        return run_all([fill(number, rows) for number, rows in enumerate(files)], workers)

    def write_pairs(self, pairs: Iterable[tuple[str, Tensor]]) -> int:
        """Write weights as they come, and return the bytes written."""
        num_bytes = number = 0
        with contextlib.ExitStack() as stack:
            file: TorchDistFile | None = None
            for row, layer, parts in self._complete(pairs):
                if file is None or file.num_bytes >= FILE_BYTES:
                    stack.close()
                    file = stack.enter_context(self.writer.file(number))
                    number += 1
                num_bytes += self._add(file, row, layer, parts)
        return num_bytes

    def _complete(
        self, pairs: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[weight_table.MegatronTensor, int | None, dict[str, Tensor]]]:
        """Yield every Megatron parameter once all its weights have come."""
        owners = weight_table.owners(self.shape)
        pending: dict[str, dict[str, Tensor]] = {}  # by parameter, its weights seen so far
        seen = set()
        for name, weight in pairs:
            seen.add(name)
            if name not in owners:
                continue  # refused below, with all other unknown names
            row, layer = owners[name]
            parts = pending.setdefault(row.name.format(layer=layer), {})
            parts[name] = weight
            del weight  # or the generator would hold it while the next is read
            if len(parts) == len(row.parts):
                del pending[row.name.format(layer=layer)]
                yield row, layer, {part: parts[part] for part in _names(row, layer)}
        weight_table.check_names(seen, self.shape, _WHERE)

    def _add(
        self,
        file: TorchDistFile,
        row: weight_table.MegatronTensor,
        layer: int | None,
        parts: Mapping[str, Tensor],
    ) -> int:
        stored = {}
        for (name, weight), part in zip(parts.items(), row.parts):
            weight_table.check_extents(name, weight.shape, part.extents(self.shape), _WHERE)
            stored[name] = rounded(name, weight, self.dtype or weight.dtype)
        whole = _fuse(row, stored, self.shape)
        # where GPTModel.sharded_state_dict() puts it: the layer axis before the parameter's own
        box, first = (whole, []) if layer is None else (whole[None], [layer])
        extents = row.stored_extents(self.shape)
        file.add(row.key, box, extents, [*first, *[0] * whole.dim()])
        if self.witness is not None:
            # split again, as a reader of the checkpoint will
            for name, found in zip(parts, weight_table.split(row, whole, self.shape)):
                self.witness(name, parts[name], found)
        return whole.nbytes


def _fuse(
    row: weight_table.MegatronTensor, parts: Mapping[str, Tensor], shape: ModelShape
) -> Tensor:
    if len({part.dtype for part in parts.values()}) > 1:
        raise ValueError(
            f"{', '.join(parts)} are of {', '.join(str(p.dtype) for p in parts.values())}, but "
            f"Megatron keeps them in one tensor; choose one dtype for the output"
        )
    return weight_table.fuse(row, list(parts.values()), shape)


def _names(row: weight_table.MegatronTensor, layer: int | None) -> list[str]:
    return [part.hf_name.format(layer=layer) for part in row.parts]


def _with_tokenizer(description: Description, files: list[Path]) -> Description:
    return dataclasses.replace(
        description,
        tokenizer_sha256=tokenizer_files.fingerprint(files),
        token_ids=tokenizer_files.token_ids(files) | description.token_ids,
    )
