import logging
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megashear.config import DataConfig
from megashear.data import reweight as module
from megashear.data.reweight import SCORES, Reweighting
from megashear.data.shares import limits_of
from tests.published_losses import PUBLISHED_DOMAINS, REFERENCE_LOSSES

START = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]
LOSSES = [2.6087, 1.3485, 2.7958, 2.2459, 2.3096, 2.0712, 2.7889]
GOLDEN = [0.67199, 0.04330, 0.04570, 0.01987, 0.04111, 0.02464, 0.15340]
FIVE_DECIMALS = 5e-6


def reweighting(references, *, domains=None, **settings) -> Reweighting:
    flags = DataConfig(data_path="x")
    return Reweighting(
        references=np.array(references),
        domains=domains or [f"domain {i}" for i in range(len(references))],
        **{
            "eta": flags.reweight_eta,
            "smoothing": flags.reweight_smoothing,
            "dominant_share": flags.dominant_share,
            **settings,
        },
    )


def reweight(weights, losses, references, **settings):
    return reweighting(references, **settings)(weights, losses)


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


@pytest.mark.parametrize("policy", SCORES)
@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_policies_equal_their_formulas(policy: str, eta: float) -> None:
    losses = [1.9, 0.7, 2.9, 1.5, 2.3, 1.4, 2.2]  # on both sides of their references
    references = REFERENCE_LOSSES["1.3B"]
    np.testing.assert_allclose(
        reweight(START, losses, references, policy=policy, eta=eta),
        by_hand(START, losses, references, policy, eta),
        rtol=1e-12,
    )


@given(
    losses=st.lists(st.none() | st.floats(), min_size=7, max_size=7),
    policy=st.sampled_from(list(SCORES)),
)
def test_weights_stay_weights_whatever_the_losses(losses: list[float | None], policy: str) -> None:
    new = reweight(START, losses, REFERENCE_LOSSES["1.3B"], policy=policy)
    assert np.isfinite(new).all()
    assert (new > 0).all()
    assert new.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("policy", SCORES)
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


def test_the_share_to_warn_of_is_the_users(caplog: pytest.LogCaptureFixture) -> None:
    moved = {"losses": [3.0, 1.0], "references": [1.0, 1.0], "policy": "signed"}
    reweight([0.5, 0.5], **moved, dominant_share=0.9)
    assert caplog.text == ""
    reweight([0.3, 0.7], [1.0, 1.5], [1.0, 1.0], policy="signed", dominant_share=0.75)
    assert "domain 1 now takes 79.4 % of the mixture (70.0 % before)" in caplog.text
    assert "more than --dominant-share 0.75" in caplog.text


@pytest.mark.parametrize("policy", SCORES)
def test_caps_and_floors_hold_and_the_others_keep_their_proportions(policy: str) -> None:
    losses = [4.0, 0.7, 2.9, 1.5, 2.3, 1.4, 1.2]
    references = REFERENCE_LOSSES["1.3B"]
    free = reweight(START, losses, references, policy=policy)
    limits = limits_of(["c4=0.2"], ["cc=0.3"], PUBLISHED_DOMAINS)
    new = reweight(START, losses, references, policy=policy, limits=limits)
    assert math.fsum(new) == 1
    cc, c4 = PUBLISHED_DOMAINS.index("cc"), PUBLISHED_DOMAINS.index("c4")
    if free[cc] > 0.3:
        assert new[cc] == 0.3
    assert new[c4] >= 0.2 > free[c4]
    others = [i for i in range(7) if i not in (cc, c4)]
    np.testing.assert_allclose(
        new[others] / new[others].sum(), free[others] / free[others].sum(), rtol=1e-12
    )


def test_a_new_policy_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {**SCORES, "careful": lambda weights, excess, eta: np.log(weights) + eta * excess / 2}
    monkeypatch.setattr(module, "SCORES", scores)
    new = reweight([0.5, 0.5], [3.0, 1.0], [1.0, 1.0], policy="careful", smoothing=0.0)
    np.testing.assert_allclose(new, np.array([math.e, 1]) / (math.e + 1))


@pytest.mark.parametrize("policy", SCORES)
def test_checkpoints_keep_the_name_of_the_policy(policy: str) -> None:
    rule = reweighting([1.0, 1.0], policy=policy)
    assert rule.state_dict() == {"policy": policy.title(), "state": {}}  # format 2
    rule.load_state_dict(rule.state_dict())
    rule.load_state_dict({"policy": "Another", "state": {"seen": [1.0]}})
    assert rule.state_dict()["policy"] == policy.title()


def test_flags_offer_the_policies_there_are() -> None:
    assert get_args(get_type_hints(DataConfig)["reweight"]) == (*SCORES, "constant", "schedule")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": [1.0] * 3}, "--domain-weights has 2 numbers, wanted one for each of the 3"),
        ({"weights": [0.5, 0.4]}, "--domain-weights sum to 0.9"),
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
