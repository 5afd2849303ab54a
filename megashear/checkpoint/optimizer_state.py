"""State of the weights' optimizer as entries of a checkpoint: whole, or sharded over replicas.

megatron-core 0.16.1 cannot resume its DistributedOptimizer with torch's AdamW: it saves nothing
before the first step, cannot load what it saved, and leaves all parameters one common count of
steps (docs/megatron_core.md). None of that is called here. A replica's rank owns a stretch of each
flattened parameter. In the parameter's own axes, that stretch is up to three boxes. Every rank
saves and reads its own boxes, nothing is gathered, and the checkpoint is that of the plain
optimizer: either optimizer loads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

from megashear.checkpoint.weights import MASTERS

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SHARDS = "optimizer_shards"


class OptimizerShard(NamedTuple):
    """Part of a parameter that this rank's optimizer steps."""

    main: Tensor
    """The parameter, or a stretch of the flattened parameter, or the float32 master of either."""
    state: dict[str, Tensor]
    """Live state of the optimizer; empty before the first step."""
    start: int
    """Element of the flattened parameter where ``main`` begins."""


def metadata() -> dict[str, Any]:
    """Return how dist_checkpointing shapes optimizer state, equal for saving and loading.

    Each call makes a new mapping: megatron-core puts the current data-parallel group into it.
    """
    return {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def is_sharded(optimizer: MegatronOptimizer) -> bool:
    """Return whether replicas share the state (--use-distributed-optimizer)."""
    return isinstance(_only(optimizer), DistributedOptimizer)


def optimizer_shards(optimizer: MegatronOptimizer) -> dict[int, OptimizerShard]:
    """Return what this rank steps by the id of the parameter, without parameters of other ranks."""
    part = _only(optimizer)
    state, groups = part.optimizer.state, part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        found = {}
        for parameter, (group, number) in part.model_param_group_index_map.items():
            main = groups[group]["params"][number]
            start = part._get_model_param_range_map(parameter)["param"].start
            found[id(parameter)] = OptimizerShard(main, state.get(main, {}), start)
        return found
    masters = {
        id(main): parameter
        for parameters, mains in zip(
            getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", [])
        )
        for parameter, main in zip(parameters, mains)
    }
    return {
        id(masters.get(id(main), main)): OptimizerShard(main, state.get(main, {}), 0)
        for group in groups
        for main in group["params"]
    }


def start_state(optimizer: MegatronOptimizer, num_steps: int) -> None:
    """Make moments of zeros where there are none, and count ``num_steps`` steps."""
    part = _only(optimizer)
    part.init_state_fn(part.optimizer, part.config)
    _set_counts(part, num_steps)


def count_steps(optimizer: MegatronOptimizer) -> int:
    """Return the steps that this rank's share of the parameters counts."""
    part = _only(optimizer)
    counted = [*part.optimizer.state.values(), *part.optimizer.param_groups]
    return max((int(each["step"]) for each in counted if "step" in each), default=0)


def entries(
    optimizer: MegatronOptimizer, model: Mapping[str, Any], *, is_loading: bool = False
) -> dict[str, Any]:
    """Return the optimizer's part of a sharded state dict.

    Args:
        optimizer: of the weights.
        model: the sharded state dict of its model, with live parameters.
        is_loading: whether the state dict is to be filled.
    """
    part = _only(optimizer)
    # zero moments: before the first step there is nothing, which could not be loaded
    part.init_state_fn(part.optimizer, part.config)
    _start_counts(part)
    if not is_sharded(optimizer):
        own = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata())
        return {"optimizer": own}
    shards = {name: shard for name, shard, _ in _owned(part, model)}
    return {_SHARDS: shards} if is_loading else {"optimizer": _values(part), _SHARDS: shards}


