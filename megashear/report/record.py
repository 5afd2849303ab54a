"""What is left of a run to tell its story: checkpoints, event files, its own words."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megashear.checkpoint.description import (
    Description,
    find_iteration,
    holds_iterations,
    iterations,
    read_description,
)
from megashear.checkpoint.details import RunDetails
from megashear.checkpoint.store import read_log_alpha
from megashear.files.structured import read_yaml
from megashear.monitor import tags
from megashear.monitor.figures import EVENT_FILES, Point, event_files, read_events
from megashear.report.kept import MaskReading
from megashear.shape import ModelShape

logger = logging.getLogger(__name__)

EVALUATION, _ = tags.PAUSES
RESULTS = "results.json"
"""What the quickstart writes at its end, beside its runs."""
QUICKSTART_RUNS = ("pruned", "sheared")
"""Runs of a quickstart that a report tells of, where they are there."""
ALIVE_S = 900.0
"""Seconds since the last point for which a run that is not at its end counts as running."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedIteration:
    """A checkpoint of a run."""

    step: int
    path: Path | None
    """Where it lies; None where it was deleted since."""
    saved_at: float | None
    """When it was whole, seconds since 1970; None where only the files' own times would say it."""
    num_bytes: int
    """On disk now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """From one start of the run to the last that it logged before it ended or was started again."""

    began: float
    """Seconds since 1970."""
    ended: float
    first_step: int | None
    """None where it took no step: it was killed before, or only evaluated what was there."""
    last_step: int | None

    @property
    def seconds(self) -> float:
        """How long it lasted, as far as the event files know."""
        return self.ended - self.began


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, as far as its files tell; fields are empty where they do not."""

    name: str
    save: Path | None
    """Where its checkpoints lie."""
    tensorboard: tuple[Path, ...] = ()
    """Where its event files lie."""
    description: Description | None = None
    """Of the newest whole iteration."""
    masks: MaskReading | None = None
    iterations: tuple[SavedIteration, ...] = ()
    """Oldest first."""
    events: Mapping[str, Mapping[int, Point]] = field(default_factory=dict)
    """Points by tag and step."""
    sessions: tuple[Session, ...] = ()
    notes: tuple[str, ...] = ()
    """What is missing and why, for the reader."""
    source_shape: ModelShape | None = None
    """Of the model before pruning, where it is known."""
    now: float = field(default_factory=time.time)
    """When it was read, seconds since 1970."""

    @property
    def points(self) -> dict[str, dict[int, float]]:
        """Values by tag and step."""
        return {tag: {step: p.value for step, p in of.items()} for tag, of in self.events.items()}

    @property
    def _known(self) -> RunDetails:
        return _known(self.description)

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the run by group; empty before the first checkpoint."""
        return self._known.run

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device, processes and command of the last start; empty where it kept none."""
        return self._known.environment

    @property
    def tokens_per_step(self) -> int | None:
        """Training tokens of a step; None before the first checkpoint."""
        flags = self._known.flags
        if flags.global_batch_size is None or flags.seq_length is None:
            return None
        return flags.global_batch_size * flags.seq_length

    @property
    def stage(self) -> str | None:
        """ "prune", "pretrain" or "finetune"; None where nothing is known."""
        if self.description is not None:
            return self.description.stage
        if any(tag.startswith("prune/") for tag in self.events):
            return "prune"
        return "pretrain" if self.events else None

    @property
    def step(self) -> int:
        """Steps done, as far as checkpoints and points know."""
        logged = max(self.events.get(tags.LM_LOSS, {}), default=0)
        return max(logged, 0 if self.description is None else self.description.iteration)

    @property
    def train_iters(self) -> int | None:
        """Steps of the whole run."""
        return self._known.flags.train_iters

    @property
    def state(self) -> str:
        """ "finished", "ended early" for lack of text, "running" or "stopped"; "unknown" where no
        file says anything.

        A run is at its end with its last evaluation, which comes after its last checkpoint.
        """
        iteration = None if self.description is None else self.description.iteration
        # what goes on from there, with more steps or text, has points behind it
        if iteration == self.step and self._known.held_out_loss:
            return "finished" if iteration == self.train_iters else "ended early"
        if not self.sessions:
            return "unknown" if iteration is None else "stopped"
        return "running" if self.now - self.sessions[-1].ended < ALIVE_S else "stopped"

    @property
    def num_processes(self) -> int | None:
        """Processes of the run, from the two rates that it logs."""
        rates, per_process = (
            self.events.get(tag, {})
            for tag in (tags.TOKENS_PER_SECOND, tags.TOKENS_PER_SECOND_PER_DEVICE)
        )
        for step in sorted(rates.keys() & per_process.keys(), reverse=True):
            if per_process[step].value > 0:
                return round(rates[step].value / per_process[step].value)
        return None

    @property
    def tokens(self) -> int | None:
        """Training tokens read up to the newest checkpoint, or the last point where none is."""
        length, samples = self._known.flags.seq_length, self._known.consumed_samples
        return None if samples is None or length is None else samples * length

    @property
    def seconds(self) -> float:
        """Wall time of all sessions together."""
        return sum(session.seconds for session in self.sessions)

    @property
    def evaluation_share(self) -> float | None:
        """Share of the wall time that evaluations within the run took; None where none did.

        Every start logs the share of its own time so far.
        """
        points = self.events.get(tags.part_share(EVALUATION), {})
        if not points or not self.seconds:
            return None
        taken = 0.0
        for session in self.sessions:
            own = [p for p in points.values() if session.began <= p.wall_time <= session.ended]
            last = max(own, key=lambda point: point.wall_time, default=None)
            taken += 0.0 if last is None else last.value * session.seconds
        return taken / self.seconds

    @property
    def target_shape(self) -> ModelShape | None:
        """Of the model after pruning."""
        if self.description is None:
            return None
        if self._known.target_shape is not None:
            return self._known.target_shape
        return self.description.shape if self.source_shape is not None else None


