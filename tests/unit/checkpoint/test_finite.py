"""Numbers that are not finite are found, with their tensor and place; finite ones are not."""

import math

import pytest
import torch

from megashear.checkpoint.finite import first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_number_that_is_not_finite_is_named(dtype: torch.dtype, value: float) -> None:
    spoiled = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    spoiled[1, 4] = value
    spoiled[2, 0] = -math.inf
    good = torch.zeros(4, dtype=dtype)
    found = first_not_finite([("good", good), ("spoiled", spoiled), ("later", spoiled)])
    assert found is not None
    assert str(found) == f"spoiled[1, 4] is {value}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0], dtype=dtype)
    named = [("ends", ends), ("empty", ends[:0]), ("counts", torch.tensor([2**62]))]
    assert first_not_finite([*named, ("sides", torch.tensor([True]))]) is None
    assert first_not_finite([*named, ("scalar", torch.tensor(math.nan))]) is not None
