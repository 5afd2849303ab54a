"""A run killed at any moment goes on from its last checkpoint with the samples due there."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megashear.checkpoint.description import latest_iteration, read_description
from megashear.config import PretrainRun
from tests import text_run
from tests.distributed.test_resume import REDUCTION_ORDER, configuration, start
from tests.text_run import TextRun
from tests.tiny import layout

AFTER = 4
"""Steps after the checkpoint; an evaluation moves the mixture after every second one."""
PATIENCE_S = 120.0


def config(text: TextRun, folder: Path, *, workers: int, steps: int, **train: Any) -> PretrainRun:
    run = configuration(text, "pretrain", layout(), folder)
    assert isinstance(run, PretrainRun)
    return replace(
        run,
        train=replace(run.train, train_iters=steps, save_interval=2, **train),
        optimizer=replace(run.optimizer, lr_decay_iters=1000),
        data=replace(run.data, num_workers=workers),
    )


def test_a_killed_run_goes_on_with_other_replicas_and_workers(
    text: TextRun, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = multiprocessing.get_context("fork").Process(
        target=start,
        args=(config(text, killed, workers=2, steps=1000), 2),  # it is killed long before
    )
    process.start()
    deadline = time.monotonic() + PATIENCE_S
    while not list(killed.glob("saved/iter_0000004/megashear.json")):
        assert process.is_alive()
        assert time.monotonic() < deadline, "the run is stuck"
        time.sleep(0.01)
    parent = psutil.Process(process.pid)
    everyone = [parent, *parent.children(recursive=True)]
    assert len(everyone) >= 1 + 2 * (1 + 2)  # ranks, and their workers
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker may end with its rank
            each.kill()
    process.join()

    latest = latest_iteration(killed / "saved")
    assert latest is not None
    last = latest + AFTER
    start(config(text, killed, workers=1, steps=last, resume=True), 1)
    start(config(text, whole, workers=0, steps=last), 1)

    ours, theirs = (
        read_description(folder / "saved" / f"iter_{last:07d}").details["loader"]
        for folder in (killed, whole)
    )
    assert ours["mixture"]["drawn"] == theirs["mixture"]["drawn"]
    assert ours["mixture"]["weights"] == pytest.approx(
        theirs["mixture"]["weights"], rel=REDUCTION_ORDER
    )
    after = range(latest + 1, last + 1)
    losses = [
        [text_run.scalars(folder / "events")["train/lm-loss"][step] for step in after]
        for folder in (killed, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=REDUCTION_ORDER)  # the same samples
    shares = text_run.scalars(whole / "events")["mix/weight/numbers"]
    assert abs(shares[last] - shares[latest + 1]) > 0.01, "the mixture did not move"
