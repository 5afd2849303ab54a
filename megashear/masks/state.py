"""Copies saved tensors over live ones, by name, and says what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def load_tensors(into: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, what: str) -> None:
    """Overwrite every tensor of ``into`` with its namesake of ``saved``, in place.

    Nothing is written unless everything fits.

    Args:
        into: live tensors by name.
        saved: tensors with the same names and shapes.
        what: what the tensors are, plural, for the message.

    Raises:
        ValueError: names or shapes differ.
    """
    if into.keys() != saved.keys():
        raise ValueError(
            f"saved {what} are {sorted(saved)}, this run has {sorted(into)}; load them with the "
            f"source and target shapes they were saved with"
        )
    for name, tensor in into.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"saved {what}: {name} has shape {list(saved[name].shape)}, this process holds "
                f"{list(tensor.shape)}; load them with the source and target shapes they were "
                f"saved with, resharded to this layout"
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])
