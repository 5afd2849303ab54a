"""Jobs that are killed and started again until they are done, held to jobs that never were."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from megashear.checkpoint.description import read_description
from megashear.config import DataConfig, ParallelConfig, PretrainRun, PruneRun
from tests import text_run
from tests.crash.attempt import Kill, attempt, outlived
from tests.crash.phases import BRIEF, LINGER_S, OF_RANK_0, PHASES
from tests.crash.restarts import restarted
from tests.distributed.test_resume import (
    WHOLE,
    Finished,
    adam_steps,
    configuration,
    differences,
    finished_tensors,
)
from tests.text_run import TextRun
from tests.tiny import layout

STAGES = ("prune", "pretrain")
LAYOUTS: dict[str, tuple[ParallelConfig, int]] = {
    "tp2-pp2": (layout(tp=2, pp=2), 4),
    "dp2": (layout(), 2),
}
"""How a job is divided, and its ranks."""
MOST_KILLS = 4
"""Kills of one job before it is left alone, so that each is compared with one that never was."""
ORPHANS_S = 20.0
"""Seconds in which what a killed rank had started ends by itself; torch's loaders look every 5."""

Broken = Callable[[], None] | None


class Scenario(NamedTuple):
    """A kind of job."""

    stage: str
    layout: str
    background: bool
    """With --async-save."""

    @property
    def cell(self) -> tuple[str, str]:
        """What phases are counted for."""
        return self.stage, self.layout

    def __str__(self) -> str:
        return f"{self.stage} {self.layout}{' --async-save' if self.background else ''}"


SCENARIOS = [
    Scenario(stage, name, background)
    for background in (False, True)
    for stage in STAGES
    for name in LAYOUTS
]


@dataclass
class Result:
    """What many jobs came to."""

    kills: list[dict[str, object]] = field(default_factory=list)
    """One entry for each kill that fell."""
    failures: list[str] = field(default_factory=list)
    """What was not as promised: a start that failed, a difference."""
    jobs: int = 0
    resumes: int = 0
    """Starts after a kill."""

    def table(self) -> str:
        """Kills by phase, stage and layout, in Markdown."""
        cells = [(stage, name) for stage in STAGES for name in LAYOUTS]
        count = Counter((kill["stage"], kill["layout"], kill["phase"]) for kill in self.kills)
        rows = [["killed in", *(f"{stage} {name}" for stage, name in cells), "all"]]
        for phase in (*PHASES, "between"):
            numbers = [count[(*cell, phase)] for cell in cells]
            rows.append([phase, *map(str, numbers), str(sum(numbers))])
        sums = [sum(count[(*cell, phase)] for phase in (*PHASES, "between")) for cell in cells]
        rows.append(["all", *map(str, sums), str(sum(sums))])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


