"""Tasks are found by name, and what cannot be found or loaded has a way out."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

lm_tasks = pytest.importorskip("lm_eval.tasks")

from megashear.tasks import find  # noqa: E402
from megashear.tasks.find import LoadedTasks, find_tasks  # noqa: E402
from tests import local_tasks  # noqa: E402
from tests.local_tasks import CHOICE, READ  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return local_tasks.write(tmp_path / "tasks")


def test_names_are_words_or_stand_between_commas(folder: Path) -> None:
    found = find_tasks([f"{READ}, {CHOICE}", READ], include_path=str(folder))
    assert found.names == [READ, CHOICE]
    loaded = found.load(num_shots=2)
    assert loaded.sizes() == {READ: 3, CHOICE: 7}
    shots = {name: task.config.num_fewshot for name, task in loaded.tasks["tasks"].items()}
    assert shots == {READ: 2, CHOICE: 2}


def test_the_papers_tasks_have_the_papers_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        all_tasks = ("own", *find.TASKS)

        def __init__(self, **paths: Any) -> None:
            pass

    monkeypatch.setattr(lm_tasks, "TaskManager", Manager)
    found = find_tasks(["own,sheared"], include_path=None)
    assert found.names == ["own", *find.TASKS]
    assert {n for n in found.shots.values() if n} == {5, 10, 25, 32}


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r'not installed: pip install "megashear\[eval\]"'),
        ("0.5.1", r"needs lm-evaluation-harness 0.4.12 or later, below 0.5, and 0.5.1 is"),
        ("0.4.11", r"0.4.12 or later, below 0.5, and 0.4.11 is installed: pip install"),
        ("0.4.9.2", r"and 0.4.9.2 is installed: pip install \"megashear\[eval\]\""),
    ],
)
def test_another_harness_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    def of(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", of)
    with pytest.raises(ValueError, match=message):
        find_tasks(["arc_easy"], include_path=None)


def test_a_task_that_does_not_exist_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without the harness's own thousands of tasks
    own = functools.partial(lm_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_tasks, "TaskManager", lambda include_path, **more: own(include_path=include_path)
    )
    with pytest.raises(ValueError, match=r"--tasks made_choise is no task .* nearest: made_choice"):
        find_tasks(["made_choise"], include_path=str(folder))
    with pytest.raises(ValueError, match=r"--include-path nowhere is not a directory"):
        find_tasks([READ], include_path="nowhere")
    with pytest.raises(ValueError, match=r"--eval-tasks names no task; give names"):
        find_tasks([","], include_path=str(folder), flag="--eval-tasks")


def test_a_task_without_its_data_is_refused(folder: Path) -> None:
    (folder / f"{READ}.jsonl").unlink()
    found = find_tasks([READ], include_path=str(folder))
    with pytest.raises(ValueError, match=r"task made_read cannot be loaded: .*or describe the tas"):
        found.load()


def test_a_task_that_two_names_stand_for_is_refused(folder: Path) -> None:
    (folder / "made_all.yaml").write_text(f"group: made_all\ntask: [{READ}, {CHOICE}]\n")
    found = find_tasks(["made_all"], include_path=str(folder))
    assert found.load().sizes() == {READ: 3, CHOICE: 7}
    both = dataclasses.replace(found, names=[READ, "made_all"])
    with pytest.raises(ValueError, match=f"task {READ} is named twice, by {READ} and by made_all,"):
        both.load()
    of_paper = dataclasses.replace(found, names=["made_all", READ], shots={READ: 3})
    with pytest.raises(ValueError, match=f"made_all and by {READ} of sheared, .*; leave one of th"):
        of_paper.load()


def test_a_group_with_scores_stands_for_its_tasks() -> None:
    def task(name: str) -> SimpleNamespace:
        return SimpleNamespace(task_name=name)

    part, alone = task("part"), task("alone")
    group = SimpleNamespace(get_all_tasks=lambda: [part])
    loaded = LoadedTasks(tasks={"tasks": {"part": part, "alone": alone}, "groups": {"all": group}})
    metrics = {"alias": "x", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1}
    results = {
        "results": {"part": metrics, "alone": metrics | {"em,strict": 1.0}, "all": metrics},
        "groups": {"all": metrics},
    }
    wanted = {"alone/acc": 0.5, "alone/em,strict": 1.0, "all/acc": 0.5}
    assert loaded.scores_of(results) == wanted
    assert loaded.scores_of(results | {"groups": {}}).keys() == {
        *("alone/acc", "alone/em,strict", "part/acc"),
    }
