"""A sample of a long matrix is the same for one commit and misses nothing over many."""

import re
from collections import Counter

import pytest

from tests.sampling import NUM_SCENARIOS, OF_RANKS, RANKS, SEED_VARIABLE, left_out, sample, seed

NAMES = [f"test_law[{n}]" for n in range(28)]


def test_a_sample_depends_on_the_seed_and_not_on_the_order() -> None:
    assert sample(NAMES, 5, "a") == sample(NAMES[::-1], 5, "a")
    assert sample(NAMES, 5, "a") != sample(NAMES, 5, "b")


@pytest.mark.parametrize("count", [1, 5])
def test_every_case_is_taken_by_some_seed(count: int) -> None:
    samples = [sample(NAMES, count, str(seed)) for seed in range(500)]
    assert set.union(*samples) == set(NAMES)
    assert {len(each) for each in samples} == {count}


def test_a_short_matrix_is_taken_whole() -> None:
    assert sample(NAMES[:3], 5, "a") == set(NAMES[:3])


class Case:
    """As much of a collected test as the sampler reads."""

    def __init__(self, nodeid: str, count: int | None = None, *, is_scenario: bool = False) -> None:
        self.nodeid, self.count, self.is_scenario = nodeid, count, is_scenario

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        if name == "scenario":
            return pytest.mark.scenario.mark if self.is_scenario else None
        assert name == "sampled"
        return None if self.count is None else pytest.mark.sampled(self.count).mark


CASES = [
    *(Case(f"a.py::test_one[{n}-x[y]]", 2) for n in range(9)),
    *(Case(f"a.py::test_whole[{n}]") for n in range(9)),
    *(Case(f"b.py::test_one[{n}]", 1) for n in range(5)),
    Case("b.py::test_alone", 1),
    *(Case(f"{RANKS}c.py::test_ranks[{n}]") for n in range(9)),
    *(Case(f"{RANKS}c.py::test_more[{n}]", 4) for n in range(9)),
]


@pytest.mark.parametrize("seed", [str(number) for number in range(20)])
def test_every_function_keeps_its_cases(seed: str) -> None:
    out = left_out(CASES, seed)  # type: ignore[arg-type]
    kept = Counter(case.nodeid.split("[")[0] for case in CASES if case.nodeid not in out)
    assert kept == {
        "a.py::test_one": 2,
        "a.py::test_whole": 9,
        "b.py::test_one": 1,
        "b.py::test_alone": 1,
        f"{RANKS}c.py::test_ranks": OF_RANKS,
        f"{RANKS}c.py::test_more": 4,
    }


SCENARIOS = [Case(f"c.py::test_job_{n}", is_scenario=True) for n in range(9)]


def test_some_scenarios_run_on_every_commit_and_all_over_many() -> None:
    kept = []
    for number in range(100):
        out = left_out([*CASES, *SCENARIOS], str(number))  # type: ignore[list-item]
        kept.append({case.nodeid for case in SCENARIOS if case.nodeid not in out})
    assert {len(each) for each in kept} == {NUM_SCENARIOS}
    assert set.union(*kept) == {case.nodeid for case in SCENARIOS}


def test_the_commit_chooses_unless_a_variable_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch("[0-9a-f]{12}|0", seed())
    monkeypatch.setenv(SEED_VARIABLE, "another")
    assert seed() == "another"


def test_a_checkout_without_git_has_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SEED_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    assert seed() == "0"