@torch.no_grad()
def load(optimizer: MegatronOptimizer, model: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Fill the optimizer with what was read for `entries`.

    Args:
        optimizer: of the weights.
        model: as for `entries`.
        loaded: the whole state dict that was read.

    Raises:
        ValueError: the checkpoint's optimizer has other groups of parameters.
    """
    part = _only(optimizer)
    if not is_sharded(optimizer):
        optimizer.load_state_dict(loaded["optimizer"])
        _start_counts(part)  # a count of 0 is not stored
        return
    for name, _, target in _owned(part, model):
        target.copy_(loaded[_SHARDS][name].view_as(target))
    values = loaded["optimizer"].get("optimizer", loaded["optimizer"])
    saved = {_identity(group): group for group in values["param_groups"]}
    for group in part.optimizer.param_groups:
        if _identity(group) not in saved:
            raise ValueError(
                f"the checkpoint's optimizer has no group of parameters with {_identity(group)}, "
                f"only {list(saved)}; add --finetune to take only its weights"
            )
        theirs = saved[_identity(group)]
        group.update({name: value for name, value in theirs.items() if name != "params"})
    groups_step = next((int(g["step"]) for g in values["param_groups"] if "step" in g), 0)
    _set_counts(part, int(values["state"].get("common_step", groups_step)))


def shards(model: Mapping[str, Any]) -> Iterator[tuple[str, ShardedTensor, Tensor]]:
    """Yield name, entry and live tensor of every parameter, or of the parts it is saved in."""
    seen: set[int] = set()
    for chunk, of_chunk in model.items():
        for name, entry in of_chunk.items():
            if id(entry.data) in seen:
                continue
            seen.add(id(entry.data))
            # gate and up are one parameter in memory, and two stretches of rows of the whole
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for number, shard in enumerate(parts):
                yield f"{chunk}.{name}.{number}", shard, entry.data


def master_shards(
    optimizer: MegatronOptimizer, model: Mapping[str, Any], prefix: str
) -> dict[str, tuple[ShardedTensor, Tensor]]:
    """Return this rank's float32 masters as entries under the weights' keys, with their tensors.

    Args:
        optimizer: of bfloat16 weights.
        model: as for `entries`.
        prefix: before each key.
    """
    own = optimizer_shards(optimizer)
    found = {}
    for name, shard, parameter in shards(model):
        if id(parameter) not in own or own[id(parameter)].main.dtype == parameter.dtype:
            continue
        for number, (box, lies) in enumerate(_boxes(shard, parameter, own[id(parameter)])):
            target = own[id(parameter)].main.view(-1)[lies].view(box.local_shape)
            key = prefix + shard.key
            found[f"{name}.{number}"] = (_filled(box, key, target), target)
    return found


@torch.no_grad()
def fill_master(
    shard: Tensor, parameter: Tensor, own: Mapping[int, OptimizerShard], exact: Tensor
) -> None:
    """Copy this rank's part of a shard into its float32 master, if the parameter has one.

    Args:
        shard: a part of ``parameter``, as `shards` gives it.
        parameter: live.
        own: by `optimizer_shards`.
        exact: values of the shard, float32.
    """
    if id(parameter) not in own or own[id(parameter)].main.dtype == parameter.dtype:
        return
    begin, end, lies = _stretch(shard, parameter, own[id(parameter)])
    main = own[id(parameter)].main.view(-1)
    main[begin + lies : end + lies].copy_(exact.reshape(-1)[begin:end])


def _only(optimizer: MegatronOptimizer) -> Any:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert len(parts) == 1, "a second one is for experts, of which a LLaMA has none"
    return parts[0]


def _counts_by_parameter(part: Any) -> bool:
    # fused optimizers count the steps of a whole group
    return isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _start_counts(part: Any) -> None:
    if _counts_by_parameter(part):
        for parameter, each in part.optimizer.state.items():
            each.setdefault("step", _count(0, parameter))


def _set_counts(part: Any, num_steps: int) -> None:
    for parameter, each in part.optimizer.state.items():
        if _counts_by_parameter(part):
            each["step"] = _count(num_steps, parameter)  # its own: torch counts in place
    for group in part.optimizer.param_groups:
        group.pop("step", None)
        if not _counts_by_parameter(part):
            group["step"] = num_steps


def _count(num_steps: int, parameter: Tensor) -> Tensor:
    # torch's fused AdamW needs the count on the parameter's device
    return torch.tensor(float(num_steps), device=parameter.device)


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in param_group_identifier_keys)


def _values(part: Any) -> dict[str, Any]:
    """Return plain values under the names of the plain optimizer."""
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in part.optimizer.param_groups
    ]
    values: dict[str, Any] = {"state": {}, "param_groups": groups}
    counts = [each["step"] for each in part.optimizer.state.values() if "step" in each]
    if counts:
        assert all(torch.equal(count, counts[0]) for count in counts)
        values["state"]["common_step"] = counts[0].clone()
    return {"optimizer": values} if part.config.bf16 else values


def _owned(part: Any, model: Mapping[str, Any]) -> Iterator[tuple[str, ShardedTensor, Tensor]]:
    """Yield name, entry and live tensor of every box of masters and moments that this rank owns."""
    own = optimizer_shards(part)
    for name, shard, parameter in shards(model):
        if id(parameter) not in own:
            continue
        main, state, _ = own[id(parameter)]
        kept = {f"optimizer.state.{moment}.": state[moment] for moment in _MOMENTS}
        if main.dtype != parameter.dtype:
            kept[MASTERS] = main
        for number, (box, lies) in enumerate(_boxes(shard, parameter, own[id(parameter)])):
            for prefix, flat in kept.items():
                target = flat.view(-1)[lies].view(box.local_shape)
                key = prefix + shard.key
                yield f"{prefix}{name}.{number}", _filled(box, key, target), target


def _boxes(
    shard: ShardedTensor, parameter: Tensor, own: OptimizerShard
) -> Iterator[tuple[ShardedTensor, slice]]:
    """Yield this rank's boxes of a shard, without data, and their places in flattened ``own.main``.

    A stretch of a flattened matrix is the end of a row, some whole rows, and the start of a row.
    """
    assert shard.data is not None
    begin, end, lies = _stretch(shard.data, parameter, own)
    shape = shard.data.shape
    width = math.prod(shape[1:])
    while begin < end:
        # choose the next box
        row, column = divmod(begin, width)
        if column or end - begin < width:  # part of a row
            stop = min(end, (row + 1) * width)
            assert len(shape) <= 2, "rows of a matrix, or elements of a vector"
            at, size = (row, column), (1, stop - begin)
        else:
            rows = (end - begin) // width
            stop = begin + rows * width
            at, size = (row, 0), (rows, width)
        # place it in the whole tensor
        before = shard.global_offset[: shard.prepend_axis_num]
        inside = shard.global_offset[shard.prepend_axis_num :]
        box = ShardedTensor(
            key=shard.key,
            data=None,
            dtype=shard.dtype,
            # in a vector, a row is an element
            local_shape=(*[1 for _ in before], *size[: len(shape)]),
            global_shape=shard.global_shape,
            global_offset=(*before, *(i + o for i, o in zip(inside, at))),
            axis_fragmentations=None,  # boxes of unequal size
            # the last number is the replica's, and replicas own different boxes
            replica_id=(*shard.replica_id[:-1], 0),
        )
        yield box, slice(begin + lies, stop + lies)
        begin = stop


def _stretch(shard: Tensor, parameter: Tensor, own: OptimizerShard) -> tuple[int, int, int]:
    """Return [begin, end) of this rank's elements of a flat shard, and their shift in ``own.main``.

    A shard is a contiguous part of the parameter.
    """
    first = shard.storage_offset() - parameter.storage_offset()
    begin = max(own.start - first, 0)
    end = min(own.start + own.main.numel() - first, shard.numel())
    return int(begin), int(max(begin, end)), int(first - own.start)


def _filled(box: ShardedTensor, key: str, data: Tensor) -> ShardedTensor:
    return ShardedTensor(
        key=key,
        data=data.detach(),
        dtype=data.dtype,
        local_shape=box.local_shape,
        global_shape=box.global_shape,
        global_offset=box.global_offset,
        axis_fragmentations=None,
        replica_id=box.replica_id,
    )
