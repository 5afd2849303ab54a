"""A few kills -9 by the harness of tools/crash_test.py, and builds that it must find broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megashear.monitor.tensorboard_sink import TensorBoardSink
from tests.crash.attempt import Kill
from tests.crash.jobs import Crashes, Result, Scenario
from tests.crash.phases import LINGER_S
from tests.distributed.test_resume import forget_weight_moments
from tests.text_run import TextRun

PRUNE = Scenario("prune", "dp2", background=True)
PRETRAIN = Scenario("pretrain", "dp2", background=False)


@pytest.fixture(scope="module")
def compared(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Crashes:
    """With the runs that are not killed, each made once."""
    return Crashes(tmp_path_factory.mktemp("crashes"), text, seed=0)


@pytest.fixture
def crashes(compared: Crashes, tmp_path: Path) -> Crashes:
    compared.folder, compared.broken, compared.result = tmp_path, None, Result()
    return compared


def kill(phase: str, victims: tuple[int, ...], *, entry: int = 0, delay_s: float = 0.0) -> Kill:
    return Kill(phase=phase, rank=0, entry=entry, delay_s=delay_s, victims=victims, notice_s=0.05)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("scenario", "kills"),
    [
        (PRUNE, [kill("weights", (0, 1)), kill("training", (1,), entry=2), kill("latest", (0,))]),
        (PRETRAIN, [kill("rename", (0,), delay_s=2 * LINGER_S), kill("last losses", (0, 1))]),
    ],
    ids=["prune-async-save", "pretrain"],
)
def test_a_job_that_is_killed_ends_as_one_that_is_not(
    crashes: Crashes, scenario: Scenario, kills: list[Kill]
) -> None:
    for _ in crashes.job(scenario, iter(kills)):
        pass
    assert crashes.result.failures == []
    assert crashes.result.resumes == len(kills)


def draw_steps_twice() -> None:
    original = TensorBoardSink.__init__

    def without_purging(self: TensorBoardSink, directory: object, **kwargs: object) -> None:
        original(self, directory, **kwargs | {"purge_step": None})  # type: ignore[arg-type]

    TensorBoardSink.__init__ = without_purging  # type: ignore[assignment,method-assign]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("broken", "differs"),
    [(forget_weight_moments, "killed: decoder."), (draw_steps_twice, "has a step twice")],
    ids=["moments", "points"],
)
def test_a_broken_build_is_found(
    crashes: Crashes, broken: Callable[[], None], differs: str
) -> None:
    crashes.never_killed(PRETRAIN)
    crashes.broken = broken
    for _ in crashes.job(PRETRAIN, iter([kill("training", (0,), entry=3)])):
        pass
    (failure,) = crashes.result.failures
    assert differs in failure.partition("\n")[0]
