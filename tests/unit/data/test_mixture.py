import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.data.mixture import DataExhausted, DomainMixture, levelled

ROUNDING = 1e-9  # float64 sums of at most a few thousand terms of size 1


def weights_of(num_domains: int) -> st.SearchStrategy[list[float]]:
    shares = st.lists(st.integers(0, 1000), min_size=num_domains, max_size=num_domains)
    return shares.filter(any).map(lambda each: [share / sum(each) for share in each])


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[list[float], int]]:
    num_domains = draw(st.integers(1, 9))
    return draw(
        st.lists(st.tuples(weights_of(num_domains), st.integers(1, 60)), min_size=1, max_size=12)
    )


def harmonic(n: int) -> float:
    return sum(1 / k for k in range(1, n + 1))


def assert_bounded(mixture: DomainMixture, promised: np.ndarray) -> None:
    """The bound between draws, with what was promised counted independently of the mixture."""
    behind = promised - mixture.drawn
    assert behind.min() > -1 - ROUNDING
    assert behind.max() <= harmonic(len(promised)) - 1 + ROUNDING


@settings(max_examples=100, deadline=None)
@given(histories())
def test_drawn_follows_owed_after_any_history(history: list[tuple[list[float], int]]) -> None:
    mixture = DomainMixture(history[0][0])
    promised = np.zeros(len(history[0][0]))
    for weights, num_draws in history:
        mixture.set_weights(weights)
        for _ in range(num_draws):
            promised += mixture.weights
            # When the domain is chosen, its promise for this sample included.
            assert (promised - mixture.drawn).max() <= harmonic(len(promised)) + ROUNDING
            mixture.draw()
            assert_bounded(mixture, promised)
        restored = DomainMixture(history[0][0])
        restored.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
        mixture = restored
    assert mixture.num_drawn == sum(num_draws for _, num_draws in history)


def test_the_bound_notices_a_domain_chosen_at_random() -> None:
    generator = np.random.default_rng(0)
    mixture = DomainMixture([0.5, 0.3, 0.2])
    for _ in range(1000):
        mixture.drawn[generator.choice(3, p=mixture.weights)] += 1
    with pytest.raises(AssertionError):
        assert_bounded(mixture, 1000 * mixture.weights)


def test_the_bound_behind_is_reached_by_shrinking_choices() -> None:
    # The adversary of the bound: weight goes evenly to the domains not chosen yet, so the last
    # of D is behind by nearly 1 + 1/2 + ... + 1/D when its turn comes.
    num_domains = 7
    mixture = DomainMixture(np.full(num_domains, 1 / num_domains))
    left = list(range(num_domains))
    while len(left) > 1:
        mixture.set_weights([1 / len(left) if d in left else 0.0 for d in range(num_domains)])
        left.remove(mixture.draw()[0])
    before = mixture.owed[left[0]] + 1.0  # all weight on the one left
    assert before == pytest.approx(harmonic(num_domains))


def test_indices_within_a_domain_count_up() -> None:
    mixture = DomainMixture([0.6, 0.4])
    drawn = [mixture.draw() for _ in range(50)]
    for domain in (0, 1):
        indices = [index for which, index in drawn if which == domain]
        assert indices == list(range(len(indices)))
    assert mixture.drawn.tolist() == [30, 20]


def test_a_domain_of_weight_zero_is_never_drawn() -> None:
    mixture = DomainMixture([0.5, 0.0, 0.5])
    for _ in range(100):
        mixture.draw()
    assert mixture.drawn.tolist() == [50, 0, 50]


def continued(mixture: DomainMixture, state: dict) -> list[tuple[int, int]]:
    mixture.load_state_dict(state)
    return [mixture.draw() for _ in range(3000)]


AWKWARD = [0.1, 0.2, 1 / 3, 1 - 0.1 - 0.2 - 1 / 3]


def half_way() -> DomainMixture:
    mixture = DomainMixture([0.25] * 4)
    for weights in (AWKWARD, AWKWARD[::-1], AWKWARD):
        mixture.set_weights(weights)
        for _ in range(101):
            mixture.draw()
    return mixture


def test_state_through_json_continues_the_same_sequence() -> None:
    mixture = half_way()
    state = json.loads(json.dumps(mixture.state_dict()))
    assert continued(DomainMixture([0.25] * 4), state) == [mixture.draw() for _ in range(3000)]


def test_state_without_what_is_owed_continues_another_sequence() -> None:
    mixture = half_way()
    state = {**mixture.state_dict(), "owed": [0.0] * 4}
    assert continued(DomainMixture([0.25] * 4), state) != [mixture.draw() for _ in range(3000)]


