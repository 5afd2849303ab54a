"""Save and load a run's tensors at any layout: weights, optimizer, masks."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
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

from megashear.checkpoint import optimizer_state
from megashear.checkpoint.description import (
    Description,
    add_details,
    candidates,
    check_whole,
    checksums,
    find_iteration,
    iterations,
    none_whole,
    read_description,
)
from megashear.checkpoint.finite import not_finite_anywhere
from megashear.checkpoint.megatron_lm_args import common_state
from megashear.checkpoint.pickles import check_pickles
from megashear.checkpoint.weights import MASTERS, without_extra_state
from megashear.files import integrity
from megashear.files.integrity import DamagedError, FileSum
from megashear.masks.census import GateSides
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.kinds import KINDS
from megashear.masks.mask_set import MaskSet
from megashear.masks.optimizer import MaskOptimizer
from megashear.masks.targets import MaskPart
from megashear.models import weight_table
from megashear.models.finite import NonFiniteNumber
from megashear.models.formats import NOT_FINITE
from megashear.models.llama import unwrap
from megashear.parallel import cpu_megatron
from megashear.parallel.agree import broadcast_object, gather_objects, raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import process_group
from megashear.shape import ModelShape

logger = logging.getLogger(__name__)

SIDES = "was_open"
"""Name of the tensors that say which gates were open at the last evaluation; not in older
checkpoints."""


@dataclass(frozen=True, kw_only=True)
class MaskState:
    """State of a pruning run beside the weights."""

    masks: MaskSet
    constraint: SparsityConstraint
    optimizer: MaskOptimizer
    sides: GateSides
    """Which gates were open at the last evaluation."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return live tensors by kind and name, shaped like log_alpha; multipliers under ``""``."""
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.masks.parts}
        found[""] = dict(self.constraint.state_dict())
        for kind, log_alpha in self.masks.state_dict().items():
            found[kind]["log_alpha"] = log_alpha
        for kind, is_open in self.sides.state_dict().items():
            found[kind][SIDES] = is_open
        for name, moment in self.optimizer.state_tensors().items():
            kind, _, rest = name.partition(".")
            if kind in self.masks.parts:
                found[kind][rest] = moment
            else:
                found[""][name] = moment
        return found


def run_state(
    description: Description,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    *,
    masks: MaskState | None = None,
) -> dict[str, Any]:
    """Return this rank's share of all tensors of a run's checkpoint.

    Args:
        description: of what is saved.
        chunks: this rank's model chunks.
        optimizer: of the weights.
        groups: where this rank stands.
        masks: of a pruning run.

    Returns:
        A sharded state dict for `Saver.save`.
    """
    model = _model_entries(chunks)
    state: dict[str, Any] = dict(model)
    state |= optimizer_state.entries(optimizer, model)
    if masks is not None:
        state["masks"] = _mask_entries(masks, groups)
    else:  # Megatron-LM should not load a pruning run's model without its masks
        state |= common_state(description.shape, description.iteration)
    _without_padding(state, unwrap(chunks[0]).num_tokens)
    return state


def checkpoint_bytes(shape: ModelShape, *, bf16: bool) -> int:
    """Return about how many bytes a run's checkpoint will have.

    Counted are weights, both moments, and under bfloat16 the float32 masters; masks are small.
    """
    return shape.num_params() * (2 + 3 * 4 if bf16 else 3 * 4)


def amend_description(directory: Path, details: Mapping[str, Any], groups: ParallelGroups) -> None:
    """Add plain values to a saved iteration, in one step, once. Collective over the world.

    Args:
        directory: one iteration's.
        details: what to add to its details.
        groups: where this rank stands.

    Raises:
        SaveError: on every rank, if they cannot be written.
    """
    with raise_together(task=f"{directory} cannot be added to"):
        if groups.rank == 0:
            add_details(directory, details)


def agree_on_iteration(
    checkpoint: Path | str, groups: ParallelGroups, *, contents: bool = True
) -> Path:
    """Return the directory of the newest whole iteration on every rank. Collective over the world.

    Reading is spread over the ranks. A damaged iteration is skipped with a warning, unless
    ``checkpoint`` is that iteration's own directory.

    Args:
        checkpoint: the checkpoint's directory, or one iteration's.
        groups: where this rank stands.
        contents: compare the checksums of all files, not only their sizes.

    Raises:
        DamagedError: on every rank: the one asked for is damaged, or all are.
    """
    tried: list[Path] = []
    with raise_together():
        if groups.rank == 0:
            tried = candidates(checkpoint)
    tried = broadcast_object(tried, 0)
    damage: list[str] = []
    for directory in tried:
        if contents and groups.rank == 0:
            logger.info("comparing %s with its checksums", directory)
        found = _damage(directory, groups, contents=contents)
        if found is None:
            return directory
        if directory == Path(checkpoint):
            raise DamagedError(found)
        damage.append(found)
        if groups.rank == 0 and directory != tried[-1]:
            logger.warning("skipping %s: %s", directory.name, found)
    raise none_whole(checkpoint, damage)


