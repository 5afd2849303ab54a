"""Masks that begin from scores lean towards what a one-shot cut keeps, and close no more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megashear.masks.gates import LOG_ALPHA_MAX, probability_closed
from megashear.masks.importance import SPREAD, first_log_alpha, gates_of_scores
from megashear.masks.kinds import KINDS
from megashear.masks.mask_set import exact_gates
from megashear.masks.targets import target_units
from megashear.shape import PRESETS, ModelShape
from tests.tiny import PAIRS

FEW = 0.003
"""Share of a row's units by which more may be closed at the start than without scores."""


def random_scores(shape: ModelShape, num_values: int = 2**20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randint(num_values, kind.extents(shape), generator=generator).double()
        for name, kind in KINDS.items()
    }


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("num_values", [2**20, 2])
def test_masks_close_first_what_a_cut_by_scores_drops(pair: str, num_values: int) -> None:
    source, target = PAIRS[pair]
    scores, targets = random_scores(source, num_values), target_units(source, target)
    whole = {kind: first_log_alpha(scores, source, kind) for kind in targets}
    kept = gates_of_scores(scores, source, target)
    for kind, gates in exact_gates(whole, targets).items():
        assert torch.equal(gates != 0, kept[kind] != 0), kind
    # the twin: the most important first
    turned = exact_gates({kind: -mask for kind, mask in whole.items()}, targets)
    assert not torch.equal(turned["intermediate"] != 0, kept["intermediate"] != 0)


def test_log_alpha_falls_evenly_by_rank_from_the_clamp() -> None:
    source, _ = PAIRS["8-groups-of-4"]
    found = first_log_alpha(random_scores(source), source, "head")
    assert found.shape == (source.num_layers * source.num_query_groups, 4)
    rows = random_scores(source)["head"].view(-1, 4).tolist()
    for row, values in zip(rows, found.tolist()):
        for score, value in zip(row, values):
            above = sum(other > score for other in row) / 3
            assert value == pytest.approx(math.log(100) - SPREAD * above, abs=1e-6)
    assert found.max() == pytest.approx(LOG_ALPHA_MAX)


@pytest.mark.parametrize("num_units", [4, 32, 4096])
def test_no_more_is_closed_at_the_start_than_a_few_thousandths(num_units: int) -> None:
    source = ModelShape(**{**PRESETS["llama2-7b"].to_dict(), "num_layers": num_units})
    begun = first_log_alpha({"layer": torch.rand(1, num_units).double()}, source, "layer")
    alike = torch.full_like(begun, LOG_ALPHA_MAX)
    closed = probability_closed(begun).mean() - probability_closed(alike).mean()
    assert 0 < closed < FEW
