"""Standard errors of held-out losses, and how much an evaluation reads."""

import math

import numpy as np
import pytest
import torch

from megashear.config import TrainConfig
from megashear.train.evaluate import (
    DomainLosses,
    ratio_and_error,
    subsample_size,
    sums_of_sequences,
)

ROUNDING = 1e-9
"""Relative, in float64: sums of squares against squares of differences."""


def drawn(rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and tokens of sequences of unequal length, whose tokens share their text's mean."""
    counts = rng.integers(20, 129, sequences).astype(float)
    levels = 2.5 + 0.4 * rng.standard_normal(sequences)  # between sequences
    noise = 1.5 * rng.standard_normal(sequences) / np.sqrt(counts)  # between tokens of one
    return counts * (levels + noise), counts


def measured(losses: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    sums = sums_of_sequences(torch.from_numpy(losses), torch.from_numpy(counts)).sum(dim=0)
    ratio, error = ratio_and_error(sums[None])
    return ratio.item(), error.item()


def test_error_equals_an_independent_formula() -> None:
    """The delta method on (mean x, mean n), from their covariance matrix."""
    losses, counts = drawn(np.random.default_rng(0), 40)
    ratio, error = measured(losses, counts)
    mean_loss, mean_count = losses.mean(), counts.mean()
    gradient = np.array([1 / mean_count, -mean_loss / mean_count**2])
    covariance = np.cov(np.stack([losses, counts])) / 40
    assert ratio == pytest.approx(losses.sum() / counts.sum(), rel=1e-12)
    assert error == pytest.approx(math.sqrt(gradient @ covariance @ gradient), rel=ROUNDING)


def test_error_is_the_spread_of_repeated_evaluations() -> None:
    rng = np.random.default_rng(1)
    pairs = [measured(*drawn(rng, 64)) for _ in range(3000)]
    ratios, errors = np.array(pairs).T
    # the spread of 3,000 draws is itself known to 1 / sqrt(2 * 3000) = 1.3 %
    assert errors.mean() == pytest.approx(ratios.std(), rel=0.05)
    covered = np.abs(ratios - 2.5) < 1.96 * errors
    assert covered.mean() == pytest.approx(0.95, abs=0.02)


def test_counting_tokens_as_independent_is_noticed() -> None:
    rng = np.random.default_rng(2)
    ratios = [measured(*drawn(rng, 64))[0] for _ in range(300)]
    tokens = 64 * 74.0  # mean length of ``drawn``
    naive = math.sqrt((0.4**2 + 1.5**2) / tokens)
    assert np.std(ratios) > 1.8 * naive


def test_sequences_that_fill_up_a_batch_do_not_count() -> None:
    losses, counts = drawn(np.random.default_rng(3), 10)
    filled = [np.concatenate([values, np.zeros(6)]) for values in (losses, counts)]
    assert measured(*filled) == measured(losses, counts)


def test_one_sequence_has_no_error_and_equal_ones_have_none_to_speak_of() -> None:
    assert math.isnan(measured(np.array([8.0]), np.array([4.0]))[1])
    assert measured(np.full(5, 0.1), np.full(5, 3.0))[1] < 1e-8
    found = DomainLosses(
        losses={"a": 1.0, "b": 2.0}, tokens={"a": 1, "b": 1}, errors={"a": 0.3, "b": 0.4}
    )
    assert found.mean_error == pytest.approx(0.25)
    assert found.known_errors == {"a": 0.3, "b": 0.4}


def size(num_modes: int = 1, **settings: float) -> int:
    train = TrainConfig(
        train_iters=200, eval_interval=50, global_batch_size=32, seq_length=128, **settings
    )
    return subsample_size(train, num_domains=7, num_modes=num_modes)


def test_how_much_an_evaluation_reads_follows_the_flags() -> None:
    assert size() == 64
    assert size(eval_sequences=5) == 5
    assert size(eval_tokens=128 * 9 + 127) == 9


@pytest.mark.parametrize("num_modes", [1, 2])
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_a_share_of_the_compute_is_spent_and_not_passed(share: float, num_modes: int) -> None:
    found = size(num_modes, eval_share=share)

    def cost(sequences: int) -> float:  # in forward passes, three of which are a training pass
        return 4 * 7 * num_modes * sequences / (3 * 200 * 32)

    assert cost(found) <= share < cost(found + 1)


def test_a_share_that_pays_for_nothing_is_refused_with_its_arithmetic() -> None:
    wanted = r"--eval-share 0.001 of 6400 .* 4 evaluations .* 7 domains \* 2 modes .* 18.7; give at"
    with pytest.raises(ValueError, match=wanted):
        size(2, eval_share=0.001)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="--eval-sequences and --eval-share set the size of"):
        TrainConfig(eval_sequences=4, eval_share=0.1)
    with pytest.raises(ValueError, match="--eval-tokens 100 is less than one sequence of --seq-l"):
        TrainConfig(eval_tokens=100, seq_length=128)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"--eval-share is .*; wanted 1e-9 to 1"):
            TrainConfig(eval_share=share)
