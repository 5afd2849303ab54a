"""A pruning run leaves every metric in TensorBoard, and a resumed one no point twice."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from megashear.__main__ import main
from megashear.checkpoint.description import TRACKER
from tests import text_run
from tests.ranks import run_ranks
from tests.text_run import REFERENCE, TextRun

KINDS = ("hidden", "head", "group", "intermediate", "layer")
ITERATIONS, SAVED = 6, 4
EVERY_STEP = {
    "train/lm-loss",
    "train/grad-norm",
    "train/learning-rate",
    "prune/penalty",
    "prune/grad-norm",
    "prune/learning-rate",
    "system/tokens-per-second",
    *(f"prune/expected-sparsity/{kind}" for kind in KINDS),
    *(f"prune/target-sparsity/{kind}" for kind in KINDS),
    *(f"prune/lambda1/{kind}" for kind in KINDS),
    *(f"prune/lambda2/{kind}" for kind in KINDS),
    *(f"mix/weight/{domain}" for domain in REFERENCE),
}
"""What the README promises of a pruning run, under the tags of the monitor."""
EVERY_EVALUATION = {
    *(f"eval/loss/{domain}" for domain in REFERENCE),
    *(f"eval/standard-error/{domain}" for domain in REFERENCE),
    *(f"eval/excess/{domain}" for domain in REFERENCE),
    "eval/mean-loss",
    "eval/mean-standard-error",
    "system/evaluation-share",
    "prune/expected-parameters",
}


@pytest.fixture(scope="module")
def finished(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that saved on its way and at its end."""
    folder = tmp_path_factory.mktemp("finished")
    prune(text, folder)
    return folder


def prune(text: TextRun, folder: Path, *more: str) -> None:
    """`megashear prune` in a forked process, one step a point."""
    words = {
        "--load": text.checkpoint,
        "--data-path": text.data,
        "--reference-loss": text.reference,
        "--save": folder / "saved",
        "--tensorboard-dir": folder / "events",
        "--train-iters": ITERATIONS,
        "--save-interval": SAVED,
        "--log-interval": 1,
        "--eval-interval": 2,
        "--eval-sequences": 4,
        "--global-batch-size": 4,
        "--micro-batch-size": 4,
        "--seq-length": text_run.SEQUENCE,
        "--sparsity-warmup-iters": 4,
        "--constraint": "lagrangian",
        **{f"--{key.replace('_', '-')}": value for key, value in text_run.TARGET.items()},
    }
    argv = ["prune", *more, *(str(word) for pair in words.items() for word in pair)]
    assert run_ranks(1, lambda rank: main(argv)) == [0]


def test_every_metric_is_there_at_every_step(finished: Path) -> None:
    points = text_run.scalars(finished / "events")
    assert set(points) >= EVERY_STEP | EVERY_EVALUATION
    for tag in EVERY_STEP:
        first = 0 if tag.startswith("mix/weight") else 1  # weights hold from their step on
        assert sorted(points[tag]) == list(range(first, ITERATIONS + 1)), tag
    for tag in EVERY_EVALUATION:
        assert sorted(points[tag]) == [2, 4, ITERATIONS], tag
    assert all(math.isfinite(value) for of_tag in points.values() for value in of_tag.values())
    assert {points[f"prune/target-sparsity/{kind}"][1] for kind in KINDS} == {0.0}
    assert points["prune/target-sparsity/hidden"][ITERATIONS] == pytest.approx(1 - 24 / 40)
    assert all(0 < share < 1 for share in points["system/evaluation-share"].values())
    weights = [points[f"mix/weight/{domain}"][ITERATIONS] for domain in REFERENCE]
    assert sum(weights) == pytest.approx(1.0)


def test_a_run_resumed_after_a_kill_has_no_point_twice(
    text: TextRun, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    # as if killed after the last step: logged on, and only step 4 saved
    shutil.rmtree(tmp_path / "saved" / f"iter_{ITERATIONS:07d}")
    (tmp_path / "saved" / TRACKER).write_text(str(SAVED))
    first = set((tmp_path / "events").iterdir())  # the curves, and the last evaluation's points
    prune(text, tmp_path, "--resume")
    assert set((tmp_path / "events").iterdir()) - first
    whole = text_run.scalars(finished / "events")
    resumed = text_run.scalars(tmp_path / "events")
    for tag in EVERY_STEP | EVERY_EVALUATION:
        assert resumed[tag].keys() == whole[tag].keys(), tag
        if not tag.startswith("system/"):
            assert resumed[tag] == whole[tag], tag
    for file in first:  # what the second process wrote alone
        file.unlink(missing_ok=True)
    for tag, points in text_run.scalars(tmp_path / "events").items():
        assert min(points) > SAVED, tag
