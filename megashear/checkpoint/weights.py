"""The weights of a Megatron checkpoint, written whole and read tensor by tensor, on one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megashear.checkpoint import tokenizer_files
from megashear.checkpoint.aside import written_aside
from megashear.checkpoint.description import (
    TOKENIZER,
    TRACKER,
    Description,
    find_iteration,
    iteration_name,
    read_description,
    write_description,
)
from megashear.checkpoint.pickles import check_pickles
from megashear.models import layout
from megashear.parallel import device
from megashear.parallel.launch import process_group
from megashear.shape import ModelShape

EXTRA_STATE = "_extra_state"
"""Last part of the names of megatron-core's byte entries, which hold nothing of ours."""


def without_extra_state(sharded_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A model's ``sharded_state_dict()`` without its byte entries, for saving and for loading.

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
) -> int:
    """Write a Megatron checkpoint of one iteration that loads at any layout.

    ``output`` becomes ``iter_NNNNNNN/`` (dist_checkpointing, format torch_dist, with
    megashear.json and tokenizer/) and ``latest_checkpointed_iteration.txt``; it is written aside
    and renamed. The whole model is in memory once, in the format it is stored in. Collective over
    the world where torch.distributed is open; else a private group of one is opened.

    Args:
        output: directory to make; must not exist.
        weights: every weight of the model by its Hugging Face name, or pairs of both (what `cut`
            gives) in any order; taken one at a time.
        description: what goes into megashear.json; the tokenizer's fingerprint and the token ids
            it lacks are added.
        dtype: number format to store; None keeps each weight's own.
        tokenizer: what `tokenizer_files.find` takes; its files are carried along.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: ``output`` exists; names or shapes are not the model's; weights that Megatron
            fuses are of different formats.
    """
    from megatron.core import dist_checkpointing

    device.install()
    shape, files = description.shape, tokenizer_files.find(tokenizer)
    with written_aside(output) as aside, process_group():
        directory = aside / iteration_name(description.iteration)
        directory.mkdir()
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        entries, num_bytes = _entries(pairs, shape, dtype)
        dist_checkpointing.save(entries, str(directory))
        (directory / TOKENIZER).mkdir()
        tokenizer_files.copy(files, directory / TOKENIZER)
        write_description(directory, _with_tokenizer(description, files))
        (aside / TRACKER).write_text(str(description.iteration), encoding="utf-8")
    return num_bytes


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a Megatron checkpoint by Hugging Face name, each read when it is asked for.

    Pickles, names and shapes are checked at once; no weight is read before it is asked for. What
    Megatron fuses is read together: ask for q, k, v one after the other. Optimizer states and
    masks beside the weights are passed over.

    Args:
        checkpoint: a checkpoint's directory, or one iteration's.
        iteration: which one; by default the newest.
        shape: extents that the weights must have; by default those of megashear.json.

    Raises:
        ValueError: no checkpoint there; it is incomplete, another model's, or could run code.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        iteration: int | None = None,
        shape: ModelShape | None = None,
    ) -> None:
        self.directory = find_iteration(checkpoint, iteration)
        self.description = read_description(self.directory)
        self.shape = self.description.shape if shape is None else shape
        metadata = check_pickles(self.directory)
        keys = layout.checkpoint_shapes(self.shape)
        found = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            # beside the weights a run keeps optimizer states and masks
            if key in keys or key.startswith(("decoder.", "embedding.", "output_layer."))
            if isinstance(entry, TensorStorageMetadata)
        }
        layout.check_stored(
            {key: tuple(entry.size) for key, entry in found.items()},
            self.shape,
            f"checkpoint {self.directory}",
        )
        self._stored = found
        # The metadata that was checked is the one that is used: torch does not read it again.
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._owners = layout.owners(self.shape)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer's files; empty if none were carried."""
        return self.directory / TOKENIZER

    def __getitem__(self, name: str) -> Tensor:
        row, layer = self._owners[name]
        fused = row.name.format(layer=layer)
        if self._last[0] != fused:
            parts = layout.split(row, self._read(row, layer), self.shape)
            names = [part.hf_name.format(layer=layer) for part in row.parts]
            self._last = (fused, dict(zip(names, parts)))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def _read(self, row: layout.MegatronTensor, layer: int | None) -> Tensor:
        extents = row.extents(self.shape)
        entry = self._stored[row.key]
        whole = torch.empty(extents, dtype=entry.properties.dtype)
        first: list[int] = [] if layer is None else [layer]
        box = ChunkStorageMetadata(
            offsets=torch.Size([*first, *[0] * len(extents)]),
            sizes=torch.Size([*[1 for _ in first], *extents]),
        )
        items = create_read_items_for_chunk_list(row.key, entry, [box])
        into = whole if layer is None else whole[None]  # [1, ...]
        self._reader.read_data(LoadPlan(items), _IntoOneTensor(into)).wait()
        return whole


