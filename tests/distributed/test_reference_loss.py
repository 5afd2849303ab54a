"""References from models as they lie: evaluated one after the other, fitted, read by a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megashear.__main__ import main
from megashear.config import EvaluateRun
from megashear.data.reference_loss import MEASURED, REFERENCE, Model, find_references
from megashear.train.measure import evaluate
from tests import text_run
from tests.ranks import run_ranks
from tests.text_run import SHAPE, TextRun

SMALLER = replace(SHAPE, num_layers=2, hidden_size=24)
REDUCTION_ORDER = 1e-5
"""Relative; float32 sums over other shards in another order (law 1)."""


def command(*words: object, ranks: int = 1) -> list[int]:
    def body(rank: int) -> int:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        return main(["reference-loss", *map(str, words)])

    return run_ranks(ranks, body)


def alone(text: TextRun, checkpoint: Path) -> dict:
    config = EvaluateRun(
        load=str(checkpoint), data_path=str(text.data), seq_length=text_run.SEQUENCE
    )
    (found,) = run_ranks(1, lambda rank: evaluate(config))
    return found


def test_models_are_measured_one_after_the_other(text: TextRun, tmp_path: Path) -> None:
    smaller = text_run.write_checkpoint(tmp_path / "smaller", SMALLER, text.tokenizer)
    (tmp_path / "target.json").write_text(json.dumps(SMALLER.to_dict()))
    output = tmp_path / "reference.yaml"
    known = {"parameters": 10**6, MEASURED: {"words": 1.0, "paths": 1.0, "numbers": 1.0}}
    (tmp_path / "known.json").write_text(json.dumps(known))
    statuses = command(
        *("--load", text.checkpoint, smaller, "--losses", tmp_path / "known.json"),
        *("--data-path", text.data, "--seq-length", text_run.SEQUENCE, "--micro-batch-size", 8),
        *("--tensor-model-parallel-size", 2, "--method", "own-loss", "--output", output),
        ranks=2,
    )
    assert statuses == [0, 0]
    written = yaml.safe_load(output.read_text())
    for model, checkpoint in zip(written["models"], (smaller, text.checkpoint)):
        wanted = alone(text, checkpoint)
        assert model["parameters"] == wanted["parameters"]
        assert model[MEASURED] == pytest.approx(wanted[MEASURED], rel=REDUCTION_ORDER)
    assert written["models"][0][MEASURED] != pytest.approx(written["models"][1][MEASURED])
    assert written[REFERENCE] == written["models"][0][MEASURED]  # of the smallest


def test_the_target_takes_its_vocabulary_from_the_models(text: TextRun, tmp_path: Path) -> None:
    losses = {"words": 1.0, "paths": 1.1, "numbers": 1.2}
    (tmp_path / "larger.yaml").write_text(yaml.safe_dump({10**9: losses}))
    output = tmp_path / "reference.yaml"
    statuses = command(
        *("--load", text.checkpoint, "--losses", tmp_path / "larger.yaml", "--target"),
        *("llama2-370m", "--data-path", text.data, "--seq-length", text_run.SEQUENCE),
        *("--micro-batch-size", 8, "--output", output),
    )
    assert statuses == [0]
    written = yaml.safe_load(output.read_text())
    # 32,000 ids of the preset give way to 256
    assert written["parameters"] == 373_867_520 - 2 * 1024 * (32_000 - 256)
    models = [
        Model(name=m["name"], parameters=m["parameters"], losses=m[MEASURED])
        for m in written["models"]
    ]
    again = find_references(models, method="auto", params=written["parameters"])
    assert again[REFERENCE] == written[REFERENCE]
    assert written["method"] == "power-law"
