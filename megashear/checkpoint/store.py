"""Save and load a run, at any layout: weights, optimizer, masks, and where the data stands."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megashear.checkpoint import tokenizer_files
from megashear.checkpoint.description import (
    TOKENIZER,
    TRACKER,
    Description,
    find_iteration,
    iteration_name,
    latest_iteration,
    read_description,
    write_description,
)
from megashear.checkpoint.megatron_lm_args import common_state
from megashear.checkpoint.pickles import check_pickles
from megashear.checkpoint.weights import without_extra_state
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.mask_set import MaskPart, MaskSet, by_layer
from megashear.masks.optimizer import MaskOptimizer
from megashear.models import layout
from megashear.models.binding import SPLIT_OVER_TENSOR
from megashear.models.llama import unwrap
from megashear.parallel import device
from megashear.parallel.agree import raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import process_group

logger = logging.getLogger(__name__)


def _metadata() -> dict[str, Any]:
    """How dist_checkpointing shapes optimizer state; the same for saving and loading.

    A new one each time: megatron-core puts the data-parallel group of the day into it.
    """
    return {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, kw_only=True)
class MaskState:
    """What a pruning run keeps beside the weights."""

    masks: MaskSet
    constraint: SparsityConstraint
    optimizer: MaskOptimizer

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Live tensors by kind and name, shaped like log_alpha; multipliers under ``""``."""
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.masks.parts}
        found[""] = dict(self.constraint.state_dict())
        for kind, log_alpha in self.masks.state_dict().items():
            found[kind]["log_alpha"] = log_alpha
        for name, moment in self.optimizer.state_tensors().items():
            kind, _, rest = name.partition(".")
            if kind in self.masks.parts:
                found[kind][rest] = moment
            else:
                found[""][name] = moment
        return found


def save_run(
    root: Path | str,
    description: Description,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    *,
    masks: MaskState | None = None,
    tokenizer: Path | str | None = None,
) -> Path:
    """Write one iteration aside, make it visible, then name it the latest.

    Collective over the world.

    Args:
        root: the run's checkpoint directory; made if needed.
        description: shape, iteration, stage and plain values.
        chunks: this rank's model chunks.
        optimizer: of the weights.
        groups: where this rank stands.
        masks: of a pruning run.
        tokenizer: directory of the tokenizer's files, carried along.

    Returns:
        The iteration's directory.

    Raises:
        ValueError: on every rank, if the iteration is there already or cannot be written.
    """
    root = Path(root)
    final = root / iteration_name(description.iteration)
    aside = root / f".{final.name}.partial"
    with raise_together():
        if groups.rank == 0:
            _make_way(root, final, description.iteration)
            # what a killed save left behind is nobody's checkpoint
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    model = _model_entries(chunks)
    state: dict[str, Any] = dict(model)
    state["optimizer"] = optimizer.sharded_state_dict(model, metadata=_metadata())
    if masks is not None:
        state["masks"] = _mask_entries(masks, groups)
    else:  # without its masks a pruning run's model is none that Megatron-LM should load
        state |= common_state(description.shape, description.iteration)
    _without_padding(state, unwrap(chunks[0]).num_tokens)
    dist_checkpointing.save(state, str(aside))
    with raise_together():
        if groups.rank == 0:
            files = tokenizer_files.find(tokenizer)
            (aside / TOKENIZER).mkdir()
            tokenizer_files.copy(files, aside / TOKENIZER)
            write_description(
                aside,
                dataclasses.replace(
                    description,
                    tokenizer_sha256=tokenizer_files.fingerprint(files),
                    token_ids=tokenizer_files.token_ids(files) | description.token_ids,
                ),
            )
            aside.rename(final)
            _name_latest(root, description.iteration)
    return final


def amend_description(directory: Path, details: Mapping[str, Any], groups: ParallelGroups) -> None:
    """Add plain values to a saved iteration, in one step. Collective over the world.

    Args:
        directory: one iteration's.
        details: what to add to its details.
        groups: where this rank stands.
    """
    with raise_together():
        if groups.rank == 0:
            description = read_description(directory)
            merged = description.details | dict(details)
            write_description(directory, dataclasses.replace(description, details=merged))


