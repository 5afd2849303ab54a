"""Numbers that are not finite are found, with their place, and nothing else is."""

from __future__ import annotations

import math

import pytest
import torch

from megashear.models import finite
from megashear.models.finite import NonFiniteNumber, first_not_finite

FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_one_is_found(
    dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "_LOOKED_AT_ONCE", 7)  # several pieces
    tensor = torch.ones(3, 5, 2, dtype=dtype)
    tensor[2, 1, 0] = value
    tensor[2, 4, 1] = math.nan
    found = first_not_finite([("sound", torch.ones(2)), ("weight", tensor)])
    assert found is not None
    assert str(found) == f"weight[2, 1, 0] is {value}"
    # however it lies in memory
    turned = first_not_finite([("weight", tensor.transpose(0, 2))])
    assert turned is not None
    assert turned.place == (0, 1, 2)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_largest_and_the_least_numbers_are_finite(dtype: torch.dtype) -> None:
    ends = torch.finfo(dtype)
    tensor = torch.tensor([ends.max, ends.min, ends.smallest_normal, 0.0], dtype=dtype)
    assert first_not_finite([("weight", tensor)]) is None
    # the twin
    assert first_not_finite([("weight", tensor * 2)]) == NonFiniteNumber("weight", (0,), math.inf)


def test_integers_and_nothing_are_finite() -> None:
    sides = torch.tensor([True])
    named = [("steps", torch.tensor(2**62)), ("sides", sides), ("empty", torch.empty(0, 4))]
    assert first_not_finite(named) is None
    scalar = first_not_finite([*named, ("scalar", torch.tensor(math.nan))])
    assert str(scalar) == "scalar[] is nan"
