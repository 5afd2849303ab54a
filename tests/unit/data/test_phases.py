import json
from pathlib import Path

import numpy as np
import pytest

from megashear.data.mixture import DomainMixture
from megashear.data.phases import PhasedMixture, Phases, read_phases
from megashear.data.shares import limits_of

DOMAINS = ("a", "b", "c")
EARLY, LATE = [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]
CHANGE, WHOLE = 137, 400
"""The phase changes inside a global batch, whatever its size."""


def phases(unit: str = "start_sample", starts: tuple[int, ...] = (0, CHANGE)) -> Phases:
    return Phases(unit=unit, starts=starts, weights=(np.array(EARLY), np.array(LATE)))


def changes(made: Phases, **at: int) -> dict[int, list[float]]:
    where = {"seq_length": 8, "global_batch_size": 4, "first_step": 0, "first_sample": 0} | at
    return {sample: weights.tolist() for sample, weights in made.changes(**where).items()}


def draws(mixture: DomainMixture, number: int) -> list[tuple[int, int]]:
    return [mixture.draw() for _ in range(number)]


def by_hand() -> list[tuple[int, int]]:
    mixture = DomainMixture(EARLY)
    found = draws(mixture, CHANGE)
    mixture.set_weights(LATE)
    return found + draws(mixture, WHOLE - CHANGE)


def test_a_phase_begins_at_exactly_its_sample() -> None:
    mixture = PhasedMixture(phases().changes(**AT))
    assert draws(mixture, WHOLE) == by_hand()
    late = PhasedMixture(phases(starts=(0, CHANGE + 1)).changes(**AT))
    assert draws(late, WHOLE) != by_hand()  # one sample late is seen


AT = {"seq_length": 8, "global_batch_size": 4, "first_step": 0, "first_sample": 0}


@pytest.mark.parametrize("stop", [1, 60, CHANGE - 1, CHANGE, CHANGE + 1, 300])
def test_a_resumed_run_is_in_the_right_phase(stop: int) -> None:
    first = PhasedMixture(phases().changes(**AT))
    found = draws(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = PhasedMixture(phases().changes(**AT | {"first_sample": stop}))
    resumed.load_state_dict(state)
    assert found + draws(resumed, WHOLE - stop) == by_hand()
    assert resumed.weights.tolist() == LATE


def test_steps_count_on_with_the_batch_size_of_now() -> None:
    made = phases("start_step", (0, 10))
    assert changes(made) == {0: EARLY, 40: LATE}
    # 6 steps of 4, then batches of 8
    later = {"global_batch_size": 8, "first_step": 6, "first_sample": 24}
    assert changes(made, **later) == {24: EARLY, 24 + 4 * 8: LATE}
    assert changes(made, first_step=10, first_sample=40) == {40: LATE}
    assert changes(made, first_step=90, first_sample=360) == {360: LATE}


def test_tokens_begin_with_the_first_whole_sample_behind_them() -> None:
    assert changes(phases("start_token", (0, 80))) == {0: EARLY, 10: LATE}
    assert changes(phases("start_token", (0, 81))) == {0: EARLY, 11: LATE}


@pytest.mark.parametrize("start", ["80", "80.0", "8e1", "'80'"])
def test_phases_are_read(tmp_path: Path, start: str) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text(
        f"- start_token: 0\n  weights: {{b: .25, a: .5, c: .25}}\n"
        f"- start_token: {start}\n  weights: [.1, .1, .8]\n"
    )
    found = read_phases(file, DOMAINS, limits_of([], [], DOMAINS))
    assert (found.unit, found.starts) == ("start_token", (0, 80))
    assert [weights.tolist() for weights in found.weights] == [EARLY, LATE]


FIRST = "- start_step: 0\n  weights: [.5, .25, .25]\n"
SECOND = "  weights: [.1, .1, .8]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            FIRST + "- start_step: 20\n" + SECOND + "- start_step: 20\n" + SECOND,
            "phase 3 begins at start_step 20 and the phase before it at 20, so they overlap",
        ),
        (
            FIRST + "- start_step: 20\n" + SECOND + "- start_step: 10\n" + SECOND,
            "phase 3 begins at start_step 10 and the phase before it at 20, so they overlap",
        ),
        ("- start_step: 5\n" + SECOND, "phase 1 begins at start_step 5; the first phase begins at"),
        (FIRST + "- start_sample: 20\n" + SECOND, r"begin by \['start_sample', 'start_step'\]; wa"),
        ("- weights: [1, 0, 0]\n", "begin by nothing; wanted one of start_step, start_sample"),
        (FIRST + "- start_step: 1.5\n" + SECOND, "phase 2: start_step is 1.5; wanted a whole num"),
        (FIRST + "- start_step: -1\n" + SECOND, "start_step is -1; wanted a whole number"),
        (FIRST + "- start_step: true\n" + SECOND, "start_step is True; wanted a whole number"),
        ("- start_step: 0\n", "phase 1 has .*; wanted just start_step and weights"),
        (
            "- start_step: 0\n  weights: {a: .5, d: .5}\n",
            r"phase 1: weights: no domain 'd'; .*the data have \['a', 'b', 'c'\]",
        ),
        (
            "- start_step: 0\n  weights: {a: .5, b: .5}\n",
            r"phase 1: weights has no weight for \['c'\]",
        ),
        ("- start_step: 0\n  weights: [.5, .25, .5]\n", "phase 1: weights sum to 1.25, wanted 1"),
        ("- start_step: 0\n  weights: 1\n", "phase 1: weights are 1; wanted `domain: weight`"),
        (
            "- start_step: 0\n  weights: [.1, .1, .8]\n",
            "phase 1: c 0.8 is above 0.75, its --domain",
        ),
        ("start_step: 0\n", "holds no list of phases; wanted `- start_step: 0` with"),
        ("- [", "is not YAML"),
    ],
)
def test_phases_that_say_no_mixture_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_phases(file, DOMAINS, limits_of([], ["c=.75"] if ".75" in message else [], DOMAINS))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--domain-phases .*gone\.yaml does not exist"):
        read_phases(tmp_path / "gone.yaml", DOMAINS, limits_of([], [], DOMAINS))
