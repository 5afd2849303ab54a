"""Write values over live tensors, such as masks and their multipliers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def fill(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write every tensor of ``values`` over its namesake, in place."""
    assert live.keys() == values.keys(), f"{[*values]} for {[*live]}"
    for name, tensor in live.items():
        assert tensor.shape == values[name].shape, f"{name}: {[*values[name].shape]}"
        tensor.copy_(values[name])
