"""Number formats in which weights are stored."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megashear.models import weight_table
from megashear.models.finite import first_not_finite
from megashear.shape import ModelShape

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Types in which weights are stored, by the name that a user gives."""
NOT_FINITE = (
    "a model with such a weight gives no loss: download the weights again, or use an older copy of "
    "them"
)
"""Consequence of a weight that is not finite, and the way out, for messages."""


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the number format that a user named; None, "as is", stays None.

    Raises:
        ValueError: ``name`` is no key of `DTYPES`.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}, wanted one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """Return the name that a user gives to a number format, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtypes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Return the number format of every weight by name; weights on disk are not read."""
    known: Mapping[str, torch.dtype] | None = getattr(weights, "dtypes", None)
    return {name: weight.dtype for name, weight in weights.items()} if known is None else {**known}


def stored_bytes(dtypes: Mapping[str, torch.dtype], shape: ModelShape) -> int:
    """Return the bytes of a model's weights; ``dtypes`` is by Hugging Face name."""
    return sum(
        dtypes[name].itemsize * torch.Size(extents).numel()
        for name, extents in weight_table.hf_shapes(shape).items()
    )


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the narrowest number format that holds every value of the given formats."""
    return functools.reduce(torch.promote_types, dtypes)


def rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight rounded to the number format in which it is stored.

    Raises:
        ValueError: a finite value is too large for the format.
    """
    weight = weight.detach().cpu()
    result = weight.to(dtype)
    if dtype == weight.dtype:
        return result
    if (bad := first_not_finite([(name, result)])) is not None:
        value = float(weight[bad.place])
        most = torch.finfo(dtype).max
        raise ValueError(
            f"{name}[{', '.join(map(str, bad.place))}] is {value:g}, and {name_of(dtype)} holds "
            f"at most {most:g}; store the weights as bfloat16 or float32 (--dtype)"
        )
    return result
