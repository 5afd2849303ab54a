"""Bytes of tensors that are alive, and bytes that are sent, as a real run has them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operation makes until it is freed.

    Args:
        known: tensors whose storages are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or storage.data_ptr() in self._known:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size

        def freed() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


class SentBytes(TorchDispatchMode):
    """Counts what this rank would send in rings of a size, by collective.

    Args:
        ring: ranks that take part in every collective that is asked for.
    """

    def __init__(self, ring: int) -> None:
        super().__init__()
        self._share = (ring - 1) / ring
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            # of an all-gather the output is whole, and comes first; of a reduce-scatter the input
            whole = args[1] if name.startswith(("_reduce_scatter", "reduce_scatter")) else args[0]
            size = sum(t.numel() * t.element_size() for t in tree_leaves(whole))
            times = 1.0 if name == "send" else self._share
            self.sent[name] += round(size * times * (2 if name.startswith("allreduce") else 1))
        return func(*args, **(kwargs or {}))


class SavedBytes:
    """Counts the storages that autograd keeps for backward passes, each once, while it does.

    Args:
        known: tensors whose storages are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.live = self.peak = 0
        self._known: set[int] = set()
        self.know(known)
        self._uses: Counter[int] = Counter()

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` no longer."""
        self._known |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """What to run the passes under."""
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor
        )

    def use(self, tensor: Tensor, change: int) -> None:
        """Count one use of a tensor's storage more or less."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._known:
            return
        before = self._uses[storage._cdata] > 0
        self._uses[storage._cdata] += change
        after = self._uses[storage._cdata] > 0
        self.live += (after - before) * storage.nbytes()
        self.peak = max(self.peak, self.live)


class _Kept:
    def __init__(self, counter: SavedBytes, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        counter.use(tensor, 1)

    def __del__(self) -> None:
        self.counter.use(self.tensor, -1)