def load_weights(
    checkpoint: Path | str,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    *,
    exact: bool = False,
) -> None:
    """Fill the model from a checkpoint of its shape, whatever layout wrote it.

    Collective over the world. Moments and masks in the checkpoint are left alone.

    Args:
        checkpoint: a checkpoint's directory, or one iteration's.
        chunks: this rank's model chunks.
        optimizer: whose float32 masters of bfloat16 weights are filled too: from the checkpoint's
            masters where it has them, else from its weights, unrounded.
        exact: fill the model from the checkpoint's masters too, where it has them.

    Raises:
        ValueError: on every rank, if the checkpoint is damaged, could run code, or has a weight
            that is not finite.
    """
    with raise_together():
        directory = find_iteration(checkpoint)
        stored = check_pickles(directory).state_dict_metadata
    model, num_tokens = _model_entries(chunks), unwrap(chunks[0]).num_tokens
    prefix = MASTERS if any(key.startswith(MASTERS) for key in stored) else ""
    if exact:
        for entry in (entry for of_chunk in model.values() for entry in of_chunk.values()):
            entry.key = prefix + entry.key
    _fill(chunks, _read(dict(model), directory, num_tokens), directory)
    if optimizer is None:
        return
    # read again, because values in bfloat16 weights are rounded
    masters = optimizer_state.master_shards(optimizer, _model_entries(chunks), prefix)
    loaded = _read({name: shard for name, (shard, _) in masters.items()}, directory, num_tokens)
    with torch.no_grad():
        for name, (_, target) in masters.items():
            target.copy_(loaded[name])


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
        The description of the checkpoint; the caller uses its plain values.

    Raises:
        ValueError: on every rank, if the checkpoint is damaged, could run code, is of other masks,
            or has a weight that is not finite.
    """
    with raise_together():
        directory = find_iteration(checkpoint)
        stored = check_pickles(directory).state_dict_metadata
        description = read_description(directory)
    model = _model_entries(chunks)
    state: dict[str, Any] = dict(model)
    state |= optimizer_state.entries(optimizer, model, is_loading=True)
    if masks is not None:
        state["masks"] = {
            name: entry
            for name, entry in _mask_entries(masks, groups).items()
            if entry.key in stored or not entry.key.endswith(SIDES)
        }
    loaded = _read(state, directory, unwrap(chunks[0]).num_tokens)
    way_out = (
        f"a run cannot resume from such a weight; move {directory} elsewhere, and the run resumes "
        f"from the checkpoint before it, where there is one"
    )
    _fill(chunks, loaded, directory, way_out=way_out)
    optimizer_state.load(optimizer, model, loaded)
    if masks is not None:
        _fill_masks(masks, loaded["masks"])
        steps = description.known.mask_optimizer_steps
        assert steps is not None
        masks.optimizer.num_steps = steps
    return description


def read_log_alpha(checkpoint: Path | str) -> dict[str, Tensor]:
    """Return the whole log_alpha of a pruning run by kind, [num_rows, num_units], on every rank.

    Collective over the world, or in one process where no process group is open.

    Raises:
        ValueError: the checkpoint is not of a pruning run, or is damaged.
    """
    directory = find_iteration(checkpoint)
    description = read_description(directory)
    masks = description.known.mask_extents
    if masks is None:
        raise ValueError(
            f"checkpoint {directory} is of stage {description.stage!r} and has no masks; give one "
            f"that megashear prune wrote"
        )
    check_pickles(directory)
    cpu_megatron.install()
    with process_group():
        wanted = {
            kind: ShardedTensor.from_rank_offsets(
                f"masks.{kind}.log_alpha",
                torch.empty(extents if KINDS[kind].per_layer else extents[1:]),
                replica_id=torch.distributed.get_rank(),
            )
            for kind, extents in masks.items()
        }
        loaded = _read(dict(wanted), directory, 0)
    return {kind: loaded[kind].reshape(-1, extents[-1]) for kind, extents in masks.items()}


def check_save_directory(save: str | None, load: str | None, *, resume: bool) -> None:
    """Refuse to mix a new run's checkpoints with another's.

    Raises:
        ValueError: ``save`` holds checkpoints and the run does not resume from them.
    """
    if save is None or resume or not Path(save).is_dir():
        return
    if load is not None and Path(save).resolve() == Path(load).resolve():
        return
    found = iterations(Path(save))
    if found:
        raise ValueError(
            f"--save {save} holds a run at step {max(found)}; add --resume to continue it, or "
            f"choose another directory"
        )


def _damage(directory: Path, groups: ParallelGroups, *, contents: bool) -> str | None:
    """Return the first damage that a rank finds in its share of the files, or None."""
    found = None
    try:
        check_whole(directory, contents=False)
        sums = checksums(directory)
        if contents and sums is not None:
            integrity.verify(directory, _share(sums, groups.rank, groups.world_size))
    except DamagedError as error:
        found = str(error)
    return next((text for text in gather_objects(found) if text is not None), None)


def _share(sums: Mapping[str, FileSum], rank: int, world_size: int) -> list[str]:
    """Return the files that one rank reads: the largest first, to the rank with least to read."""
    loads = [0] * world_size
    share = []
    for name in sorted(sums, key=lambda name: (-sums[name].size, name)):
        reader = loads.index(min(loads))
        loads[reader] += sums[name].size + 1  # empty files take their turn as well
        if reader == rank:
            share.append(name)
    return share


def _read(state: dict[str, Any], directory: Path, num_tokens: int) -> dict[str, Any]:
    """Load a sharded state dict, and raise ValueError where megatron-core raises no Exception."""
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

    Its size depends on the layout, and a checkpoint has none.

    Returns:
        Where tensors were shortened in this rank's ``state``, and their rows before.
    """
    shortened = []
    items = enumerate(state) if isinstance(state, list) else list(state.items())
    for name, entry in items:
        if isinstance(entry, dict | list):
            inside = _without_padding(entry, num_tokens)
            shortened += [((name, *path), num_rows) for path, num_rows in inside]
        elif isinstance(entry, ShardedTensor) and entry.key.endswith(weight_table.VOCABULARY):
            # else megatron-core would load a checkpoint of any vocabulary, and add zeros
            entry.allow_shape_mismatch = False
            num_rows, width = entry.local_shape
            kept = min(max(num_tokens - entry.global_offset[0], 0), num_rows)
            if entry.global_shape[0] == num_tokens:
                continue
            if not kept:  # only padding: not stored
                state[name] = LocalNonpersistentObject(torch.zeros_like(entry.data))
                continue
            state[name] = dataclasses.replace(
                entry,
                data=entry.data[:kept],
                local_shape=(kept, width),
                global_shape=(num_tokens, entry.global_shape[1]),
                axis_fragmentations=None,  # shards of unequal size
            )
            shortened.append(((name,), num_rows))
    return shortened


