import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megashear.data.reference_loss import PUBLISHED_DOMAINS, REFERENCE_LOSSES
from megashear.data.reweight import POLICIES, reweight

START = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]
LOSSES = [2.6087, 1.3485, 2.7958, 2.2459, 2.3096, 2.0712, 2.7889]
GOLDEN = [0.67199, 0.04330, 0.04570, 0.01987, 0.04111, 0.02464, 0.15340]
FIVE_DECIMALS = 5e-6
UPDATING = ("signed", "clipped", "bandit")


def by_hand(weights, losses, references, policy, eta=1.0, c=1e-4) -> list[float]:
    """The formulas of the paper in plain Python."""
    excess = [loss - reference for loss, reference in zip(losses, references)]
    if policy == "clipped":
        excess = [max(e, 0.0) for e in excess]
    score = [
        math.exp(w + eta * e) if policy == "bandit" else w * math.exp(eta * e)
        for w, e in zip(weights, excess)
    ]
    return [(1 - c) * s / sum(score) + c / len(score) for s in score]


def test_published_step_is_reproduced() -> None:
    new = reweight(START, LOSSES, REFERENCE_LOSSES["1.3B"], policy="signed")
    np.testing.assert_allclose(new, GOLDEN, atol=FIVE_DECIMALS, rtol=0)


def test_published_step_notices_other_references() -> None:
    new = reweight(START, LOSSES, REFERENCE_LOSSES["2.7B"], policy="signed")
    assert np.abs(new - GOLDEN).max() > 1e-3


@pytest.mark.parametrize("policy", UPDATING)
@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_policies_equal_their_formulas(policy: str, eta: float) -> None:
    losses = [1.9, 0.7, 2.9, 1.5, 2.3, 1.4, 2.2]  # on both sides of their references
    references = REFERENCE_LOSSES["1.3B"]
    np.testing.assert_allclose(
        reweight(START, losses, references, policy=policy, eta=eta),
        by_hand(START, losses, references, policy, eta),
        rtol=1e-12,
    )


def test_constant_never_changes() -> None:
    new = reweight(START, LOSSES, REFERENCE_LOSSES["1.3B"], policy="constant")
    np.testing.assert_allclose(new, START, rtol=1e-15)


@given(
    losses=st.lists(st.none() | st.floats(), min_size=7, max_size=7),
    policy=st.sampled_from(POLICIES),
)
def test_weights_stay_weights_whatever_the_losses(losses: list[float | None], policy: str) -> None:
    new = reweight(START, losses, REFERENCE_LOSSES["1.3B"], policy=policy)
    assert np.isfinite(new).all()
    assert (new > 0).all()
    assert new.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("policy", UPDATING)
def test_domain_without_loss_keeps_its_share_and_is_named(
    missing: float | None, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    losses = [missing if name == "wiki" else x for name, x in zip(PUBLISHED_DOMAINS, LOSSES)]
    with caplog.at_level(logging.WARNING):
        new = reweight(
            START,
            losses,
            REFERENCE_LOSSES["1.3B"],
            policy=policy,
            smoothing=0.0,
            domains=PUBLISHED_DOMAINS,
        )
    wiki = PUBLISHED_DOMAINS.index("wiki")
    assert new[wiki] == pytest.approx(START[wiki], rel=1e-12)
    others = [i for i in range(7) if i != wiki]
    alone = by_hand(
        [START[i] for i in others],
        [LOSSES[i] for i in others],
        [REFERENCE_LOSSES["1.3B"][i] for i in others],
        policy,
        c=0.0,
    )
    np.testing.assert_allclose(new[others], (1 - START[wiki]) * np.array(alone), rtol=1e-12)
    assert "no finite loss for wiki (" in caplog.text


def test_without_any_loss_the_weights_stay(caplog: pytest.LogCaptureFixture) -> None:
    new = reweight([0.25, 0.75], [None, math.nan], [1.0, 2.0], policy="signed")
    assert new.tolist() == [0.25, 0.75]
    assert "domain 0 (nan), domain 1 (nan)" in caplog.text


def test_domain_of_weight_zero_comes_back_by_smoothing() -> None:
    new = reweight([0.0, 1.0], [3.0, 1.0], [1.0, 1.0], policy="signed", smoothing=0.01)
    assert new.tolist() == pytest.approx([0.005, 0.995])
    lost = reweight([0.0, 1.0], [3.0, None], [1.0, 1.0], policy="signed", smoothing=0.01)
    assert lost.tolist() == pytest.approx([0.005, 0.995])


def test_domain_that_swallows_the_mixture_is_named(caplog: pytest.LogCaptureFixture) -> None:
    reweight([0.5, 0.5], [3.0, 1.0], [1.0, 1.0], policy="signed", domains=["wiki", "c4"])
    assert "wiki now takes 88.1 % of the mixture (50.0 % before)" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "singed"}, "unknown reweighting policy 'singed'; did you mean 'signed'"),
        ({"policy": "x"}, r"policy 'x'; known: \['signed', 'clipped', 'bandit', 'constant'\]"),
        ({"losses": [1.0]}, "1 losses for 2 domain weights"),
        ({"references": [1.0] * 3}, "3 references for 2 domain weights"),
        ({"references": [1.0, math.nan]}, "reference losses are .*wanted finite"),
        ({"domains": ["c4"]}, "1 domains for 2 domain weights"),
        ({"weights": [0.5, 0.4]}, "--domain-weights sum to 0.9"),
        ({"eta": -1.0}, "eta is -1.0; wanted a finite step size >= 0"),
        ({"smoothing": 1.0}, r"smoothing is 1.0; wanted a share in \[0, 1\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    arguments = {
        "weights": [0.5, 0.5],
        "losses": [2.0, 2.0],
        "references": [1.0, 1.0],
        "policy": "signed",
        **change,
    }
    with pytest.raises(ValueError, match=message):
        reweight(**arguments)
