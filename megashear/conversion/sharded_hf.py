"""Fill a model from a Hugging Face directory; each rank reads only its own slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from tqdm import tqdm

from megashear.checkpoint import optimizer_state
from megashear.checkpoint.description import Description
from megashear.checkpoint.weights import without_extra_state
from megashear.conversion.hf import HfWeights
from megashear.conversion.sources import open_hf
from megashear.models import weight_table
from megashear.models.llama import unwrap
from megashear.parallel.agree import raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.tokenizer import tokenizer_files


def describe(directory: Path | str) -> Description:
    """Return the description of a checkpoint converted from a Hugging Face directory.

    Names, shapes and number formats of its weights are checked; no weight is read.

    Raises:
        ValueError: see `hf.HfWeights`.
    """
    description, files = open_hf(directory).described(), tokenizer_files.find(directory)
    return dataclasses.replace(
        description,
        tokenizer_sha256=tokenizer_files.fingerprint(files),
        token_ids=tokenizer_files.token_ids(files) | description.token_ids,
    )


def load_hf(
    directory: Path | str,
    chunks: Sequence[torch.nn.Module],
    groups: ParallelGroups,
    optimizer: MegatronOptimizer | None = None,
    *,
    progress: bool | None = None,
) -> None:
    """Fill the model from a Hugging Face directory of its shape, at any layout.

    A rank reads the rows and columns that it holds, nothing else, and is filled as from a
    checkpoint that `megashear convert` made of the directory, bit by bit. Collective over the
    world.

    Args:
        directory: safetensors with their config.json.
        chunks: this rank's model chunks.
        groups: where this rank stands.
        optimizer: whose float32 masters of bfloat16 weights are filled too, unrounded.
        progress: show a bar on rank 0; None shows it when stderr is a terminal.

    Raises:
        ValueError: on every rank, if the directory cannot be read, or is another model's.
    """
    with raise_together():
        weights = HfWeights(directory)
        shards = [shard for chunk in chunks for shard in _shards(chunk)]
        own = {} if optimizer is None else optimizer_state.optimizer_shards(optimizer)
        disable = groups.rank != 0 or (None if progress is None else not progress)
        with torch.no_grad():
            for shard, parameter in tqdm(shards, desc="reading", unit="tensor", disable=disable):
                row, layer, start = _place(shard, weights.shape)
                exact = torch.empty_like(shard.data, dtype=torch.float32)
                _fill(exact, weights, row, layer, start)
                shard.data.copy_(exact)
                optimizer_state.fill_master(shard.data, parameter, own, exact)


def _shards(chunk: torch.nn.Module) -> list[tuple[ShardedTensor, Tensor]]:
    """Return the shards of a chunk with their places in the whole model, and their live parameters.

    Gate and up are one parameter and two shards.
    """
    entries = without_extra_state(unwrap(chunk).sharded_state_dict())
    found = [(shard, parameter) for _, shard, parameter in optimizer_state.shards({"": entries})]
    assert all(isinstance(shard, ShardedTensor) for shard, _ in found), "an entry is no tensor"
    return found


def _place(
    shard: ShardedTensor, shape: ModelShape
) -> tuple[weight_table.MegatronTensor, int | None, tuple[int, ...]]:
    """Return row of the table, layer, and where a shard begins in the whole parameter."""
    row = next(row for row, _ in weight_table.tensors(shape) if row.key == shard.key)
    if row.per_layer:
        return row, shard.global_offset[0], tuple(shard.global_offset[1:])
    return row, None, tuple(shard.global_offset)


def _fill(
    target: Tensor,
    weights: HfWeights,
    row: weight_table.MegatronTensor,
    layer: int | None,
    start: tuple[int, ...],
) -> None:
    """Copy the part of a parameter that begins at ``start`` and is as large as ``target``."""
    shape = weights.shape
    columns = tuple(slice(begin, begin + size) for begin, size in zip(start[1:], target.shape[1:]))
    if row.fusion is weight_table.Fusion.QKV:
        _fill_interleaved(target, weights, row, layer, start[0], columns)
        return
    filled = 0
    for part, own, into in _stretches(row, start[0], len(target), shape):
        name = part.hf_name.format(layer=layer)
        target[into].copy_(weights.read_slice(name, (own, *columns)))
        filled += into.stop - into.start
    # a vocabulary padded to divide has rows that no token reads
    target[filled:].zero_()


def _stretches(
    row: weight_table.MegatronTensor, first: int, length: int, shape: ModelShape
) -> Iterator[tuple[weight_table.Weight, slice, slice]]:
    """Yield where rows [first, first + length) of concatenated parts lie: in each part, and in the
    target."""
    at = 0
    for part in row.parts:
        rows = part.extents(shape)[0]
        begin, end = max(first - at, 0), min(first + length - at, rows)
        if begin < end:
            yield part, slice(begin, end), slice(begin + at - first, end + at - first)
        at += rows


def _fill_interleaved(
    target: Tensor,
    weights: HfWeights,
    row: weight_table.MegatronTensor,
    layer: int | None,
    first: int,
    columns: tuple[slice, ...],
) -> None:
    """Copy q, k and v of the query groups from row ``first`` of the whole parameter on."""
    shape = weights.shape
    per_group = row.extents(shape)[0] // shape.num_query_groups  # (H/G + 2) * d
    assert first % per_group == 0, "a shard that begins inside of a query group"
    assert len(target) % per_group == 0, "a shard that ends inside of a query group"
    group, count = first // per_group, len(target) // per_group
    parts = []
    for part in row.parts:
        rows = part.extents(shape)[0] // shape.num_query_groups
        own = slice(group * rows, (group + count) * rows)
        name = part.hf_name.format(layer=layer)
        parts.append(weights.read_slice(name, (own, *columns)))
    held = dataclasses.replace(
        shape, num_query_groups=count, num_attention_heads=count * shape.heads_per_group
    )
    target.copy_(weight_table.fuse(row, parts, held))
