"""Where the numbers of a run go: TensorBoard, a file of JSON lines, Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megashear.config import TrainConfig
from megashear.files.output import writing
from megashear.files.structured import parse_json
from megashear.monitor.tensorboard_sink import HISTOGRAM_BINS, TensorBoardSink

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]

STEP = "step"
"""Key of the step, optimizer steps done, in a line of JSON and among the metrics of W&B."""
RUN_ID = "wandb_run_id.txt"
"""File that keeps W&B's name of a run, so that a resumed one goes on with it."""


class Sink(Protocol):
    """Takes what a run measures. Steps are optimizer steps done."""

    takes_images: bool
    """Whether it keeps images and histograms; nobody need draw for one that does not."""
    name: str
    """What the user typed to have it."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take points by tag; a NaN is none."""

    def replace(self, step: int, values: Mapping[str, float]) -> None:
        """Take points that an earlier process may have written at this very step already."""

    def images(self, step: int, values: Mapping[str, Pixels]) -> None:
        """Take images by tag, red, green and blue, [height, width, 3]."""

    def histograms(self, step: int, values: Mapping[str, Floats]) -> None:
        """Take values whose distribution is of interest, by tag, any shape."""

    def flush(self) -> None:
        """Write what is held back, which is lost if this process is killed."""

    def close(self) -> None:
        """Write what is still held back; nothing may follow."""