def read_runs(
    run: Sequence[Path | str], tensorboard_dirs: Sequence[Path | str] = ()
) -> list[RunRecord]:
    """Read the runs that a report is to be about, in their order.

    Args:
        run: --save directories; TensorBoard directories of runs that have saved nothing yet; or a
            quickstart's folder, which stands for its pruning and its recovery. A pruning run with
            --then-pretrain brings its continued pretraining along.
        tensorboard_dirs: where event files lie, if not where the run says: all of one run, or one
            for each.

    Raises:
        ValueError: nothing of a run there, or no whole checkpoint.
    """
    paths = [Path(path) for path in run]
    for path in paths:
        if not path.is_dir() and not tensorboard_dirs:
            raise ValueError(f"no run at {path}: it is not a directory; give a run's --save")
    folders = [folder for path in paths for folder in _runs_of(path)]
    given = [Path(path) for path in tensorboard_dirs]
    if len(folders) > 1 and given and len(given) != len(folders):
        raise ValueError(
            f"{len(given)} of --tensorboard-dir for {len(folders)} runs "
            f"({', '.join(map(str, folders))}); give one for each, or none"
        )
    records = []
    for number, folder in enumerate(folders):
        own = given if len(folders) == 1 else given[number : number + 1]
        record = read_run(folder, own)
        records.append(record)
        following = _then(record)
        if following is not None and following.resolve() not in {f.resolve() for f in folders}:
            records.append(read_run(following))
    return records


def read_run(folder: Path, tensorboard_dirs: Sequence[Path] = ()) -> RunRecord:
    """Read one run.

    Args:
        folder: its --save directory, or one with its event files.
        tensorboard_dirs: where event files lie, if not where the run says.

    Raises:
        ValueError: nothing of a run there; every checkpoint is damaged.
    """
    description, masks, notes = None, None, []
    if holds_iterations(folder):
        directory = find_iteration(folder)
        description = read_description(directory)
        if description.stage not in ("prune", "pretrain", "finetune"):
            raise ValueError(
                f"{folder} is a checkpoint of stage {description.stage!r} and no run; "
                f"`megashear inspect {folder}` looks into it"
            )
        if description.known.mask_extents is not None:
            target = description.known.target
            masks = MaskReading.of(read_log_alpha(directory), description.shape, target)
    directories = list(tensorboard_dirs) or _tensorboard_of(folder, description)
    if description is None and not directories:
        raise ValueError(
            f"no run at {folder}: it holds no checkpoint and no event files; give the --save of a "
            f"run, its --tensorboard-dir if it has saved nothing yet, or a quickstart's folder"
        )
    if description is None:
        notes.append(
            "The run has saved no checkpoint yet. Its shape, its settings and its masks will be "
            "known with the first one; until then there are its curves."
        )
    if not directories:
        notes.append(
            "There are no TensorBoard files, so there are no curves, no times and no costs; a run "
            "writes them with --tensorboard-dir, and a report finds files that were moved with "
            "the flag of the same name."
        )
    if directories:
        logger.info("reading event files of %s", ", ".join(map(str, directories)))
    events = read_events(directories) if directories else {}
    lying = iterations(folder) if description is not None else {}
    return RunRecord(
        name=folder.resolve().name,
        save=folder if description is not None else None,
        tensorboard=tuple(directories),
        description=description,
        masks=masks,
        iterations=tuple(_saved(lying, events.get(tags.SAVE_SECONDS, {}))),
        events=events,
        sessions=tuple(sessions(directories)),
        notes=tuple(notes),
        source_shape=_source_shape(description),
    )


