"""Tasks asked while masks are learned score the model that would be cut."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from megashear.checkpoint.description import find_iteration, read_description
from megashear.config import EvaluateRun, TrainConfig
from megashear.monitor import tags
from megashear.tasks.find import find_tasks
from megashear.train import harness
from megashear.train.measure import evaluate
from megashear.train.task_scores import load_run_tasks
from tests import local_tasks, text_run
from tests.distributed.test_resume import WHOLE, configuration, start
from tests.distributed.test_tasks import in_place
from tests.local_tasks import CHOICE, READ
from tests.ranks import run_ranks
from tests.text_run import TextRun
from tests.tiny import layout

LIMIT = 3
OTHER_KERNELS = 1e-4
"""Relative; float32 sums over other shards."""


def test_a_pruning_run_logs_the_scores_of_what_it_would_cut(text: TextRun, tmp_path: Path) -> None:
    folder = str(local_tasks.write(tmp_path / "tasks"))
    config = configuration(text, "prune", layout(tp=2), tmp_path)
    asked = replace(
        config.train,
        eval_tasks=(f"{CHOICE},{READ}",),
        eval_tasks_interval=4,
        eval_tasks_limit=LIMIT,
        include_path=folder,
    )
    start(replace(config, train=asked), 1)
    points = text_run.scalars(tmp_path / "events")
    names = [f"{CHOICE}/acc", f"{CHOICE}/acc_norm", f"{READ}/bits_per_byte"]
    found = {name: points[tags.task_score(name)] for name in names}
    assert all(sorted(steps) == [4, WHOLE] for steps in found.values())
    # those of the checkpoint under exact masks, at another layout
    after = EvaluateRun(
        load=str(tmp_path / "saved"), tasks=(CHOICE, READ), include_path=folder, limit=LIMIT
    )
    tasks = find_tasks(after.tasks, include_path=folder).load()
    wanted = tasks.scores_of(in_place(after, tasks, layout()))
    for name in names:
        assert found[name][WHOLE] == pytest.approx(wanted[name], rel=OTHER_KERNELS), name
    # the twin: of the masks two steps before
    last = f"{READ}/bits_per_byte"
    assert found[last][4] != pytest.approx(wanted[last], rel=OTHER_KERNELS)

    # held-out losses too are those that the run found at its end
    of_run = read_description(find_iteration(tmp_path / "saved")).details["held_out_loss"]
    measured = EvaluateRun(load=str(tmp_path / "saved"), data_path=str(text.data))
    for masks in ("exact", "expected"):
        (losses,) = run_ranks(1, lambda rank: evaluate(replace(measured, masks=masks)))  # noqa: B023
        assert losses["held-out loss"] == pytest.approx(of_run[masks], rel=OTHER_KERNELS)


def test_asking_leaves_random_numbers_as_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    wanted = draw()
    seed()
    with harness._own_random_state():
        assert draw() != wanted
    assert draw() == wanted


def test_flags_of_tasks_need_tasks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--eval-tasks-interval 4 is for --eval-tasks, which is"):
        TrainConfig(train_iters=8, seq_length=8, eval_tasks_interval=4)
    folder = str(local_tasks.write(tmp_path / "tasks"))
    train = TrainConfig(train_iters=8, seq_length=8, eval_tasks=(READ,), include_path=folder)
    assert load_run_tasks(train, is_dry_run=True) is None
    asked = load_run_tasks(train)
    assert asked is not None
    assert asked.sizes() == {READ: 3}
    assert load_run_tasks(replace(train, eval_tasks=(), include_path=None)) is None
