"""The next token: the likeliest, or drawn with the probabilities that are asked for."""

import pytest
import torch

from megashear.train.sampling import Sampling

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
NUM_DRAWS = 500
FOUR_ERRORS = 4 * (0.25 / NUM_DRAWS) ** 0.5
"""Four standard errors of a share of the draws, at most."""


def shares(sampling: Sampling) -> torch.Tensor:
    drawn = [sampling.choose(LOGITS, text=n % 7, place=n // 7) for n in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(drawn), minlength=len(LOGITS)) / NUM_DRAWS


def test_without_a_temperature_the_likeliest_is_taken() -> None:
    assert Sampling().choose(LOGITS, text=3, place=9) == 1


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.75}, [1, 3]),  # the first alone has .70
        ({"top_p": 0.01}, [1]),
        ({"top_k": 3, "top_p": 0.95}, [0, 1, 3]),
    ],
)
def test_draws_have_the_probabilities_of_the_tokens_that_are_left(
    limits: dict, tokens: list[int]
) -> None:
    left = torch.full_like(LOGITS, -torch.inf)
    left[tokens] = LOGITS[tokens] / 0.7
    found = shares(Sampling(temperature=0.7, seed=5, **limits))
    assert (found - left.softmax(dim=0)).abs().max() < FOUR_ERRORS
    # the twin: another temperature
    if len(tokens) > 1:
        other = shares(Sampling(temperature=3.0, seed=5, **limits))
        assert (other - left.softmax(dim=0)).abs().max() > FOUR_ERRORS


def test_a_draw_depends_on_seed_text_and_place_alone() -> None:
    def drawn(seed: int, text: int) -> list[int]:
        sampling = Sampling(temperature=2.0, seed=seed)
        return [sampling.choose(LOGITS, text=text, place=place) for place in range(30)]

    assert drawn(1, 2) == drawn(1, 2)
    assert len({*map(tuple, (drawn(1, 2), drawn(2, 2), drawn(1, 3)))}) == 3
