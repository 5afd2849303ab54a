"""What a run shows is what it is, and showing it changes nothing."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megashear.checkpoint import store
from megashear.checkpoint.description import find_iteration, read_description
from megashear.checkpoint.store import SIDES, read_log_alpha
from megashear.config import PruneRun
from megashear.masks.gates import scores
from megashear.masks.mask_set import MaskSet, expected_gates
from megashear.monitor import tags
from megashear.monitor.mask_pictures import mask_pictures
from megashear.report.kept import MaskReading
from megashear.report.mask_map import cells
from megashear.shape import ModelShape
from megashear.train.pruning import RELAXED
from tests import text_run
from tests.distributed.test_resume import HALF, WHOLE, configuration, finished_tensors, start
from tests.text_run import TextRun
from tests.tiny import layout

KINDS = ("hidden", "head", "group", "intermediate", "layer")
GROUPS = text_run.SHAPE.num_query_groups
TARGET = ModelShape(
    **text_run.SHAPE.to_dict()
    | {name.removeprefix("target_"): size for name, size in text_run.TARGET.items()}
)


class Watched(NamedTuple):
    """A run that logs everything."""

    folder: Path
    events: EventAccumulator
    scalars: dict[str, dict[int, float]]


def watched_configuration(text: TextRun, folder: Path) -> PruneRun:
    config = configuration(text, "prune", layout(tp=2), folder, jsonl_log=str(folder / "run.jsonl"))
    assert isinstance(config, PruneRun)
    return replace(config, masks=replace(config.masks, eval_relaxed_masks=True))


def half_open() -> None:
    """Begin with masks that have closed, open and undecided gates of every kind."""
    make = MaskSet.__init__

    def with_some_closed(masks: MaskSet, *args: Any, **more: Any) -> None:
        make(masks, *args, **more)
        with torch.no_grad():
            for kind, part in masks.parts.items():
                rows = torch.tensor(part.rows)[:, None]
                units = torch.tensor(list(part.units))[None, :]
                # of whole masks, so that every layout begins alike
                masks.log_alpha[kind].copy_(((rows * 31 + units * 17) % 13 - 7) * 0.9)

    MaskSet.__init__ = with_some_closed  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def watched(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    start(watched_configuration(text, folder), 1, half_open)
    reader = EventAccumulator(str(folder / "events"), size_guidance={"images": 0, "histograms": 0})
    reader.Reload()
    return Watched(folder, reader, text_run.scalars(folder / "events"))


def blue_cells(image: bytes, rows: tuple[int, ...], columns: tuple[int, ...]) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)
    cells = pixels[np.ix_(rows, columns)]
    return cells[..., 2] > cells[..., 0]


def test_the_picture_of_a_run_shows_exactly_the_closed_gates_of_its_checkpoint(
    watched: Watched,
) -> None:
    log_alpha = read_log_alpha(watched.folder / "saved")
    is_open = {kind: (gate != 0).numpy() for kind, gate in expected_gates(log_alpha).items()}
    own_gates = is_open["head"].copy()
    stays = is_open["layer"][0][:, None]  # heads and neurons go with their layer
    is_open["group"] &= stays
    is_open["head"] &= is_open["group"].reshape(-1, 1)
    is_open["intermediate"] &= stays
    assert is_open["head"].sum() < own_gates.sum(), "a head goes although its gate is open"
    chances = {kind: scores(values).numpy() for kind, values in log_alpha.items()}
    # of these only where the cells are is looked at
    places = mask_pictures(is_open, chances, rows_per_layer={"head": GROUPS})
    reading = MaskReading.of(log_alpha, text_run.SHAPE, TARGET)
    heads, neurons, _ = cells(reading.expected)
    by_report = {"head": heads != 0, "intermediate": neurons != 0}
    points = watched.scalars
    assert points[tags.ACTUAL_PARAMETERS][WHOLE] == reading.expected.num_params()
    for kind in KINDS:
        images = watched.events.Images(tags.mask_image(kind))
        assert [image.step for image in images] == [2, 4, WHOLE]
        place = places[kind]
        found = blue_cells(images[-1].encoded_image_string, place.rows, place.columns)
        wanted = is_open[kind].reshape(len(place.rows), -1)
        if kind == "hidden":  # sorted
            wanted = np.sort(wanted)[:, ::-1]
        assert (found == wanted).all(), kind
        assert 0 < wanted.sum() < wanted.size, kind
        if kind in ("head", "intermediate"):  # as the report and `inspect` show them
            assert (found == by_report[kind]).all(), kind
        histogram = watched.events.Histograms(tags.log_alpha(kind))[-1].histogram_value
        assert histogram.num == wanted.size
        assert histogram.sum == pytest.approx(float(log_alpha[kind].double().sum()), abs=1e-3)


def test_an_earlier_picture_is_of_other_masks(watched: Watched) -> None:
    first, *_, last = watched.events.Images(tags.mask_image("intermediate"))
    assert first.encoded_image_string != last.encoded_image_string


def test_every_count_has_a_point_at_every_evaluation(watched: Watched) -> None:
    of_kind = (
        *(tags.expected_size, tags.actual_size, tags.target_size),
        *(tags.undecided, tags.churn, tags.rounding),
    )
    for tag in (
        *(name(kind) for name in of_kind for kind in KINDS),
        *(tags.EXPECTED_PARAMETERS, tags.ACTUAL_PARAMETERS, tags.TARGET_PARAMETERS),
        *(tags.RELAXED_MEAN_LOSS, tags.EXACT_MEAN_LOSS, tags.DISCRETISATION_GAP),
    ):
        assert sorted(watched.scalars[tag]) == [2, 4, WHOLE], tag
    assert set(watched.scalars[tags.TARGET_PARAMETERS].values()) == {TARGET.num_params()}
    gap = watched.scalars[tags.DISCRETISATION_GAP][WHOLE]
    exact, expected = (
        watched.scalars[tag][WHOLE] for tag in (tags.EXACT_MEAN_LOSS, tags.EVAL_MEAN_LOSS)
    )
    assert gap == pytest.approx(exact - expected, abs=1e-6)


def test_parts_of_a_step_are_timed(watched: Watched) -> None:
    for part in tags.STEP_PARTS:
        seconds = watched.scalars[tags.part_seconds(part)]
        assert sorted(seconds) == list(range(1, WHOLE + 1))
        assert min(seconds.values()) > 0
    assert min(watched.scalars[tags.MEMORY_RESIDENT].values()) > 0.01  # torch alone has more


def test_lines_of_json_have_the_points_of_tensorboard(watched: Watched) -> None:
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for line in (watched.folder / "run.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for tag, value in values.items():
            assert step not in points[tag], f"{tag} has step {step} twice"
            points[tag][step] = float(np.float32(value))
    assert points == watched.scalars


def test_logging_does_not_change_the_training(
    watched: Watched, text: TextRun, tmp_path: Path
) -> None:
    quiet = configuration(text, "prune", layout(tp=2), tmp_path)
    start(replace(quiet, train=replace(quiet.train, tensorboard_dir=None)), 1, half_open)
    assert not (tmp_path / "events").exists()
    plain, shown = (
        finished_tensors(folder / "saved", WHOLE) for folder in (tmp_path, watched.folder)
    )
    assert plain.keys() == shown.keys()
    assert [name for name in plain if not torch.equal(plain[name], shown[name])] == []
    losses, others = (
        read_description(find_iteration(folder / "saved")).details["held_out_loss"]
        for folder in (tmp_path, watched.folder)
    )
    assert others.keys() - losses.keys() == {RELAXED}
    assert {mode: others[mode] for mode in losses} == losses  # to the last bit


def test_a_checkpoint_without_sides_is_gone_on_with(text: TextRun, tmp_path: Path) -> None:
    def as_before() -> None:
        tensors = store.MaskState.tensors

        def without_sides(state: store.MaskState) -> dict[str, dict[str, torch.Tensor]]:
            found = tensors(state)
            return {k: {n: t for n, t in of.items() if n != SIDES} for k, of in found.items()}

        store.MaskState.tensors = without_sides  # type: ignore[method-assign]

    def config(**train: object) -> PruneRun:
        made = configuration(text, "prune", layout(), tmp_path, resume=True, **train)
        assert isinstance(made, PruneRun)
        return made

    start(config(exit_interval=HALF), 1, as_before)
    start(config(), 1)
    churn = text_run.scalars(tmp_path / "events")[tags.churn("hidden")]
    assert sorted(churn) == [2, 4, WHOLE]


def test_a_new_run_does_not_write_into_anothers_lines(
    watched: Watched, text: TextRun, tmp_path: Path
) -> None:
    config = watched_configuration(text, watched.folder)
    train = replace(config.train, save=str(tmp_path), tensorboard_dir=None)
    wanted = r"--jsonl-log .*run.jsonl exists, and this run resumes no other"
    with pytest.raises(AssertionError, match=wanted):
        start(replace(config, train=train), 1)
