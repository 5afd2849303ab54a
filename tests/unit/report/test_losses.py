"""Losses of a report are those of the files, and what they are held to is said or missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint.description import Description
from megashear.monitor import tags
from megashear.monitor.figures import Point
from megashear.report.losses import (
    MeanLoss,
    check_domains,
    final_loss,
    mean_reference,
    references_of,
    source_loss,
)
from megashear.report.page import PageFigure
from megashear.report.record import RunRecord
from megashear.report.run_section import run_section
from megashear.report.story import headline
from tests.tiny import PAIRS

LOSSES, ERRORS = {"c": 2.0, "prose": 3.0}, {"c": 0.03, "prose": 0.04}
POINTS = {
    tags.EVAL_MEAN_LOSS: {4: 2.5},
    **{tags.mixture_weight(name): {0: 0.5, 4: 0.5} for name in LOSSES},
    **{tags.eval_loss(name): {4: loss} for name, loss in LOSSES.items()},
    **{tags.eval_error(name): {4: error} for name, error in ERRORS.items()},
    **{tags.eval_excess(name): {4: 0.25} for name in LOSSES},
}


def record(points: dict[str, dict[int, float]], **details: Any) -> RunRecord:
    description = Description(
        shape=PAIRS["multi-head"][0], iteration=4, stage="prune", token_ids={}, details=details
    )
    return RunRecord(
        name="run",
        save=None,
        description=description if details else None,
        events={
            tag: {step: Point(value, 0.0) for step, value in of.items()}
            for tag, of in points.items()
        },
    )


def test_a_mean_has_the_error_of_independent_domains() -> None:
    loss = MeanLoss(domains=LOSSES, errors=ERRORS)
    assert (loss.mean, loss.error) == pytest.approx((2.5, math.sqrt(0.03**2 + 0.04**2) / 2))
    assert str(loss) == "2.500 +- 0.025"
    assert str(MeanLoss(domains=LOSSES, errors={"c": 0.03})) == "2.500"  # one is not known


def test_the_last_loss_is_that_of_all_text_and_else_of_the_last_evaluation() -> None:
    inside = final_loss(record(POINTS))
    assert inside is not None
    assert (str(inside), inside.words) == ("2.500 +- 0.025", "at step 4, on the run's subsample")
    ended = final_loss(
        record(
            POINTS,
            held_out_loss={"expected": {"c": 9.0}, "exact": {"c": 4.0, "prose": 5.0}},
            held_out_standard_error={"exact": {"c": 0.6, "prose": 0.8}},
        )
    )
    assert ended is not None
    assert (str(ended), ended.words) == (
        "4.500 +- 0.500",
        "over all held-out text, cut to the target",
    )
    old = final_loss(record(POINTS, held_out_loss={"loss": LOSSES}))
    assert old is not None
    assert str(old) == "2.500"  # a run of before kept no errors
    assert final_loss(record({})) is None


def test_references_are_what_losses_were_compared_with() -> None:
    assert references_of(record(POINTS)) == {"c": 1.75, "prose": 2.75}
    assert mean_reference(record(POINTS)) == 2.25
    without = {tag: of for tag, of in POINTS.items() if tag != tags.eval_excess("c")}
    assert mean_reference(record(without)) is None


def test_the_gap_to_source_and_references_stands_at_the_top(tmp_path: Path) -> None:
    file = tmp_path / "source.json"
    file.write_text(json.dumps({"held-out loss": {"c": 1.0, "prose": 2.0}, "mean": 1.5}))
    source = source_loss(file, None)
    finished = record(POINTS, held_out_loss={"loss": LOSSES})
    lead = "".join(headline([finished], source))
    assert "That is 1.000 above the model before pruning, 1.500." in lead
    assert "That is 0.250 above the mean of the references, 2.250." in lead
    assert "+1.000" in lead
    assert "before pruning" not in "".join(headline([record(POINTS)]))
    better = "".join(headline([finished], MeanLoss(domains={"c": 3.0})))
    assert "That is 0.500 below the model before pruning, 3.000." in better
    # a source that is the reference is said once
    once = "".join(headline([record(POINTS)], MeanLoss(domains={"c": 2.25})))
    assert once.count("That is") == 1


def test_what_losses_are_held_to_are_lines_across_them() -> None:
    run = record({**POINTS, tags.LM_LOSS: {1: 3.0, 4: 2.5}})

    def across(source: MeanLoss | None) -> dict[Any, float]:
        parts = run_section(run, "run", source).parts
        (drawn,) = (p for p in parts if isinstance(p, PageFigure) and p.name == "run-loss")
        lines = [line for line in drawn.figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
        return {line.get_label(): float(line.get_ydata()[0]) for line in lines}

    reference = {"the mean of the references, 2.250": 2.25}
    assert across(MeanLoss(domains={"c": 1.0, "prose": 2.0})) == {
        "the model before pruning, 1.500": 1.5,
        **reference,
    }
    assert across(None) == reference  # a source that is not known is not drawn


def test_the_source_of_a_quickstart_is_in_its_results(tmp_path: Path) -> None:
    assert source_loss(None, tmp_path) is None
    models = [{"name": "sheared", "losses": {"c": 9.0}}, {"name": "source", "losses": LOSSES}]
    (tmp_path / "results.json").write_text(json.dumps({"models": models}))
    found = source_loss(None, tmp_path)
    assert found is not None
    assert found.domains == LOSSES


@pytest.mark.parametrize("content", [{}, {"held-out loss": {}}, {"held-out loss": {"c": "low"}}])
def test_what_holds_no_losses_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    file = tmp_path / "source.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"--source-loss .*source.json holds no losses by domain"):
        source_loss(file, None)


@pytest.mark.parametrize("errors", [{"c": "x"}, {"c": [0.1]}, "low"])
def test_errors_that_are_no_numbers_are_refused(tmp_path: Path, errors: Any) -> None:
    file = tmp_path / "source.json"
    file.write_text(json.dumps({"held-out loss": LOSSES, "standard error": errors}))
    with pytest.raises(ValueError, match=r"--source-loss .*source.json holds a standard error"):
        source_loss(file, None)
    models = [{"name": "source", "losses": LOSSES, "errors": errors}]
    (tmp_path / "results.json").write_text(json.dumps({"models": models}))
    with pytest.raises(ValueError, match=r"results.json holds a standard error that is no number"):
        source_loss(None, tmp_path)
    # the twin: a number or null is read
    file.write_text(json.dumps({"held-out loss": LOSSES, "standard error": {"c": 0.1, "p": None}}))
    found = source_loss(file, None)
    assert found is not None
    assert found.errors == {"c": 0.1}


def test_a_source_of_other_domains_is_refused() -> None:
    check_domains(MeanLoss(domains=LOSSES), record(POINTS), "source.json")
    other = MeanLoss(domains={"c": 2.0, "wiki": 3.0})
    message = "--source-loss source.json has losses of c, wiki, and the run of c, prose; evaluate"
    with pytest.raises(ValueError, match=message):
        check_domains(other, record(POINTS), "source.json")


def test_a_gap_to_a_source_on_other_text_says_so() -> None:
    source = MeanLoss(domains={"c": 1.5, "prose": 2.5})
    said = "the model before pruning (over all held-out text; this loss over a subsample), 2.000"
    assert said in "".join(headline([record(POINTS)], source))
