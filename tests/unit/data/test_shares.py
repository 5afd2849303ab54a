import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.data.shares import ShareLimits, limits_of, weights_of

DOMAINS = ("cc", "github", "wiki")
ROUNDING = 1e-9
"""Relative, between a closed form and a bisection of 200 halvings."""


def by_bisection(weights: np.ndarray, floors: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """clip(s w, floors, caps) with the s that makes the sum 1, found without knowing breaks."""
    low, high = 0.0, 1.0
    while np.clip(high * weights, floors, caps).sum() < 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(middle * weights, floors, caps).sum() < 1:
            low = middle
        else:
            high = middle
    return np.clip(high * weights, floors, caps)


@st.composite
def problems(draw: st.DrawFn, least: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, floors and caps that some weights fulfil."""
    n = draw(st.integers(1, 7))
    weights = np.array(draw(st.lists(st.floats(least, 1), min_size=n, max_size=n)))
    weights = weights / weights.sum() if weights.sum() else np.full(n, 1 / n)
    floors = np.array(draw(st.lists(st.floats(0, 1 / n), min_size=n, max_size=n)))
    # 1.0001, or the caps alone may sum to less than 1 by rounding
    caps = np.array([draw(st.floats(max(floor, min(1.0, 1.0001 / n)), 1)) for floor in floors])
    return weights, floors, caps


@settings(max_examples=300, deadline=None)
@given(problems())
def test_projected_weights_sum_to_1_within_their_limits(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    weights, floors, caps = problem
    limits = ShareLimits(floors=floors, caps=caps)
    new = limits.project(weights)
    assert (floors <= new).all()
    assert (new <= caps).all()
    assert math.fsum(new) == pytest.approx(1, abs=1e-12)
    if (np.minimum(new - floors, caps - new) > 1e-12).any():
        assert math.fsum(new) == 1  # exactly: the mixture divides by it, and would break a cap
    assert limits.project(weights).tobytes() == new.tobytes()
    np.testing.assert_allclose(limits.project(new), new, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(problems(least=1e-3))
def test_projection_is_the_nearest_in_relative_entropy(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    weights, floors, caps = problem
    new = ShareLimits(floors=floors, caps=caps).project(weights)
    np.testing.assert_allclose(new, by_bisection(weights, floors, caps), atol=ROUNDING)


def test_an_even_division_of_the_excess_is_noticed() -> None:
    weights, floors, caps = np.array([0.7, 0.2, 0.1]), np.zeros(3), np.array([0.4, 1.0, 1.0])
    new = ShareLimits(floors=floors, caps=caps).project(weights)
    np.testing.assert_allclose(new, [0.4, 0.4, 0.2], rtol=1e-12)
    evenly = np.array([0.4, 0.35, 0.25])
    assert np.abs(evenly - by_bisection(weights, floors, caps)).max() > 0.04


def test_domains_of_weight_0_take_only_what_the_caps_leave_over() -> None:
    limits = ShareLimits(floors=np.zeros(3), caps=np.array([0.5, 0.3, 0.5]))
    assert limits.project(np.array([1.0, 0.0, 0.0])).tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert limits.project(np.array([0.6, 0.4, 0.0])).tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_limits_that_allow_one_mixture_give_it() -> None:
    limits = limits_of([], [1 / 7], [f"d{i}" for i in range(7)])
    np.testing.assert_allclose(limits.project(np.eye(7)[2]), np.full(7, 1 / 7), atol=1e-12)


def test_limits_come_for_all_or_by_name() -> None:
    limits = limits_of(["wiki=.1"], [0.6, "cc=0.8"], DOMAINS)
    assert limits.floors.tolist() == [0, 0, 0.1]
    assert limits.caps.tolist() == [0.8, 0.6, 0.6]
    assert limits.bind
    assert not limits_of([], [], DOMAINS).bind
    assert limits.violations(np.array([0.9, 0.05, 0.05]), DOMAINS) == [
        "cc 0.9 is above 0.8",
        "wiki 0.05 is below 0.1",
    ]


def test_weights_come_by_order_or_by_name() -> None:
    assert weights_of([0.5, 0.3, 0.2], DOMAINS, flag="--w") == [0.5, 0.3, 0.2]
    assert weights_of(["wiki=.2", "cc=.5", "github=3e-1"], DOMAINS, flag="--w") == [0.5, 0.3, 0.2]
    assert weights_of(["a=b=1"], ["a=b"], flag="--w") == [1.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cc=.5", "wikki=.5"], "--w: no domain 'wikki'; did you mean 'wiki'"),
        (["cc=.5", "wiki=.5"], r"--w has no weight for \['github'\]; give one for every domain"),
        (["cc=.5", 0.5], r"--w has numbers with a name \(cc\) and without \(\[0.5\]\)"),
        (["cc=.5", "cc=.5"], "--w names 'cc' twice"),
        (["cc=half"], "--w has 'cc=half'; wanted a number, or name=number such as cc=0.1"),
        (["cc"], "--w has 'cc'; wanted a number"),
    ],
)
def test_words_that_give_no_weights_are_refused(words: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of(words, DOMAINS, flag="--w")


@pytest.mark.parametrize(
    ("floors", "caps", "message"),
    [
        ([], [0.3], r"--domain-cap allows no weights that sum to 1: 0.3 \+ 0.3 \+ 0.3 = 0.9 over"),
        ([0.4], [], r"--domain-floor allows no weights .* 0.4 \+ 0.4 \+ 0.4 = 1.2 over .*lower"),
        (["cc=.5"], ["cc=.4"], "--domain-floor of cc is 0.5, above its --domain-cap 0.4"),
        ([], [0.3, 0.5], "--domain-cap has 2 numbers without a name"),
        ([], ["cc=1.5"], "--domain-cap of cc is 1.5; wanted a share between 0 and 1"),
        (["cc=nan"], [], "--domain-floor of cc is nan; wanted a share"),
        ([], ["gitub=.5"], "--domain-cap: no domain 'gitub'; did you mean 'github'"),
    ],
)
def test_limits_that_nothing_fulfils_are_refused(floors: list, caps: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits_of(floors, caps, DOMAINS)
