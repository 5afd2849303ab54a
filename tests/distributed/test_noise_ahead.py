"""A step's noise is drawn while the step before it runs, and no bit depends on that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megashear.config import ParallelConfig
from megashear.masks import mask_set
from megashear.train.pruning import StructuredPruning
from tests.distributed.pruning_run import Snapshot, run
from tests.tiny import layout

SPLIT, REPLICAS = (layout(tp=2, pp=2, vpp=2), 1), (layout(), 2)
"""Layouts: rows and units apart; noise streams apart."""


def steps(
    parallel: ParallelConfig, data_size: int, change: Callable[[StructuredPruning], None]
) -> list[Snapshot]:
    return run(parallel, data_size=data_size, broken=change)


def unchanged(objective: StructuredPruning) -> None:
    pass


def nothing_ahead(objective: StructuredPruning) -> None:
    objective.masks.draw_ahead = lambda **_: None  # type: ignore[method-assign]


def the_step_after(objective: StructuredPruning) -> None:
    masks = objective.masks
    draw = masks.draw_ahead

    def too_far(*, step: int, **rest: Any) -> None:
        draw(step=step + 1, **rest)
        masks._ahead = {(s, at - 1, *of): noise for (s, at, *of), noise in masks._ahead.items()}  # type: ignore[misc]

    masks.draw_ahead = too_far  # type: ignore[method-assign]


def nothing_when_asked(objective: StructuredPruning) -> None:
    masks, uniform_noise = objective.masks, mask_set.uniform_noise
    sample = masks.sample

    def without(*, step: int, **rest: Any) -> dict[str, torch.Tensor]:
        mask_set.uniform_noise = uniform_noise if step == 0 else None  # type: ignore[assignment]
        gates = sample(step=step, **rest)
        mask_set.uniform_noise = uniform_noise
        return gates

    masks.sample = without  # type: ignore[method-assign]


def differences(here: list[Snapshot], there: list[Snapshot]) -> set[str]:
    """Groups of tensors that are not bit-equal, after the same number of steps."""
    return {
        of
        for one, other in zip(here, there, strict=True)
        for of in ("weights", "masks", "multipliers", "mask_grads")
        for name, tensor in getattr(one, of).items()
        if not torch.equal(tensor, getattr(other, of)[name])
    }


@pytest.mark.parametrize("at", [SPLIT, REPLICAS], ids=["tp2-pp2-vpp2", "dp2"])
def test_steps_do_not_depend_on_when_their_noise_is_drawn(at: tuple[ParallelConfig, int]) -> None:
    assert differences(steps(*at, unchanged), steps(*at, nothing_ahead)) == set()


def test_steps_notice_the_noise_of_another_step() -> None:
    found = differences(steps(*REPLICAS, the_step_after), steps(*REPLICAS, nothing_ahead))
    assert found >= {"weights", "masks", "mask_grads"}


@pytest.mark.parametrize("at", [SPLIT, REPLICAS], ids=["tp2-pp2-vpp2", "dp2"])
def test_all_noise_of_a_step_is_drawn_before_it(at: tuple[ParallelConfig, int]) -> None:
    steps(*at, nothing_when_asked)  # other replicas' hidden gates included


def test_noise_that_was_not_drawn_ahead_is_noticed() -> None:
    def both(objective: StructuredPruning) -> None:
        nothing_ahead(objective)
        nothing_when_asked(objective)

    with pytest.raises(AssertionError, match="'NoneType' object is not callable"):
        steps(*REPLICAS, both)
