"""Fresh weights: every layer its own, whatever stage draws it."""

from __future__ import annotations

import itertools

import pytest
import torch

from megashear.config import ModelConfig
from megashear.models import llama
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from tests.ranks import run_ranks
from tests.tiny import SOURCE, layout, named_parameters


def fresh_layers(stages: int) -> list[torch.Tensor]:
    def body(rank: int) -> dict[str, torch.Tensor]:
        parallel = layout(pp=stages)
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, ModelConfig(), variant="local", seed=5)
        return {name: p.detach().clone() for name, p in named_parameters(chunks).items()}

    held = run_ranks(stages, body)
    return [w for rank in held for name, w in rank.items() if name.endswith("linear_fc1.weight")]


def test_no_two_layers_are_drawn_alike() -> None:
    layers = fresh_layers(stages=4)
    assert len(layers) == SOURCE.num_layers
    for a, b in itertools.combinations(layers, 2):
        assert not torch.equal(a, b)


def test_a_seed_shared_by_stages_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "_STAGE_SEED", 0)
    _, second, third, _ = fresh_layers(stages=4)
    assert torch.equal(second, third)
