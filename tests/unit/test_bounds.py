"""Every number of every command has a range, and what lies outside is refused by its flag."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any

import pytest

from megashear import config
from megashear.bounds import Between, check_bounds, ranges_of
from megashear.commands.settings import check_values, settings_of

OWNERS = [
    owner
    for owner in vars(config).values()
    if dataclasses.is_dataclass(owner) and owner.__module__.startswith(config.__name__)
]
"""Every configuration, of a command or a part of one."""
ABSURD = (math.nan, math.inf, -math.inf, -1e308, 10**30)


def refusal(setting: Any, value: float) -> str:
    number = re.escape(f"{value}"[:24])
    # a list's number comes after the word "has"
    return rf"^{setting.flag} (is|has) {number}.*; wanted {re.escape(str(setting.range))}$"


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_no_number_of_a_configuration_is_without_bounds(owner: type) -> None:
    settings = settings_of(owner)  # which refuses a number without a range
    needed = {
        f.name: "x"
        for f in dataclasses.fields(owner)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if owner is config.PlanConfig:
        needed["gpus"] = 8
    for key, setting in settings.items():
        if setting.range is None:
            continue
        if setting.default is not dataclasses.MISSING:
            setting.range.check(setting.default, setting.flag)
        for value in ABSURD:
            given: Any = (value,) if isinstance(setting.default, tuple) else value
            with pytest.raises(ValueError, match=refusal(setting, value)):
                check_values(owner, {key: given})
            if key in ranges_of(owner):  # its own field, not one of a part's
                with pytest.raises(ValueError, match=refusal(setting, value)):
                    owner(**needed | {key: given})


def test_a_number_without_a_range_is_noticed() -> None:
    for owner in (_Open, _OpenList):
        with pytest.raises(AssertionError, match=rf"{owner.__name__}\.steps: a number has a range"):
            settings_of(owner)
    assert settings_of(_Example)["count"].range == Between(1, 8)


@dataclasses.dataclass(frozen=True)
class _Open:
    steps: float | None = None


@dataclasses.dataclass(frozen=True)
class _OpenList:
    steps: tuple[float | str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Example:
    count: Annotated[int, Between(1, 8)] | None = None
    share: Annotated[float, Between(0, 1, below=True)] = 0.5
    weights: Annotated[tuple[float | str, ...], Between(0, 1e6)] = ()
    name: str = "9"

    def __post_init__(self) -> None:
        check_bounds(self)


def test_edges_are_allowed_and_what_is_no_number_passes() -> None:
    _Example(count=1, share=0, weights=(0, "a=1e6", "b", "c=none"))
    _Example(count=8, share=0.999)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "--count is 0; wanted 1 to 8"),
        ({"count": 9}, "--count is 9; wanted 1 to 8"),
        ({"count": 10**99}, "--count is 100000000000000000000...00000000; wanted 1 to 8"),
        ({"share": 1.0}, "--share is 1.0; wanted 0 or more, below 1"),
        ({"weights": (0.5, 2e6)}, "--weights has 2000000.0; wanted 0 to 1e6"),
        ({"weights": ("a=.5", "a=b=1e308")}, "--weights has a=b=1e308; wanted 0 to 1e6"),
        ({"weights": ("nan",)}, "--weights has nan; wanted 0 to 1e6"),
    ],
)
def test_a_number_outside_is_reported_with_its_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _Example(**given)
