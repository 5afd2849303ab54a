"""Whoever has state saves it, under a name, and resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megashear.checkpoint.description import Description
from megashear.checkpoint.details import GUARD, LOADER, REWEIGHTING, SCHEDULER
from megashear.train.objectives import LanguageModelling
from megashear.train.state import RunState
from tests.tiny import SOURCE


class Part:
    """A part whose state is a number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> Mapping[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


def run_state(parts: Mapping[str, Part], samples: int = 0) -> RunState:
    nothing: Any = None  # tensors are tested where they are saved
    return RunState(
        shape=SOURCE,
        chunks=[],
        optimizer=nothing,
        objective=LanguageModelling([]),
        groups=nothing,
        parts=parts,
        facts={"run": {"train": {"lr": 1.0}}},
        counts=lambda: {"consumed_samples": samples},
        token_ids={"bos_token_id": 1},
    )


NAMES = (SCHEDULER, LOADER, GUARD, REWEIGHTING)


def parts(offset: int) -> dict[str, Part]:
    return {name: Part(number + offset) for number, name in enumerate(NAMES)}


def test_every_part_is_described_under_its_name_beside_facts_and_counts() -> None:
    saved = run_state(parts(7), samples=12).description(3)
    assert (saved.iteration, saved.stage, saved.token_ids) == (3, "pretrain", {"bos_token_id": 1})
    assert saved.details == {
        "run": {"train": {"lr": 1.0}},
        "consumed_samples": 12,
        **{name: {"value": number + 7} for number, name in enumerate(NAMES)},
    }


def test_every_part_resumes_from_its_own_state() -> None:
    resumed = parts(0)
    run_state(resumed).load_parts(run_state(parts(7)).description(3))
    assert {name: part.value for name, part in resumed.items()} == {
        name: number + 7 for number, name in enumerate(NAMES)
    }


def test_parts_that_older_releases_did_not_save_begin_anew() -> None:
    saved = {name: part for name, part in parts(7).items() if name in (SCHEDULER, LOADER)}
    resumed = parts(0)
    run_state(resumed).load_parts(run_state(saved).description(3))
    assert [part.value for part in resumed.values()] == [7, 8, 2, 3]


@pytest.mark.parametrize("missing", [SCHEDULER, LOADER])
def test_a_checkpoint_without_a_part_is_refused_by_name(missing: str) -> None:
    saved = {name: part for name, part in parts(7).items() if name != missing}
    description: Description = run_state(saved).description(3)
    resumed = parts(0)
    with pytest.raises(ValueError, match=rf"step 3 has no state of its {missing}, .*--finetune"):
        run_state(resumed).load_parts(description)
    assert [part.value for part in resumed.values()] == [0, 1, 2, 3]
