"""Counts of the bytes that ranks send and of a step's memory, for the other scripts."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megashear.parallel import device

_SENDS = {
    "all_reduce": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "_all_gather_base": 1,
    "reduce_scatter_tensor": 1,
    "_reduce_scatter_base": 1,
    "broadcast": 0,
    "isend": 0,
    "send": 0,
}
"""Functions that send, and the argument that this rank sends."""


def sent_bytes(given: Any) -> int:
    """Return the bytes of a tensor or of several."""
    tensors = [given] if isinstance(given, Tensor) else given
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Counts:
    """Calls and bytes of this rank, by function and group size."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def note(self, name: str, given: Any, group: Any) -> None:
        """Count a call, unless its group has one rank and it moves nothing."""
        if dist.get_world_size(group) == 1:
            return
        self.calls[name] += 1
        self.bytes[name] += sent_bytes(given)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what the block sends, including calls of megatron-core."""
    counts, real = Counts(), {}
    inside = [False]  # functions that call each other count once

    def wrapped(name: str, place: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return function(*args, **kwargs)
            inside[0] = True
            try:
                given = args[place] if len(args) > place else _named(kwargs, place)
                counts.note(name, given, kwargs.get("group"))
                return function(*args, **kwargs)
            finally:
                inside[0] = False

        return call

    for name, place in _SENDS.items():
        function = getattr(dist, name, None)
        if function is None:
            continue
        real[name] = function
        setattr(dist, name, wrapped(name, place, function))
        _replace_in_megatron(function, getattr(dist, name))
    try:
        yield counts
    finally:
        for name, function in real.items():
            _replace_in_megatron(getattr(dist, name), function)
            setattr(dist, name, function)


def _named(kwargs: dict[str, Any], place: int) -> Any:
    for name in ("tensor", "input", "input_tensor", "output_tensor")[place:]:
        if name in kwargs:
            return kwargs[name]
    return next(value for value in kwargs.values() if isinstance(value, Tensor))


def _replace_in_megatron(old: Any, new: Any) -> None:
    # some modules hold the functions under names of their own
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by ``step`` take at once.

    On a GPU torch's allocator counts; on a CPU the profiler's allocations and frees are summed.
    """
    if device.has_cuda():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