class _IntoOneTensor(LoadPlanner):
    """Lets torch's reader fill one tensor; the plan is made already, and no rank is asked."""

    def __init__(self, into: Tensor) -> None:
        self.into = into

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.into
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("plans are made by CheckpointWeights, and byte entries are not read")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = load_bytes = _unused


def _entries(
    weights: Iterable[tuple[str, Tensor]], shape: ModelShape, dtype: torch.dtype | None
) -> tuple[dict[str, Any], int]:
    """The sharded state dict of the whole model, and the bytes in it."""
    where = "the model to be written"
    owners, shapes = layout.owners(shape), layout.hf_shapes(shape)
    entries: dict[str, Any] = {}
    pending: dict[str, dict[str, Tensor]] = {}  # by parameter, its weights seen so far
    num_bytes, seen = 0, set()
    for name, weight in weights:
        seen.add(name)
        if name not in owners:
            continue  # refused with all others of its kind, below
        layout.check_extents(name, weight.shape, shapes[name], where)
        row, layer = owners[name]
        fused = row.name.format(layer=layer)
        parts = pending.setdefault(fused, {})
        parts[name] = weight.detach().cpu().to(weight.dtype if dtype is None else dtype)
        if len(parts) == len(row.parts):
            whole = _fuse(row, layer, pending.pop(fused), shape)
            entries[fused] = _sharded(row, layer, whole, shape)
            num_bytes += whole.nbytes
    layout.check_names(seen, shape, where)
    return entries, num_bytes


def _fuse(
    row: layout.MegatronTensor, layer: int | None, parts: dict[str, Tensor], shape: ModelShape
) -> Tensor:
    if len({part.dtype for part in parts.values()}) > 1:
        raise ValueError(
            f"{', '.join(parts)} are of {', '.join(str(p.dtype) for p in parts.values())}, but "
            f"Megatron keeps them in one tensor; choose one dtype for the output"
        )
    in_order = [parts[part.hf_name.format(layer=layer)] for part in row.parts]
    return layout.fuse(row, in_order, shape)


def _sharded(
    row: layout.MegatronTensor, layer: int | None, whole: Tensor, shape: ModelShape
) -> Any:
    """Where a whole parameter lies in the checkpoint: as GPTModel.sharded_state_dict() says."""
    from megatron.core.dist_checkpointing import ShardedTensor

    if layer is None:
        return ShardedTensor.from_rank_offsets(row.key, whole)
    stacked = (0, layer, shape.num_layers)  # the layer axis, put before the parameter's own
    return ShardedTensor.from_rank_offsets(row.key, whole, stacked, prepend_axis_num=1)


def _with_tokenizer(description: Description, files: list[Path]) -> Description:
    return dataclasses.replace(
        description,
        tokenizer_sha256=tokenizer_files.fingerprint(files),
        token_ids=tokenizer_files.token_ids(files) | description.token_ids,
    )