def _model_entries(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {
        f"model{number}": without_extra_state(
            unwrap(chunk).sharded_state_dict(metadata=optimizer_state.metadata())
        )
        for number, chunk in enumerate(chunks)
    }


def weight_not_finite(chunks: Sequence[torch.nn.Module]) -> NonFiniteNumber | None:
    """Find a weight of the model that is not finite on any rank. Collective over the world.

    Returns:
        The first one, by the name that checkpoints have for it; equal on every rank.
    """
    return not_finite_anywhere(_model_entries(chunks))


def _fill(
    chunks: Sequence[torch.nn.Module],
    loaded: dict[str, Any],
    directory: Path,
    *,
    way_out: str = NOT_FINITE,
) -> None:
    """Fill the model from what was read, and refuse weights that are not finite."""
    for number, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{number}"], strict=False)
        odd = [name for name in (*missing, *unexpected) if "_extra_state" not in name]
        assert not odd, odd
    if (bad := weight_not_finite(chunks)) is not None:
        raise ValueError(f"checkpoint {directory}: {bad}; {way_out}")


def _mask_entries(state: MaskState, groups: ParallelGroups) -> dict[str, Any]:
    """Return every mask tensor of this rank as shards of the whole, each row or layer one shard."""
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
    kind = None if part is None else KINDS[part.kind]
    copy = [groups.pipeline_rank, groups.tensor_rank, groups.data_rank]
    stacked, across = 0, []
    if kind is not None and kind.split_over_pipeline:
        stacked, copy[0] = int(kind.per_layer), 0
    if kind is not None and kind.split_over_tensor:
        across, copy[1] = [(stacked, groups.tensor_rank, groups.tensor_size)], 0
    return {
        name: ShardedTensor.from_rank_offsets(
            key, piece, *along, *across, prepend_axis_num=stacked, replica_id=tuple(copy)
        )
        for name, along, piece in _pieces(key, tensor, part)
    }


def _pieces(
    key: str, tensor: Tensor, part: MaskPart | None
) -> Iterator[tuple[str, list[tuple[int, int, int]], Tensor]]:
    """Yield views of a mask tensor as stages divide it, with their names and places.

    Either one, of all that every rank holds whole; or one a layer, [1] of a kind whose units are
    layers, else [own units] or [own groups, H/G].
    """
    if part is None or not KINDS[part.kind].split_over_pipeline:
        yield key, [], tensor.view(-1)
        return
    held = tensor if KINDS[part.kind].per_layer else tensor.view(-1, 1)
    if part.rows_per_layer > 1:
        held = tensor.unflatten(0, (len(part.layers), -1))
    for layer, piece in zip(part.layers, held):
        yield f"{key}.{layer}", [(0, layer, part.num_layers)], piece


def _fill_masks(state: MaskState, loaded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for kind, tensors in state.tensors().items():
            part = state.masks.parts.get(kind)
            for name, tensor in tensors.items():
                key = f"masks.{kind}.{name}" if kind else f"masks.{name}"
                if name == SIDES and not any(known.startswith(key) for known in loaded):
                    continue  # an older release saved none, or this rank holds nothing of the kind
                for named, _, piece in _pieces(key, tensor, part):
                    piece.copy_(loaded[named].view_as(piece))