def sessions(directories: Sequence[Path]) -> list[Session]:
    """Return the starts of a run, oldest first: every process that writes has its own event file.

    Files of the evaluation at the end (`TensorBoardSink.replace`) are no starts; they make the
    start longer that wrote them.
    """
    # not EventFileLoader, which turns every value into a tensor
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found, later = [], []
    for path in sorted(file for directory in directories for file in event_files(directory)):
        times, steps = [], []
        for event in LegacyEventFileLoader(str(path)).Load():
            times.append(event.wall_time)
            # at 0 is the layout of the charts; an evaluation alone may draw masks
            if event.step and any(v.HasField("simple_value") for v in event.summary.value):
                steps.append(event.step)
        if ".at-" in path.name:
            later += times
        elif times:
            found.append(
                Session(
                    began=min(times),
                    ended=max(times),
                    first_step=min(steps, default=None),
                    last_step=max(steps, default=None),
                )
            )
    found.sort(key=lambda session: session.began)
    for time_of_point in later:
        before = [n for n, session in enumerate(found) if session.began <= time_of_point]
        if before:
            last = found[before[-1]]
            found[before[-1]] = dataclasses.replace(last, ended=max(last.ended, time_of_point))
    return found


def _runs_of(path: Path) -> list[Path]:
    """Return the runs that a folder stands for: itself, or those of a quickstart."""
    if holds_iterations(path):
        return [path]
    inside = [path / name for name in QUICKSTART_RUNS if holds_iterations(path / name)]
    return inside or [path]


def _saved(lying: Mapping[int, Path], logged: Mapping[int, Point]) -> Iterator[SavedIteration]:
    """Checkpoints that lie there, and those that were logged and deleted since, oldest first.

    Times come from the event files: those of the files change when they are copied.
    """
    for step in sorted(lying.keys() | logged.keys()):
        path = lying.get(step)
        files = [] if path is None else [f.stat() for f in path.rglob("*") if f.is_file()]
        yield SavedIteration(
            step=step,
            path=path,
            saved_at=logged[step].wall_time if step in logged else None,
            num_bytes=sum(file.st_size for file in files),
        )


def _known(description: Description | None) -> RunDetails:
    """Return what a checkpoint says of its run; nothing before the first checkpoint."""
    return RunDetails() if description is None else description.known


def _tensorboard_of(folder: Path, description: Description | None) -> list[Path]:
    """Return where a run's event files usually are."""
    flags = _known(description).flags
    said, saved = flags.tensorboard_dir, flags.save
    tried = [folder, folder / "tensorboard"]
    if said is not None:
        tried.append(Path(said))
        if saved is not None:  # a run's folders were moved together
            tried.append(folder / os.path.relpath(said, saved))
    for directory in reversed(tried):
        if directory.is_dir() and any(directory.glob(EVENT_FILES)):
            return [Path(os.path.normpath(directory))]
    return []


def _source_shape(description: Description | None) -> ModelShape | None:
    """Return the model before pruning: the run's own, or that of the cut it began from."""
    if description is None:
        return None
    if description.stage == "prune":
        return description.shape
    known = description.known
    if known.source_shape is not None:
        return known.source_shape
    load = known.flags.load
    if load is None:
        return None
    found: ModelShape | None = _if_there(
        lambda: read_description(find_iteration(load)).known.source_shape
    )
    return found


def _then(record: RunRecord) -> Path | None:
    """Return where the continued pretraining of --then-pretrain saves, if it has."""
    file = record.config.get("then_pretrain")
    if record.stage != "prune" or file is None:
        return None
    read = _if_there(lambda: read_yaml(file))
    save = read.get("save") if isinstance(read, Mapping) else None
    return Path(save) if save is not None and holds_iterations(save) else None


def _if_there(read: Callable[[], Any]) -> Any:
    """Return what ``read`` gives; None where the files it needs are gone by now."""
    try:
        return read()
    except (OSError, ValueError) as error:
        logger.info("left out of the report: %s", error)
        return None