def load_weights(checkpoint: Path | str, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill the model from a checkpoint of its shape, whatever layout wrote it.

    Collective over the world. Optimizer states and masks in the checkpoint are left alone.

    Raises:
        ValueError: on every rank, if the checkpoint is damaged, or could run code.
    """
    directory = find_iteration(checkpoint)
    with raise_together():
        check_pickles(directory)
    _fill(chunks, _read(_model_entries(chunks), directory, unwrap(chunks[0]).num_tokens))


def load_run(
    checkpoint: Path | str,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    *,
    masks: MaskState | None = None,
) -> Description:
    """Fill model, optimizer and masks from a run's checkpoint, whatever layout wrote it.

    Collective over the world.

    Returns:
        What the checkpoint says of itself; its plain values are the caller's to use.

    Raises:
        ValueError: on every rank, if the checkpoint is damaged, could run code, or is of other
            masks.
    """
    directory = find_iteration(checkpoint)
    with raise_together():
        check_pickles(directory)
        description = read_description(directory)
    model = _model_entries(chunks)
    state: dict[str, Any] = dict(model)
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=True, metadata=_metadata())
    if masks is not None:
        state["masks"] = _mask_entries(masks, groups)
    loaded = _read(state, directory, unwrap(chunks[0]).num_tokens)
    _fill(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    if masks is not None:
        _fill_masks(masks, loaded["masks"])
        masks.optimizer.num_steps = int(description.details["mask_optimizer_steps"])
    return description


def read_log_alpha(checkpoint: Path | str) -> dict[str, Tensor]:
    """Whole log_alpha by kind, [num_rows, num_units], of a pruning run; in one process.

    Raises:
        ValueError: the checkpoint is not of a pruning run, or is damaged.
    """
    directory = find_iteration(checkpoint)
    description = read_description(directory)
    if "mask_extents" not in description.details:
        raise ValueError(
            f"checkpoint {directory} is of stage {description.stage!r} and has no masks; give one "
            f"that megashear prune wrote"
        )
    check_pickles(directory)
    device.install()
    masks: dict[str, list[int]] = description.details["mask_extents"]
    with process_group():
        wanted = {
            kind: ShardedTensor.from_rank_offsets(
                f"masks.{kind}.log_alpha",
                torch.empty(extents if kind in SPLIT_OVER_TENSOR else extents[1:]),
            )
            for kind, extents in masks.items()
        }
        loaded = _read(dict(wanted), directory, 0)
    return {kind: loaded[kind].reshape(-1, extents[-1]) for kind, extents in masks.items()}


def check_save_directory(save: str | None, load: str | None, *, resume: bool) -> None:
    """Refuse to mix a new run's checkpoints with another's.

    Raises:
        ValueError: ``save`` holds checkpoints and the run does not go on from them.
    """
    if save is None or resume:
        return
    if load is not None and Path(save).resolve() == Path(load).resolve():
        return
    newest = latest_iteration(Path(save)) if Path(save).is_dir() else None
    if newest is not None:
        raise ValueError(
            f"--save {save} holds a run at step {newest}; add --resume to go on with it, or choose "
            f"another directory"
        )


def _read(state: dict[str, Any], directory: Path, num_tokens: int) -> dict[str, Any]:
    """dist_checkpointing.load, whose complaints are no Exceptions and would miss every handler."""
    padded = _without_padding(state, num_tokens)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))
    except (CheckpointException, CheckpointingException) as error:
        raise ValueError(
            f"checkpoint {directory} does not fit this run: {error}; load it with the shape and "
            f"stage it was saved with, or add --finetune to take only its weights"
        ) from error
    for path, num_rows in padded:
        *parents, last = path
        holder = functools.reduce(operator.getitem, parents, loaded)
        missing = num_rows - len(holder[last])
        holder[last] = torch.nn.functional.pad(holder[last], (0, 0, 0, missing))
    return loaded


def _without_padding(state: Any, num_tokens: int) -> list[tuple[tuple[Any, ...], int]]:
    """Leave the padding of the vocabulary out of a sharded state dict, which is changed in place.

    How much of it there is depends on the layout, and a checkpoint has none.

    Returns:
        Where tensors were shortened in this rank's ``state``, and their rows before.
    """
    shortened = []
    items = enumerate(state) if isinstance(state, list) else list(state.items())
    for name, entry in items:
        if isinstance(entry, dict | list):
            inside = _without_padding(entry, num_tokens)
            shortened += [((name, *path), num_rows) for path, num_rows in inside]
        elif isinstance(entry, ShardedTensor) and entry.key.endswith(layout.VOCABULARY):
            # megatron-core would take a checkpoint of any vocabulary and fill up with zeros
            entry.allow_shape_mismatch = False
            num_rows, width = entry.local_shape
            kept = min(max(num_tokens - entry.global_offset[0], 0), num_rows)
            if entry.global_shape[0] == num_tokens:
                continue
            if not kept:  # nothing but padding here: not stored, and given back as it is
                state[name] = LocalNonpersistentObject(torch.zeros_like(entry.data))
                continue
            state[name] = dataclasses.replace(
                entry,
                data=entry.data[:kept],
                local_shape=(kept, width),
                global_shape=(num_tokens, width),
                axis_fragmentations=None,  # shards of unequal size
            )
            shortened.append(((name,), num_rows))
    return shortened


def _model_entries(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {
        f"model{number}": without_extra_state(
            unwrap(chunk).sharded_state_dict(metadata=_metadata())
        )
        for number, chunk in enumerate(chunks)
    }


def _fill(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{number}"], strict=False)
        odd = [name for name in (*missing, *unexpected) if "_extra_state" not in name]
        assert not odd, odd


def _mask_entries(state: MaskState, groups: ParallelGroups) -> dict[str, Any]:
    """Every mask tensor of this rank as shards of the whole, each row or layer one shard."""
    entries: dict[str, Any] = {}
    for kind, tensors in state.tensors().items():
        for name, tensor in tensors.items():
            key = f"masks.{kind}.{name}" if kind else f"masks.{name}"
            part = state.masks.parts.get(kind)
            entries.update(_shards(key, tensor.detach(), part, groups))
    return entries


def _shards(
    key: str, tensor: Tensor, part: MaskPart | None, groups: ParallelGroups
) -> dict[str, ShardedTensor]:
    if part is None or part.kind == "hidden":  # every rank holds the whole
        everyone = (groups.pipeline_rank, groups.tensor_rank, groups.data_rank)
        return {key: ShardedTensor.from_rank_offsets(key, tensor.reshape(-1), replica_id=everyone)}
    if part.kind == "layer":
        copies = (0, groups.tensor_rank, groups.data_rank)
        return {
            f"{key}.{layer}": ShardedTensor.from_rank_offsets(
                key, tensor[0, own : own + 1], (0, layer, part.num_units), replica_id=copies
            )
            for own, layer in enumerate(part.units)
        }
    return {
        f"{key}.{layer}": ShardedTensor.from_rank_offsets(
            key,
            own,  # [own units], or [own groups, H/G]
            (0, layer, part.extents[0]),
            (1, groups.tensor_rank, groups.tensor_size),
            prepend_axis_num=1,
            replica_id=(0, 0, groups.data_rank),
        )
        for layer, own in zip(part.layers, by_layer(part, tensor))
    }


def _fill_masks(state: MaskState, loaded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for kind, tensors in state.tensors().items():
            part = state.masks.parts.get(kind)
            for name, tensor in tensors.items():
                key = f"masks.{kind}.{name}" if kind else f"masks.{name}"
                if part is None or kind == "hidden":
                    tensor.copy_(loaded[key].reshape(tensor.shape))
                elif kind == "layer":
                    pieces = [loaded[f"{key}.{layer}"] for layer in part.units]
                    tensor.copy_(torch.cat(pieces)[None])
                else:
                    pieces = [loaded[f"{key}.{layer}"] for layer in part.layers]
                    tensor.copy_(torch.stack(pieces).view_as(tensor))


def _make_way(root: Path, final: Path, iteration: int) -> None:
    if not final.exists():
        return
    newest = latest_iteration(root)
    if newest is None or newest >= iteration:
        raise ValueError(f"{final} exists; choose another --save, or remove it if it is not needed")
    # A save that was killed before it was named: the run went on from an older one and is here
    # again. It stays beside, for nothing is overwritten.
    beside = root / f".{final.name}.unnamed"
    shutil.rmtree(beside, ignore_errors=True)
    final.rename(beside)
    logger.warning("%s was never named the latest; it is %s now", final, beside.name)


def _name_latest(root: Path, iteration: int) -> None:
    aside = root / f".{TRACKER}.partial"
    aside.write_text(str(iteration), encoding="utf-8")
    os.replace(aside, root / TRACKER)
