"""Gates of importance scores: the highest of each row stay open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megashear.masks.importance import gates_of_scores
from megashear.masks.kinds import KINDS
from megashear.masks.targets import target_units
from megashear.shape import ModelShape
from tests.tiny import PAIRS


def random_scores(shape: ModelShape, num_values: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randint(num_values, kind.extents(shape), generator=generator).double()
        for name, kind in KINDS.items()
    }


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("num_values", [2**20, 2])
def test_the_highest_scores_of_every_row_stay_open(pair: str, num_values: int) -> None:
    source, target = PAIRS[pair]
    scores, wanted = random_scores(source, num_values), target_units(source, target)
    found = gates_of_scores(scores, source, target)
    assert found.keys() == wanted.keys()
    for kind, gates in found.items():
        rows = scores[kind].reshape(gates.shape).tolist()
        for values, row in zip(rows, gates.tolist()):
            # among equal scores the last units stay
            by_score = sorted(range(len(values)), key=lambda unit: (values[unit], unit))
            kept = set(by_score[len(values) - wanted[kind] :])
            assert {unit for unit, gate in enumerate(row) if gate == 1.0} == kept
            assert sum(row) == len(kept)
