"""What sinks keep is read back; a resumed run has no line twice; a missing library is said."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megashear.config import TrainConfig
from megashear.monitor import sinks
from megashear.monitor.sinks import JsonLinesSink, Sinks, check_sinks, open_sinks
from tests.text_run import scalars


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_have_the_points_of_a_step(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "new" / "run.jsonl")
    sink.scalars(1, {"a": 0.5, "b": math.nan, "c": math.inf})
    sink.scalars(1, {"d": math.nan})  # nothing to say
    sink.scalars(2, {"a": np.float64(1.5)})
    sink.close()
    found = lines(tmp_path / "new" / "run.jsonl")
    assert found == [{"step": 1, "a": 0.5}, {"step": 2, "a": 1.5}]


@pytest.mark.parametrize(("purge_step", "steps"), [(5, [4, 5]), (None, [4, 6, 5])])
def test_a_resumed_run_takes_back_later_lines(
    purge_step: int | None, steps: list[int], tmp_path: Path
) -> None:
    first = JsonLinesSink(tmp_path / "run.jsonl")
    first.scalars(4, {"a": 1.0})
    first.scalars(6, {"a": 2.0})  # after the last checkpoint, then killed
    first.close()
    second = JsonLinesSink(tmp_path / "run.jsonl", purge_step=purge_step)
    second.scalars(5, {"a": 3.0})
    second.close()
    assert [line["step"] for line in lines(tmp_path / "run.jsonl")] == steps
    assert list(tmp_path.iterdir()) == [tmp_path / "run.jsonl"]


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 1.')
    sink = JsonLinesSink(tmp_path / "run.jsonl", purge_step=3)
    sink.scalars(3, {"a": 2.0})
    sink.close()
    assert [line["step"] for line in lines(tmp_path / "run.jsonl")] == [1, 3]


def test_points_are_replaced_and_others_of_their_step_stay(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "run.jsonl")
    sink.scalars(6, {"train": 1.0})
    sink.replace(6, {"full": 2.0, "mean": 2.5})
    sink.close()
    again = JsonLinesSink(tmp_path / "run.jsonl", purge_step=7)
    again.replace(6, {"full": 3.0, "mean": 3.5})
    again.close()
    assert lines(tmp_path / "run.jsonl") == [
        {"step": 6, "train": 1.0},
        {"step": 6, "full": 3.0, "mean": 3.5},
    ]


def test_all_sinks_get_the_same_points(tmp_path: Path) -> None:
    train = TrainConfig(
        tensorboard_dir=str(tmp_path / "events"), jsonl_log=str(tmp_path / "run.jsonl")
    )
    both = open_sinks(train, first_step=0, config={}, layout={})
    both.scalars(3, {"x": 0.25, "y": 4.0})
    both.flush()
    assert lines(tmp_path / "run.jsonl") == [{"step": 3, "x": 0.25, "y": 4.0}]
    both.replace(3, {"z": 1.0})
    both.images(3, {"picture": np.zeros((2, 2, 3), dtype=np.uint8)})
    both.close()
    assert scalars(tmp_path / "events") == {"x": {3: 0.25}, "y": {3: 4.0}, "z": {3: 1.0}}
    assert lines(tmp_path / "run.jsonl")[-1] == {"step": 3, "z": 1.0}
    assert both.takes_images


def test_without_flags_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for sink in (Sinks(), open_sinks(TrainConfig(), first_step=0, config={}, layout={})):
        sink.scalars(1, {"x": 1.0})
        sink.replace(1, {"x": 1.0})
        sink.flush()
        sink.close()
        assert not sink.takes_images
    assert list(tmp_path.iterdir()) == []


def test_lines_alone_need_no_pictures(tmp_path: Path) -> None:
    train = TrainConfig(jsonl_log=str(tmp_path / "run.jsonl"))
    assert not open_sinks(train, first_step=0, config={}, layout={}).takes_images


def test_wandb_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(wandb_project="shears")
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'shears needs wandb.*pip install "megashear\[wandb\]"'):
        check_sinks(train)
    check_sinks(dataclasses.replace(train, wandb_project=None))


def test_flags_of_wandb_without_a_project_are_refused() -> None:
    with pytest.raises(ValueError, match="--wandb-entity and --wandb-exp-name say nothing without"):
        TrainConfig(wandb_entity="us", wandb_exp_name="first")


def records(data: bytes) -> Iterator[bytes]:
    """Records of a W&B file: a head of 7 bytes, then LevelDB's log format.

    Source: LevelDB, doc/log_format.md: blocks of 32 KiB; a piece of a record has a checksum of 4
    bytes, a length of 2 and a kind of 1 (whole, first, middle, last).
    """
    block, at, record = 32768, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little room for a piece: filled up
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_gets_what_the_others_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    train = TrainConfig(
        wandb_project="shears", wandb_exp_name="first", wandb_save_dir=str(tmp_path)
    )
    for first_step in (0, 4):  # and once more, gone on with
        sink = open_sinks(train, first_step=first_step, config={"lr": 0.5}, layout={})
        sink.scalars(first_step + 1, {"x": 0.25 + first_step, "y": math.nan})
        sink.images(first_step + 1, {"picture": np.zeros((2, 2, 3), dtype=np.uint8)})
        sink.histograms(first_step + 1, {"spread": np.linspace(0, 1, 100)})
        sink.close()
    wandb.teardown()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    runs = {file.stem.removeprefix("run-") for file in files}
    assert runs == {(tmp_path / sinks.RUN_ID).read_text().strip()}  # both are one run
    points: list[dict[str, Any]] = []
    for file in files:
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                assert (record.run.project, record.run.display_name) == ("shears", "first")
            if record.HasField("history"):
                points.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
    assert [(p["step"], p["x"]) for p in points if "x" in p] == [(1, 0.25), (5, 4.25)]
    assert not any("y" in point for point in points)
    images = [point for point in points if any(key.startswith("picture") for key in point)]
    spreads = [point for point in points if any(key.startswith("spread") for key in point)]
    assert len(images) == len(spreads) == 2