class Crashes:
    """Kills jobs and compares.

    Args:
        folder: to work in; jobs that went well are removed from it.
        text: data and a checkpoint to start from.
        seed: of all choices.
        broken: called in each rank that is killed or resumed, to break the product.
    """

    def __init__(self, folder: Path, text: TextRun, seed: int, broken: Broken = None) -> None:
        self.folder, self.text, self.broken = folder, text, broken
        self.choice = random.Random(seed)
        self.result = Result()
        self.seconds: dict[str, list[float]] = {}
        self._never_killed: dict[tuple[str, str], Finished] = {}

    def run(self, num_kills: int) -> Iterator[Scenario]:
        """Start jobs of all kinds in turn; yields after each kill.

        Ends when so many kills fell and none of the phases was left out by them, or, since a kill
        may miss the phase it is aimed at, when twice as many did.
        """
        for turn in range(4 * num_kills):  # a job may end before a kill is due
            scenario = SCENARIOS[turn % len(SCENARIOS)]
            enough = len(self.result.kills) >= num_kills
            if enough and not phases_missed(self.result, [scenario.cell]):
                if not phases_missed(self.result, [other.cell for other in SCENARIOS]):
                    return
                continue
            if len(self.result.kills) >= 2 * num_kills:
                return
            for _ in self.job(scenario, self._choose(scenario)):
                yield scenario

    def job(self, scenario: Scenario, kills: Iterator[Kill]) -> Iterator[Kill]:
        """Start a job, kill it, start it again with --resume, and compare; yields each kill."""
        whole = self.never_killed(scenario)
        folder = self._new_job()
        groups: list[int] = []
        for kill in _and_none(kills):
            outcome = attempt(
                self._configuration(scenario, folder),
                LAYOUTS[scenario.layout][1],
                folder / "log",
                kill,
                self.broken,
            )
            if outcome.error is not None:
                self._fail(scenario, folder, f"a start failed: {outcome.error}")
                break
            if outcome.fell is None:
                self._compare(scenario, folder, whole)
                break
            assert kill is not None
            groups += outcome.groups
            self._count(scenario, folder, kill, outcome.fell)
            yield kill
        if left := outlived(tuple(groups), time.monotonic() + ORPHANS_S):
            self._fail(scenario, folder, f"processes of {left} killed ranks did not end")
        self._clear(folder)

    def restarted_job(self, scenario: Scenario, kills: Sequence[Kill]) -> None:
        """The same under torchrun, whose --max-restarts starts the job again by itself."""
        whole = self.never_killed(scenario)
        folder = self._new_job()
        outcome = restarted(
            self._configuration(scenario, folder),
            LAYOUTS[scenario.layout][1],
            folder / "log",
            kills,
            lambda kill, fell: self._count(scenario, folder, kill, fell, "torchrun"),
        )
        if outcome.error is not None:
            self._fail(scenario, folder, f"torchrun failed: {outcome.error}")
        else:
            self._compare(scenario, folder, whole)
        self._clear(folder)

    def _new_job(self) -> Path:
        folder = self.folder / f"job-{self.result.jobs}"
        folder.mkdir(parents=True)
        self.result.jobs += 1
        return folder

    def _clear(self, folder: Path) -> None:
        if not any(failure.startswith(f"{folder.name},") for failure in self.result.failures):
            shutil.rmtree(folder)

    def _count(
        self, scenario: Scenario, folder: Path, kill: Kill, fell: str, launcher: str = "fork"
    ) -> None:
        self.result.resumes += 1
        self.result.kills.append(
            {
                "job": folder.name,
                "launcher": launcher,
                "stage": scenario.stage,
                "layout": scenario.layout,
                "async save": scenario.background,
                "phase": fell,
                "aimed at": kill.phase,
                "ranks": list(kill.victims),
            }
        )

    def never_killed(self, scenario: Scenario) -> Finished:
        """What a job leaves that is left alone, saves in the foreground and waits for each."""
        if scenario.cell not in self._never_killed:
            folder = self.folder / "-".join(("whole", *scenario.cell))
            folder.mkdir(parents=True)
            config = self._configuration(scenario._replace(background=False), folder)
            outcome = attempt(config, LAYOUTS[scenario.layout][1], folder / "log")
            log = (folder / "log").read_text()
            assert outcome.error is None, f"{scenario}, not killed: {outcome.error}\n{log}"
            for phase, seconds in outcome.seconds.items():
                self.seconds.setdefault(phase, []).extend(seconds)
            self._never_killed[scenario.cell] = finished(folder)
        return self._never_killed[scenario.cell]

    def _configuration(self, scenario: Scenario, folder: Path) -> PruneRun | PretrainRun:
        parallel, _ = LAYOUTS[scenario.layout]
        train = {"async_save": scenario.background, "save_interval": 2, "keep": 1, "resume": True}
        config = configuration(self.text, scenario.stage, parallel, folder, **train)
        data = DataConfig(
            data_path=str(self.text.data), reference_loss=str(self.text.reference), num_workers=1
        )
        return replace(config, data=data)

    def _choose(self, scenario: Scenario) -> Iterator[Kill]:
        for _ in range(self.choice.randint(1, MOST_KILLS)):
            yield self.kill(scenario, self._rarest(scenario))

    def _rarest(self, scenario: Scenario) -> str:
        """A phase that few kills fell in so far, so that none is left out."""
        here = Counter(
            kill["phase"]
            for kill in self.result.kills
            if (kill["stage"], kill["layout"]) == scenario.cell
        )
        return min(PHASES, key=lambda phase: (here[phase], self.choice.random()))

    def kill(self, scenario: Scenario, phase: str) -> Kill:
        """A random kill in a phase: of one rank or of all, at a random instant of it."""
        choice, world_size = self.choice, LAYOUTS[scenario.layout][1]
        rank = 0 if phase in OF_RANK_0 else choice.randrange(world_size)
        everyone = tuple(range(world_size))
        victims = choice.choice([everyone, (rank,), (choice.randrange(world_size),)])
        taken = self.seconds.get(phase, [0.0])
        # jobs that may be killed linger in brief phases, those that were timed did not
        usual = 0.8 * sum(taken) / len(taken) + (3 * LINGER_S if phase in BRIEF else 0.0)
        return Kill(
            phase=phase,
            rank=rank,
            entry=0 if phase in ("start", "last losses") else choice.randrange(2),
            delay_s=choice.uniform(0, usual),
            victims=victims,
            notice_s=choice.uniform(0, 0.3),
        )

    def _compare(self, scenario: Scenario, folder: Path, whole: Finished) -> None:
        try:
            different = differences(finished(folder), whole)
        except AssertionError as error:
            different = {str(error)}
        if different:
            some = ", ".join(sorted(different)[:8])
            self._fail(scenario, folder, f"{len(different)} differ from a run not killed: {some}")

    def _fail(self, scenario: Scenario, folder: Path, what: str) -> None:
        log = folder / "log"
        end = "\n".join(log.read_text(errors="replace").splitlines()[-60:]) if log.exists() else ""
        self.result.failures.append(f"{folder.name}, {scenario}: {what}\n{end}")


def _and_none(kills: Iterator[Kill]) -> Iterator[Kill | None]:
    yield from kills
    yield None


def finished(folder: Path) -> Finished:
    """Everything that a job left: tensors, plain values, points of all steps but measured ones."""
    directory = folder / "saved" / f"iter_{WHOLE:07d}"
    details = dict(read_description(directory).details)
    del details["run"]  # says where things lie
    details.pop("environment", None)  # has the command of each start
    points = {
        tag: of_tag
        for tag, of_tag in text_run.scalars(folder / "events").items()
        if not tag.startswith("system/")
    }
    common = torch.load(directory / "common.pt", weights_only=False)
    tensors = finished_tensors(folder / "saved", WHOLE)
    return Finished(tensors, details, adam_steps(common), points)


def phases_missed(result: Result, cells: Sequence[tuple[str, str]]) -> list[str]:
    """Phases that no kill fell in, by stage and layout."""
    hit = {(kill["stage"], kill["layout"], kill["phase"]) for kill in result.kills}
    return [
        f"{' '.join(cell)} {phase}"
        for cell in cells
        for phase in PHASES
        if (*cell, phase) not in hit
    ]