class Sinks:
    """Several sinks as one; none at all is one that keeps nothing.

    One rank has them, and would be alone with what they raise while the others wait for it: a sink
    that fails is told of and gets nothing more, and training goes on without it.

    Args:
        sinks: those that get everything.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self.name = ", ".join(sink.name for sink in sinks)
        self.takes_images = any(sink.takes_images for sink in self._sinks)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take points by tag; a NaN is none."""
        self._each(lambda sink: sink.scalars(step, values))

    def replace(self, step: int, values: Mapping[str, float]) -> None:
        """Take points that an earlier process may have written at this very step already."""
        self._each(lambda sink: sink.replace(step, values))

    def images(self, step: int, values: Mapping[str, Pixels]) -> None:
        """Take images by tag, red, green and blue, [height, width, 3]."""
        self._each(lambda sink: sink.images(step, values))

    def histograms(self, step: int, values: Mapping[str, Floats]) -> None:
        """Take values whose distribution is of interest, by tag, any shape."""
        self._each(lambda sink: sink.histograms(step, values))

    def flush(self) -> None:
        """Write what is held back, which is lost if this process is killed."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Write what is still held back; nothing may follow."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            with tolerated(f"{sink.name} gets nothing more of this run"):
                act(sink)
                continue
            self._sinks.remove(sink)
        self.takes_images = any(sink.takes_images for sink in self._sinks)


@contextlib.contextmanager
def tolerated(consequence: str) -> Iterator[None]:
    """Tell of what the block raises and go on: for what only one rank does, and no step needs.

    Args:
        consequence: what is missing from now on.
    """
    try:
        yield
    except Exception as error:  # of the disk, of W&B, of a library that draws
        logger.warning("%s: %s: %s", consequence, type(error).__name__, error, exc_info=True)


class JsonLinesSink:
    """Appends a line of JSON for every step that has points: ``{"step": 20, "eval/mean-loss": 2}``.

    It holds scalars only. Points of one step may be in several lines. Half a line that a killed
    process left at the end of the file is removed.

    Args:
        file: made, with its directory, if need be.
        purge_step: first step that this process will write; lines of an earlier process at it or
            later are removed. None keeps all lines.

    Raises:
        ValueError: the file holds something else.
    """

    takes_images = False

    def __init__(self, file: str | Path, *, purge_step: int | None = None) -> None:
        self._path = Path(file)
        self.name = f"--jsonl-log {file}"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._keep(lambda line: purge_step is None or line[STEP] < purge_step)
        self._file = self._path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; numbers that are not finite are left out, for JSON has none."""
        finite = {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
        if finite:
            self._file.write(json.dumps({STEP: step, **finite}) + "\n")

    def replace(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line in place of one of the same step and tags."""
        self._file.close()
        self._keep(lambda line: line[STEP] != step or not line.keys() - {STEP} <= values.keys())
        self._file = self._path.open("a", encoding="utf-8")
        self.scalars(step, values)

    def images(self, step: int, values: Mapping[str, Pixels]) -> None:
        """Images are not kept."""

    def histograms(self, step: int, values: Mapping[str, Floats]) -> None:
        """Histograms are not kept."""

    def flush(self) -> None:
        """Write what is held back."""
        self._file.flush()

    def close(self) -> None:
        """Write what is still held back."""
        self._file.close()

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite the file with the lines for which ``wanted`` holds, in one step."""
        if not self._path.is_file():  # nothing yet, or a pipe
            return
        *whole, last = self._path.read_bytes().split(b"\n")
        if last and not _is_begun(last):
            whole.append(last)
        lines = [(text, self._parse(number, text)) for number, text in enumerate(whole, start=1)]
        beside = self._path.with_name(f"{self._path.name}.tmp")
        with beside.open("wb") as kept:
            kept.writelines(text + b"\n" for text, line in lines if wanted(line))
        beside.replace(self._path)

    def _parse(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line = parse_json(text, str(self._path))
        except ValueError:  # no JSON, or no UTF-8
            line = None
        if not isinstance(line, dict) or not isinstance(line.get(STEP), int):
            raise ValueError(
                f"--jsonl-log {self._path} is no log of a run: line {number} is {text[:40]!r}, "
                f'wanted JSON with a "{STEP}"; nothing in it is changed: choose another file'
            )
        return line


def _is_begun(text: bytes) -> bool:
    """Return whether this is the beginning of a line and not all of it."""
    head = f'{{"{STEP}": '.encode()
    return not text.endswith(b"}") and (text.startswith(head) or head.startswith(text))


class WandbSink:
    """Sends points, images and histograms to a run of Weights & Biases.

    Where it sends them, or that it only keeps them, is W&B's own to know: WANDB_API_KEY,
    WANDB_MODE and the like work as everywhere.

    Args:
        train: whose --wandb-* flags say which run.
        config: of the run, plain values, shown beside it.
        resume: go on with the run whose name an earlier process left behind, if it did.
    """

    takes_images = True

    def __init__(self, train: TrainConfig, config: Mapping[str, Any], *, resume: bool) -> None:
        import wandb

        self.name = f"--wandb-project {train.wandb_project}"
        folder = Path(train.wandb_save_dir or train.tensorboard_dir or train.save or ".")
        # beside the checkpoints that a run is resumed from: other directories may have many runs
        kept = Path(train.save or folder) / RUN_ID
        for directory in (folder, kept.parent):
            directory.mkdir(parents=True, exist_ok=True)
        # an environment variable of W&B's own goes first
        known = kept.read_text(encoding="utf-8").strip() if resume and kept.is_file() else None
        self._wandb = wandb
        self._run = wandb.init(
            project=train.wandb_project,
            entity=train.wandb_entity,
            name=train.wandb_exp_name,
            id=os.environ.get("WANDB_RUN_ID") or known,
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")
        # W&B's own step may not go back, as that of a save that took long does
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send points."""
        known = {tag: value for tag, value in values.items() if not math.isnan(value)}
        if known:
            self._run.log({STEP: step, **known})

    def replace(self, step: int, values: Mapping[str, float]) -> None:
        """Send points; what an earlier process sent cannot be taken back."""
        self.scalars(step, values)

    def images(self, step: int, values: Mapping[str, Pixels]) -> None:
        """Send images."""
        images = {tag: self._wandb.Image(pixels) for tag, pixels in values.items()}
        self._run.log({STEP: step, **images})

    def histograms(self, step: int, values: Mapping[str, Floats]) -> None:
        """Send histograms."""
        counted = {
            tag: self._wandb.Histogram(np_histogram=np.histogram(numbers, bins=HISTOGRAM_BINS))
            for tag, numbers in values.items()
        }
        self._run.log({STEP: step, **counted})

    def flush(self) -> None:
        """W&B's own process writes without being asked."""

    def close(self) -> None:
        """Wait until everything is sent, or written; what fails just now has failed at W&B too."""
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def check_sinks(train: TrainConfig) -> None:
    """Refuse sinks that cannot be opened.

    Args:
        train: whose flags name them.

    Raises:
        ValueError: a library is not installed.
    """
    if train.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb-project {train.wandb_project} needs wandb, which is not installed; "
            f'pip install "megashear[wandb]", or leave the flag out'
        )


def open_sinks(
    train: TrainConfig,
    *,
    first_step: int,
    config: Mapping[str, Any],
    layout: Mapping[str, Mapping[str, Sequence[str]]],
    texts: Mapping[str, str] | None = None,
) -> Sinks:
    """Open the sinks that a run's flags name; for the one rank that writes.

    Args:
        train: whose flags they are.
        first_step: steps done: this process writes from the next one on.
        config: of the run, plain values.
        layout: tags by chart and category, for TensorBoard's custom scalars.
        texts: Markdown by tag, for TensorBoard's text tab.
    """
    return Sinks(list(_named(train, first_step, config, layout, texts or {})))


def _named(
    train: TrainConfig,
    first_step: int,
    config: Mapping[str, Any],
    layout: Mapping[str, Mapping[str, Sequence[str]]],
    texts: Mapping[str, str],
) -> Iterator[Sink]:
    # a run that begins writes a point at step 0, too; one that continues has it
    begin = first_step + 1 if first_step else 0
    if train.tensorboard_dir is not None:
        with writing("--tensorboard-dir", train.tensorboard_dir):
            events = TensorBoardSink(
                train.tensorboard_dir, purge_step=begin, layout=layout, texts=texts
            )
        yield events
    if train.jsonl_log is not None:
        path = Path(train.jsonl_log)
        if first_step == 0 and path.is_file() and path.stat().st_size:
            # a job that was killed before its first save, or another run: nobody can tell
            logger.warning(
                "--jsonl-log %s holds lines already, and this run begins at step 0: they stay, and "
                "its own come behind them",
                path,
            )
        with writing("--jsonl-log", path):
            lines = JsonLinesSink(path, purge_step=begin or None)
        yield lines
    if train.wandb_project is not None:
        # from step 0 on nothing is gone on with, whatever --resume would have liked
        yield WandbSink(train, config, resume=first_step > 0)
