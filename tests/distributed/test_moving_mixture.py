"""What a run does with phases, limits and the size of its evaluations, and keeps of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megashear.checkpoint.description import find_iteration, read_description
from megashear.config import DataConfig
from megashear.data.mixture import DomainMixture
from megashear.train.evaluations import Moment
from megashear.train.objectives import LanguageModelling
from tests import text_run
from tests.distributed.test_resume import HALF, WHOLE, configuration, finished, start
from tests.text_run import TextRun
from tests.tiny import layout

BATCH = 8
"""Of ``configuration``."""
EARLY, LATE = [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]
CHANGE = HALF * BATCH + 5
"""Sample at which the phase changes: inside a batch, behind the resume."""
REDUCTION_ORDER = 1e-4
"""Relative; the loss's 1e-5 (law 1), and an error is a spread of losses about their mean."""
ROUNDING = 2e-6
"""Absolute, nats: losses of about 5 are rounded at 6e-8 of that, and their spread, some thousandths
here, is what is left when they are subtracted; measured 5e-7."""
SHARE_TOLERANCE = 1e-6
"""Absolute; TensorBoard keeps float32."""


@pytest.fixture
def phases(tmp_path: Path) -> Path:
    file = tmp_path / "phases.yaml"
    domains = ("words", "paths", "numbers")  # of the data
    entries = [
        {"start_sample": sample, "weights": dict(zip(domains, weights))}
        for sample, weights in ((0, EARLY), (CHANGE, LATE))
    ]
    file.write_text(json.dumps(entries))  # JSON is YAML
    return file


def scheduled(text: TextRun, folder: Path, phases: Path, **train: Any) -> Any:
    config = configuration(text, "pretrain", layout(), folder, **train)
    data = DataConfig(data_path=str(text.data), reweight="schedule", domain_phases=str(phases))
    return replace(config, data=data)


def test_phases_change_at_their_sample_and_are_resumed(
    text: TextRun, tmp_path: Path, phases: Path
) -> None:
    start(scheduled(text, tmp_path / "whole", phases), 1)
    whole = finished(tmp_path / "whole")
    by_hand = DomainMixture(EARLY)
    for sample in range(WHOLE * BATCH):
        if sample == CHANGE:
            by_hand.set_weights(LATE)
        by_hand.draw()
    assert whole.counts["loader"]["mixture"]["drawn"] == by_hand.drawn.tolist()
    # two replicas see the change at the same sample, and a resume goes on in the right phase
    start(scheduled(text, tmp_path / "halves", phases, exit_interval=HALF), 2)
    start(scheduled(text, tmp_path / "halves", phases, resume=True), 1)
    halves = finished(tmp_path / "halves")
    assert halves.counts["loader"] == whole.counts["loader"]
    points = text_run.scalars(tmp_path / "halves" / "events")["mix/weight/numbers"]
    assert points[HALF] == pytest.approx(EARLY[-1], abs=SHARE_TOLERANCE)
    assert points[HALF + 1] == pytest.approx(LATE[-1], abs=SHARE_TOLERANCE)


def test_weights_are_logged_where_they_move(text: TextRun, tmp_path: Path) -> None:
    config = configuration(text, "pretrain", layout(), tmp_path)
    start(replace(config, train=replace(config.train, log_interval=4)), 1)
    found = finished(tmp_path)
    points = text_run.scalars(tmp_path / "events")
    weights = {name: points[f"mix/weight/{name}"] for name in text_run.REFERENCE}
    # at the beginning, at evaluations (every second step), which move them, the last one too
    assert [sorted(of_name) for of_name in weights.values()] == [[0, 2, 4, WHOLE]] * 3
    assert sorted(points["train/lm-loss"]) == [4, WHOLE]
    kept = found.counts["loader"]["mixture"]["weights"]
    last = [of_name[WHOLE] for of_name in weights.values()]
    assert last == pytest.approx(kept, abs=SHARE_TOLERANCE)
    before = [of_name[4] for of_name in weights.values()]  # what an earlier log line would say
    assert before != pytest.approx(kept, abs=100 * SHARE_TOLERANCE)


def test_limits_hold_whatever_the_losses(text: TextRun, tmp_path: Path) -> None:
    config = configuration(text, "pretrain", layout(), tmp_path)
    data = replace(config.data, domain_cap=("numbers=.3",), domain_floor=(0.2,), reweight_eta=5.0)
    start(replace(config, data=data), 1)
    found = finished(tmp_path).points
    shares = np.array([list(found[f"mix/weight/{name}"].values()) for name in text_run.REFERENCE])
    assert shares.min() >= 0.2 - SHARE_TOLERANCE
    assert max(found["mix/weight/numbers"].values()) == pytest.approx(0.3, abs=SHARE_TOLERANCE)


def test_a_resumed_run_evaluates_as_much_as_before(text: TextRun, tmp_path: Path) -> None:
    def config(**train: Any) -> Any:
        made = configuration(text, "prune", layout(), tmp_path, **train)
        return replace(made, train=replace(made.train, eval_sequences=None, eval_share=1.0))

    start(config(exit_interval=HALF), 1)
    stopped = read_description(find_iteration(tmp_path / "saved")).details["eval_sequences"]
    # 6 steps of 8 sequences, three passes each, for 3 evaluations of 3 domains in two modes
    assert stopped == WHOLE * BATCH * 3 // (3 * 3 * 2)
    # at the flags' own word the resumed run would read more: its evaluations are rarer
    longer = config(resume=True)
    start(replace(longer, train=replace(longer.train, eval_interval=3)), 1)
    details = read_description(find_iteration(tmp_path / "saved")).details
    assert details["eval_sequences"] == stopped
    assert details["reweighting"] == {"policy": "Signed", "state": {}}


def test_standard_errors_do_not_depend_on_the_layout(text: TextRun, tmp_path: Path) -> None:
    found = {}
    for name, parallel, replicas, micro_batch in (
        ("alone", layout(), 1, None),
        ("split", layout(tp=2), 1, 3),
        ("replicas", layout(pp=2), 2, 1),
    ):
        config = configuration(
            text, "pretrain", parallel, tmp_path / name, eval_micro_batch_size=micro_batch
        )
        start(replace(config, train=replace(config.train, train_iters=3)), replicas)
        points = text_run.scalars(tmp_path / name / "events")
        found[name] = [points[f"eval/standard-error/{d}"][2] for d in text_run.REFERENCE]
    for name in ("split", "replicas"):  # nor on how many sequences go through together
        assert found[name] == pytest.approx(found["alone"], rel=REDUCTION_ORDER, abs=ROUNDING), name
    assert min(found["alone"]) > 0


class OfItsOwn:
    """An evaluation that is due at every step within the run."""

    def due(self, moment: Moment) -> bool:
        return not moment.is_end

    def run(self, moment: Moment, sink: Any) -> dict[str, float]:
        return {}


def test_an_evaluation_with_its_own_interval_does_not_move_the_mixture(
    text: TextRun, tmp_path: Path
) -> None:
    def watched() -> None:
        LanguageModelling.evaluations = lambda self, interval: [OfItsOwn()]  # type: ignore[method-assign,list-item]

    alone = configuration(text, "pretrain", layout(), tmp_path / "alone")
    beside = configuration(text, "pretrain", layout(), tmp_path / "beside")
    start(alone, 1)
    start(beside, 1, watched)
    states = [
        read_description(find_iteration(tmp_path / name / "saved")).details["loader"]["mixture"]
        for name in ("alone", "beside")
    ]
    assert states[0] == states[1]
