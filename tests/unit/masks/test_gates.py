from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megashear.masks import gates, mask_set
from tests.unit.masks import golden

FLOAT32 = 1e-6  # relative; a few roundings of float32 on the reference's side


def scores_error() -> float:
    return max(
        golden.relative_error(
            gates.scores(log_alpha), golden.rows(golden.tensors()[f"score.{kind}"])
        )
        for kind, log_alpha in golden.log_alpha().items()
    )


def samples_error() -> float:
    wanted = golden.gates("train.z")
    return max(
        golden.relative_error(gates.sample_gates(log_alpha, golden.noise(kind)), wanted[kind])
        for kind, log_alpha in golden.log_alpha().items()
    )


def deterministic_error(found: dict[str, Tensor], prefix: str) -> float:
    wanted = golden.gates(prefix)
    assert found.keys() == wanted.keys()
    return max(golden.relative_error(found[kind], wanted[kind]) for kind in wanted)


TARGETS = {"hidden": 32, "head": 2, "intermediate": 48, "layer": 2}


def test_scores_equal_the_reference() -> None:
    assert scores_error() < FLOAT32


def test_sampled_gates_equal_the_reference() -> None:
    assert samples_error() < FLOAT32


def test_deterministic_gates_equal_the_reference() -> None:
    masks = golden.log_alpha()
    expected, exact = mask_set.expected_gates(masks), mask_set.exact_gates(masks, TARGETS)
    assert deterministic_error(expected, "z_eval.expected") < FLOAT32
    assert deterministic_error(exact, "z_eval.target") < FLOAT32


@pytest.mark.parametrize("name", ["TEMPERATURE", "LOW", "HIGH"])
@pytest.mark.parametrize("error", [scores_error, samples_error])
def test_golden_parity_notices_a_constant(
    name: str, error: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, name, getattr(gates, name) * 1.01)
    assert error() > 10 * FLOAT32


def test_golden_parity_notices_the_other_mode_and_a_missing_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = golden.log_alpha()
    assert deterministic_error(mask_set.expected_gates(masks), "z_eval.target") > 0.01
    monkeypatch.setattr(gates, "SOFT_FACTOR", 1.0)
    assert deterministic_error(mask_set.expected_gates(masks), "z_eval.expected") > 0.01


def test_probability_closed_is_the_share_of_closed_samples() -> None:
    draws = 200_000
    generator = torch.Generator().manual_seed(0)
    for value in (-3.0, 0.0, 2.0):
        noise = gates.logistic_noise(torch.rand(draws, generator=generator))
        share = float((gates.sample_gates(torch.tensor(value), noise) == 0).double().mean())
        probability = float(gates.probability_closed(torch.tensor(value)))
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(share - probability) < 5 * deviation


def test_probability_closed_at_the_clamps_is_what_the_docs_say() -> None:
    found = gates.probability_closed(torch.tensor([gates.LOG_ALPHA_MAX, 0.0, gates.LOG_ALPHA_MIN]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.0020177, 0.16818, 0.952870], abs=5e-6)
    assert float(gates.soft_gates(torch.tensor(gates.LOG_ALPHA_MAX))) == pytest.approx(
        0.99603, 1e-5
    )


def test_sampled_gates_have_the_slope_of_finite_differences() -> None:
    log_alpha = torch.tensor([-4.0, -1.0, 0.3, 1.5, 4.0], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.5, 0.7, 0.4, 0.2, 0.9], dtype=torch.float64)
    noise = gates.logistic_noise(uniform)
    assert torch.autograd.gradcheck(lambda a: gates.sample_gates(a, noise), log_alpha)
    assert torch.autograd.gradcheck(gates.probability_closed, log_alpha)
    z = gates.sample_gates(log_alpha, noise)
    (slope,) = torch.autograd.grad(z.sum(), log_alpha)
    assert z[0] == 0
    assert z[4] == 1
    assert slope[0] == slope[4] == 0
    assert (slope[1:4] > 0).all()


def test_extreme_noise_and_log_alpha_stay_finite() -> None:
    log_alpha = torch.tensor([-50.0, 50.0], requires_grad=True)
    z = gates.sample_gates(log_alpha, gates.logistic_noise(torch.tensor([0.0, 1.0])))
    assert z.tolist() == [0.0, 1.0]
    assert gates.probability_closed(log_alpha).tolist() == [1.0 - gates.EPS, gates.EPS]


def test_ties_close_the_first_units() -> None:
    log_alpha = torch.full((2, 5), gates.LOG_ALPHA_MAX)
    log_alpha[1, 4] = 0.0
    z = gates.deterministic_gates(log_alpha, [2, 3])
    assert (z == 0).tolist() == [
        [True, True, False, False, False],
        [True, True, False, False, True],
    ]


def test_units_are_ordered_by_log_alpha_even_where_the_gate_rounds_them_equal() -> None:
    falling = [torch.tensor(4.6)]
    while len(falling) < 16:
        falling.append(torch.nextafter(falling[-1], torch.tensor(0.0)))
    log_alpha = torch.stack(falling)
    assert len(gates.soft_gates(log_alpha).unique()) < 8
    z = gates.deterministic_gates(log_alpha[None], [10])
    assert (z == 0).tolist() == [[False] * 6 + [True] * 10]


def test_expected_count_rounds_halves_up_and_needs_float64() -> None:
    row = torch.full((11008,), gates.LOG_ALPHA_MAX)
    probability = 1 / (1 + math.exp(math.log(100) - 2 / 3 * math.log(0.1 / 1.1)))
    assert gates.num_closed_expected(row) == math.floor(11008 * probability + 0.5) == 22
    half = -math.log(1 / 0.5 - 1) - 2 / 3 * math.log(1.1 / 0.1)  # closed with probability 1/2
    assert gates.num_closed_expected(torch.tensor([half], dtype=torch.float64) - 1e-9) == 1
    assert gates.num_closed_expected(torch.tensor([half], dtype=torch.float64) + 1e-9) == 0


def test_a_count_beyond_the_row_is_ours_to_prevent() -> None:
    with pytest.raises(AssertionError, match="row 1: cannot close 4 of 3 units"):
        gates.deterministic_gates(torch.zeros(2, 3), [0, 4])
    with pytest.raises(AssertionError, match="1 counts for 2 rows"):
        gates.deterministic_gates(torch.zeros(2, 3), [0])
