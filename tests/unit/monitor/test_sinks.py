"""What sinks keep is read back; a resumed run has no line twice; a missing library is said."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megashear.config import TrainConfig
from megashear.models.kept import KeptUnits
from megashear.monitor import sinks
from megashear.monitor.sinks import JsonLinesSink, Sinks, check_sinks, open_sinks
from megashear.monitor.tensorboard_sink import TensorBoardSink
from megashear.train import survey as surveys
from megashear.train.survey import MaskSurvey
from tests.text_run import scalars
from tests.tiny import SOURCE


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


def test_half_a_line_is_left_out_by_a_start_at_step_0_too(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text('{"step": 1, "a": 1.0}\n{"st')
    train = TrainConfig(jsonl_log=str(file), save=str(tmp_path / "saved"), resume=True)
    sink = open_sinks(train, first_step=0, config={}, layout={})
    sink.scalars(1, {"a": 2.0})
    sink.close()
    assert [line["a"] for line in lines(file)] == [1.0, 2.0]


def test_a_start_at_step_0_takes_back_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run.jsonl"
    train = TrainConfig(jsonl_log=str(file), save=str(tmp_path / "saved"), resume=True)
    for value in (1.0, 2.0):  # another run's, or its own before the first save
        sink = open_sinks(train, first_step=0, config={}, layout={})
        sink.scalars(5, {"a": value})
        sink.close()
    assert [line["a"] for line in lines(file)] == [1.0, 2.0]
    assert [record.getMessage() for record in caplog.records] == [
        f"--jsonl-log {file} holds lines already, and this run begins at step 0: they stay, and "
        f"its own come behind them"
    ]


@pytest.mark.parametrize("first_step", [0, 4])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"my notes", "line 1 is b'my notes'"),
        (b'{"step": 1}\n{"loss": 2}\n', "line 2 is b'{\"loss\": 2}'"),
        (b'{"step": 1}\n{"step": 2, "a"\n{"step": 3}\n', 'line 2 is b\'{"step": 2'),
        (b"[1]", r"line 1 is b'\[1\]'"),
        (b"\xff\xfe", "line 1 is"),
    ],
)
def test_a_file_that_is_no_log_is_refused_and_stays(
    first_step: int, content: bytes, found: str, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_bytes(content)
    notes = str(tmp_path / "notes")
    train = TrainConfig(jsonl_log=notes, save=str(tmp_path / "saved"), resume=True)
    with pytest.raises(ValueError, match=rf"--jsonl-log .*notes is no log of a run: {found}"):
        open_sinks(train, first_step=first_step, config={}, layout={})
    assert (tmp_path / "notes").read_bytes() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "notes"]


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


def test_a_sink_that_fails_is_dropped_and_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = JsonLinesSink("/dev/full")  # as a disk without room: writing raises
    other = JsonLinesSink(tmp_path / "run.jsonl")
    both = Sinks([full, other])
    for step in (1, 2):
        both.scalars(step, {"a": 0.5})
        both.flush()
    both.replace(2, {"b": 1.0})
    both.close()
    assert [line["step"] for line in lines(tmp_path / "run.jsonl")] == [1, 2, 2]
    (record,) = caplog.records
    assert re.match(r"--jsonl-log /dev/full gets nothing more of this run: OSError", record.message)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_event_files_without_room_are_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = TensorBoardSink(tmp_path)
    sink = Sinks([events])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # the thread of TensorBoard's own that writes
    assert events._writer is not None
    writer = events._writer._get_file_writer().event_writer._async_writer._writer
    monkeypatch.setattr(writer, "write", full)
    for step in (1, 2):
        sink.scalars(step, {"a": 0.5})
        sink.flush()
    sink.close()
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"--tensorboard-dir {tmp_path} gets nothing more of this run"
    ]
    assert not sink.takes_images


def test_masks_that_cannot_be_drawn_end_no_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **more: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(surveys, "mask_pictures", broken)
    survey = MaskSurvey(
        kept=KeptUnits.of({}, SOURCE),
        chances=KeptUnits.expected({}, SOURCE),
        log_alpha={},
        census={},
        changed={},
        target_sizes={},
    )
    sink = Sinks([TensorBoardSink(tmp_path)])
    surveys.show_masks(sink, 3, survey, {}, {})
    sink.close()
    assert "step 3: masks are not drawn: MemoryError: no room" in caplog.text


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
    with pytest.raises(ValueError, match="--wandb-exp-name need --wandb-project"):
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
    common = TrainConfig(
        wandb_project="shears", wandb_exp_name="first", wandb_save_dir=str(tmp_path)
    )
    # a run, another that logs to the same directory, and the first once more, gone on with
    for save, first_step in (("pruned", 0), ("small", 0), ("pruned", 4)):
        train = dataclasses.replace(common, save=str(tmp_path / save), resume=True)
        sink = open_sinks(train, first_step=first_step, config={"lr": 0.5}, layout={})
        sink.scalars(first_step + 1, {"x": 0.25 + first_step, "y": math.nan})
        sink.images(first_step + 1, {"picture": np.zeros((2, 2, 3), dtype=np.uint8)})
        sink.histograms(first_step + 1, {"spread": np.linspace(0, 1, 100)})
        sink.close()
    wandb.teardown()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    runs = [file.stem.removeprefix("run-") for file in files]
    first, second = (
        (tmp_path / save / sinks.RUN_ID).read_text().strip() for save in ("pruned", "small")
    )
    assert first != second
    assert sorted(runs) == sorted([first, second, first])
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
    logged = [(p["step"], p["x"]) for p in points if "x" in p]
    assert sorted(logged) == [(1, 0.25), (1, 0.25), (5, 4.25)]
    assert not any("y" in point for point in points)
    images = [point for point in points if any(key.startswith("picture") for key in point)]
    spreads = [point for point in points if any(key.startswith("spread") for key in point)]
    assert len(images) == len(spreads) == 3


def test_a_wandb_run_begun_anew_takes_no_earlier_one_on_and_a_failed_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Run:
        id = "new"

        def define_metric(self, *args: str, **more: str) -> None: ...

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    def init(**settings: Any) -> Run:
        calls.append(settings["id"])
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    train = TrainConfig(wandb_project="shears", save=str(tmp_path), resume=True)
    (tmp_path / sinks.RUN_ID).write_text("old\n")
    # --resume of a run that was killed before its first save
    with contextlib.closing(open_sinks(train, first_step=0, config={}, layout={})):
        pass
    assert calls == [None, 0]
    calls.clear()
    with (
        pytest.raises(RuntimeError, match="steps are used up"),
        contextlib.closing(open_sinks(train, first_step=4, config={}, layout={})),
    ):
        raise RuntimeError("steps are used up")
    assert calls == ["new", 1]