def test_weights_are_normalised_in_float64() -> None:
    mixture = DomainMixture([0.3333333, 0.3333333, 0.3333333])
    assert math.fsum(mixture.weights) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.25], r"--domain-weights has 2 numbers, wanted one for each of the 3 domains"),
        ([0.5, 0.6, -0.1], r"--domain-weights are .*wanted finite numbers >= 0"),
        ([0.5, float("nan"), 0.5], r"--domain-weights are .*nan.*wanted finite"),
        ([0.5, 0.5, 0.5], r"sum to 1\.5, wanted 1; in the same proportions: 0\.333333333, 0\.3"),
        ([0.0, 0.0, 0.0], r"sum to 0, wanted 1; in the same proportions: positive ones"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], message: str) -> None:
    mixture = DomainMixture([0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=message):
        mixture.set_weights(weights)
    assert mixture.weights.tolist() == [0.2, 0.3, 0.5]


def test_state_of_other_domains_is_refused() -> None:
    with pytest.raises(ValueError, match="saved mixture has 2 domains, this run has 3"):
        DomainMixture([0.2, 0.3, 0.5]).load_state_dict(DomainMixture([0.5, 0.5]).state_dict())


@st.composite
def histories_that_end(draw: st.DrawFn) -> tuple[list[int], list[tuple[list[float], int]]]:
    """Samples that each domain has, and a history of weights."""
    num_domains = draw(st.integers(1, 8))
    available = draw(st.lists(st.integers(1, 60), min_size=num_domains, max_size=num_domains))
    history = st.tuples(weights_of(num_domains), st.integers(1, 60))
    return available, draw(st.lists(history, min_size=1, max_size=10))


@settings(max_examples=150, deadline=None)
@given(histories_that_end())
def test_the_bound_holds_for_the_domains_that_are_left(drawn_history) -> None:
    available, history = drawn_history
    options = {"available": available, "when_exhausted": "redistribute"}
    mixture = DomainMixture(history[0][0], **options)
    num_domains, drawn = len(available), [0] * len(available)
    promised = np.zeros(num_domains)  # counted here, by the shares of those that are left
    for weights, num_draws in history:
        mixture.set_weights(weights)
        for _ in range(num_draws):
            left = [d for d in range(num_domains) if drawn[d] < available[d]]
            total = sum(mixture.weights[d] for d in left)
            if not total:
                with pytest.raises(DataExhausted):
                    mixture.draw()
                return
            promised[left] += mixture.weights[left] / total
            domain, sample = mixture.draw()
            assert domain in left
            assert sample == drawn[domain]  # none skipped, none twice
            drawn[domain] += 1
            still = [d for d in left if drawn[d] < available[d]]
            assert (mixture.owed[still] > -1 - ROUNDING).all()
            assert (mixture.owed[still] <= harmonic(num_domains) - 1 + ROUNDING).all()
            assert abs(mixture.owed.sum()) < ROUNDING
            # what exhausted domains handed over is all that the count made here does not know
            off = np.abs((promised - np.array(drawn))[still] - mixture.owed[still]).sum()
            most = max(1.0, harmonic(num_domains) - 1)
            assert off <= (num_domains - len(still)) * most + num_domains * ROUNDING
        restored = DomainMixture(history[0][0], **options)
        restored.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
        assert restored.state_dict() == mixture.state_dict()
        mixture = restored


def test_the_share_of_an_exhausted_domain_goes_to_the_others_in_proportion() -> None:
    mixture = DomainMixture(
        [0.6, 0.3, 0.1], available=[6, 10**6, 10**6], when_exhausted="redistribute"
    )
    while not mixture.exhausted.any():
        mixture.draw()
    assert mixture.drawn[0] == 6
    assert mixture.shares.tolist() == pytest.approx([0.0, 0.75, 0.25])
    assert mixture.weights.tolist() == [0.6, 0.3, 0.1]
    before = mixture.drawn.copy()
    for _ in range(4000):
        mixture.draw()
    assert (mixture.drawn - before).tolist() == pytest.approx([0, 3000, 1000], abs=3)


def test_stop_ends_where_the_owed_domain_has_none_left_and_changes_nothing() -> None:
    mixture = DomainMixture([0.5, 0.5], available=[2, 100], when_exhausted="stop")
    assert [mixture.draw()[0] for _ in range(4)] == [0, 1, 0, 1]
    before = mixture.state_dict()
    with pytest.raises(DataExhausted) as end:
        mixture.draw()
    assert (end.value.domain, end.value.sample) == (0, 4)
    assert mixture.state_dict() == before
    mixture.set_weights([0.0, 1.0])  # it is owed nothing any more
    assert mixture.draw() == (1, 2)


def test_a_saved_run_that_repeated_may_redistribute_from_there() -> None:
    endless = DomainMixture([0.5, 0.25, 0.25])
    for _ in range(101):
        endless.draw()
    limited = DomainMixture([0.2, 0.3, 0.5], available=[20, 99, 99], when_exhausted="redistribute")
    limited.load_state_dict(endless.state_dict())
    assert limited.shares.tolist() == [0.0, 0.5, 0.5]
    assert limited.draw()[0] != 0


@pytest.mark.parametrize(
    ("fills", "amount", "wanted"),
    [
        ([0.5, -0.5, 0.25], 0.25, [0.5, -0.25, 0.25]),
        ([0.5, -0.5, 0.25], 1.25, [0.5, 0.5, 0.5]),
        ([0.5, -0.5, 0.25], -0.5, [0.125, -0.5, 0.125]),
        ([0.5, -0.5], 0.0, [0.5, -0.5]),
    ],
)
def test_levelling(fills: list[float], amount: float, wanted: list[float]) -> None:
    assert levelled(np.array(fills), amount).tolist() == pytest.approx(wanted)
