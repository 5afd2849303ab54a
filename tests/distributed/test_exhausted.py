"""A run whose text runs out ends cleanly and together, and may go on another way."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint.description import read_description
from megashear.config import DataConfig, PretrainRun
from megashear.data.manifest import read_manifest
from megashear.data.mixture import DomainMixture
from megashear.data.sequences import DomainSequences
from tests import text_run
from tests.distributed.test_resume import configuration, start
from tests.text_run import TextRun
from tests.tiny import layout

WEIGHTS = (0.1, 0.1, 0.8)
BATCH, STEPS = 48, 16


def config(text: TextRun, folder: Path, exhausted: str, **train: Any) -> PretrainRun:
    run = configuration(text, "pretrain", layout(), folder)
    assert isinstance(run, PretrainRun)
    data = DataConfig(
        data_path=str(text.data),
        domain_weights=WEIGHTS,
        reweight="constant",
        data_exhausted=exhausted,  # type: ignore[arg-type]
    )
    return replace(
        run,
        data=data,
        train=replace(
            run.train,
            train_iters=STEPS,
            global_batch_size=BATCH,
            micro_batch_size=12,
            eval_interval=0,
            log_interval=100,
            **train,
        ),
    )


def test_two_replicas_stop_at_the_step_that_the_text_lasts_for(
    text: TextRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(text.data)
    sizes = [
        DomainSequences(manifest.prefix(name), text_run.SEQUENCE, 0, i).samples_per_epoch
        for i, name in enumerate(manifest.names)
    ]
    mixture, wanted = DomainMixture(WEIGHTS), 0
    while all(sample < sizes[d] for d, sample in [mixture.draw() for _ in range(BATCH)]):
        wanted += 1
    assert 2 < wanted < STEPS - 1

    logging.getLogger("megashear").addHandler(handler := logging.StreamHandler())
    try:
        start(config(text, tmp_path, "stop"), 2)
    finally:
        logging.getLogger("megashear").removeHandler(handler)
    told = capfd.readouterr().err
    assert "it is read after about" in told
    assert f"the run ends {STEPS - wanted} steps early: domain numbers is read" in told

    saved = tmp_path / "saved" / f"iter_{wanted:07d}"
    details = read_description(saved).details
    assert sum(details["loader"]["mixture"]["drawn"]) == wanted * BATCH
    assert details["held_out_loss"]["loss"].keys() == set(manifest.names)
    points = text_run.scalars(tmp_path / "events")
    assert set(points["train/lm-loss"]) == {wanted}  # the last window, though no interval ends

    start(config(text, tmp_path, "redistribute", resume=True), 1)
    drawn = read_description(tmp_path / "saved" / f"iter_{STEPS:07d}").details["loader"]["mixture"]
    assert sum(drawn["drawn"]) == STEPS * BATCH
    assert drawn["drawn"][2] == sizes[2]
