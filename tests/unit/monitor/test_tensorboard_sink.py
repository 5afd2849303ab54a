"""What is written is read back, at its step, under its tag."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from megashear.monitor import tags
from megashear.monitor.tensorboard_sink import TensorBoardSink


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_scalars_are_read_back_by_step(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (10, 20):
        sink.scalars(step, {tags.LM_LOSS: 2.0 + step, tags.eval_loss("c"): math.nan})
    sink.close()
    assert points(tmp_path, "train/lm-loss") == [(10, 12.0), (20, 22.0)]
    with pytest.raises(KeyError):  # a NaN is no point
        points(tmp_path, "eval/loss/c")


@pytest.mark.parametrize(("purge_step", "values"), [(11, [1.0, 3.0]), (None, [1.0, 2.0, 3.0])])
def test_a_resumed_run_does_not_overlap_itself(
    purge_step: int | None, values: list[float], tmp_path: Path
) -> None:
    first = TensorBoardSink(tmp_path)
    first.scalars(10, {tags.LM_LOSS: 1.0})
    first.scalars(20, {tags.LM_LOSS: 2.0})  # after the last checkpoint, then killed
    first.close()
    second = TensorBoardSink(tmp_path, purge_step=purge_step)
    second.scalars(20, {tags.LM_LOSS: 3.0})
    second.close()
    assert [value for _, value in points(tmp_path, "train/lm-loss")] == values


def test_points_outlive_a_process_that_is_killed_once_they_are_flushed(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 30):
        sink.scalars(step, {tags.LM_LOSS: float(step)})
    sink.flush()  # and not closed
    assert points(tmp_path, "train/lm-loss") == [(step, float(step)) for step in range(1, 30)]


def test_points_of_a_repeated_evaluation_replace_the_earlier_ones(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        sink = TensorBoardSink(tmp_path, purge_step=11)
        if value == 1.0:
            sink.scalars(10, {tags.LM_LOSS: 3.0})
        sink.replace(10, {tags.FULL_MEAN_LOSS: value})
        sink.close()
    assert points(tmp_path, "eval/full-mean-loss") == [(10, 2.0)]
    assert points(tmp_path, "train/lm-loss") == [(10, 3.0)]


def test_images_and_histograms_are_read_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    values = np.array([[-4.0, -4.0], [0.5, 4.0]])
    sink = TensorBoardSink(tmp_path)
    sink.images(20, {tags.mask_image("head"): pixels})
    sink.histograms(20, {tags.log_alpha("head"): values})
    sink.close()
    reader = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "histograms": 0})
    reader.Reload()
    (image,) = reader.Images("prune/mask/head")
    assert image.step == 20
    decoded = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    assert (decoded == pixels).all()
    (histogram,) = reader.Histograms("prune/log-alpha/head")
    found = histogram.histogram_value
    assert (found.min, found.max, found.num, found.sum) == (-4.0, 4.0, 4, -3.5)


def test_charts_name_the_tags_that_stand_in_them(tmp_path: Path) -> None:
    layout = {"a question": {"losses": ["train/lm-loss", "eval/loss/c++"], "rate": ["x"]}}
    sink = TensorBoardSink(tmp_path, layout=layout)
    sink.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    (event,) = reader.Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = found.category
    assert category.title == "a question"
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts.keys() == {"losses", "rate"}
    for tag in layout["a question"]["losses"]:
        matching = [pattern for pattern in charts["losses"] if re.match(pattern, tag)]
        assert len(matching) == 1
        assert not re.match(matching[0], tag + "-ratio")


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = TensorBoardSink(None)
    sink.scalars(1, {tags.LM_LOSS: 1.0})
    sink.replace(1, {tags.LM_LOSS: 1.0})
    sink.flush()
    sink.close()
    assert list(tmp_path.iterdir()) == []
