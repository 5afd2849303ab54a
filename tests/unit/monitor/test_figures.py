"""Figures show the points of the event files, and say what is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from megashear.monitor import figures, tags
from megashear.monitor.figures import plot_mixture, read_events, runs_in
from megashear.monitor.notes import READING
from megashear.monitor.tensorboard_sink import TensorBoardSink
from megashear.report.record import sessions

DOMAINS = ("cc", "wiki")


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """A run of ten steps with an evaluation every five, gone on with after the first."""
    for first, last in ((1, 5), (6, 10)):
        sink = TensorBoardSink(tmp_path / "events", purge_step=first if first > 1 else None)
        for step in range(first, last + 1):
            shares = {"cc": 0.2 + step / 100, "wiki": 0.8 - step / 100}
            sink.scalars(step, {tags.mixture_weight(name): shares[name] for name in DOMAINS})
            if step % 5 == 0:
                for name in DOMAINS:
                    sink.scalars(
                        step,
                        {
                            tags.eval_loss(name): 5 - step / 10,
                            tags.eval_error(name): 0.25,
                            tags.eval_excess(name): 1 - step / 10,
                        },
                    )
        sink.close()
    return tmp_path / "events"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were saved."""
    found: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        found.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def test_every_point_is_drawn(events: Path, drawn: list[Figure], tmp_path: Path) -> None:
    plot_mixture([events], tmp_path / "sub" / "mixture.png", title="a run")
    assert (tmp_path / "sub" / "mixture.png").read_bytes()[:4] == b"\x89PNG"
    weights, losses, excess = drawn[0].axes
    wiki, cc = weights.lines  # the heavier one first
    assert [wiki.get_label(), cc.get_label()] == ["wiki", "cc"]
    assert list(cc.get_xdata()) == list(range(1, 11))
    assert cc.get_ydata() == pytest.approx([0.2 + step / 100 for step in range(1, 11)])
    assert list(losses.lines[0].get_xdata()) == [5, 10]
    assert losses.lines[0].get_ydata() == pytest.approx([4.5, 4.0])
    band = losses.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((3.75, 4.75))
    assert excess.lines[1].get_ydata() == pytest.approx([0.5, 0.0])


def test_a_run_without_references_has_two_panels(drawn: list[Figure], tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "events")
    sink.scalars(1, {tags.mixture_weight("cc"): 1.0, tags.eval_loss("cc"): 2.0})
    sink.close()
    plot_mixture([tmp_path / "events"], tmp_path / "mixture.svg")
    assert len(drawn[0].axes) == 2


def test_runs_that_follow_each_other_are_joined(tmp_path: Path) -> None:
    for name, steps in (("a", (1, 2, 3)), ("b", (3, 4))):
        sink = TensorBoardSink(tmp_path / name)
        for step in steps:
            sink.scalars(step, {"x": step + (name == "b") / 2})
        sink.close()
    (run,) = runs_in([tmp_path / "a", tmp_path / "b"])
    assert run.points["x"] == {1: 1.0, 2: 2.0, 3: 3.5, 4: 4.5}


def write_weights(
    folder: Path, weights: dict[int, float], texts: dict[str, str] | None = None
) -> Path:
    sink = TensorBoardSink(folder, texts=texts)
    for step, weight in weights.items():
        sink.scalars(step, {tags.mixture_weight("cc"): weight, tags.eval_loss("cc"): 2.0})
    sink.close()
    return folder


@pytest.mark.parametrize("name", ["events.out.tfevents.9.host.1.0", "of-others.tfevents"])
@pytest.mark.parametrize("kind", ["named pipe", "character device"])
def test_what_is_no_regular_event_file_is_refused_unopened(
    events: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """And the twin: a link to an event file is read."""
    (file,) = sorted(events.iterdir())[:1]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / name).symlink_to(file)
    assert read_events([tmp_path / "linked"])
    assert len(sessions([tmp_path / "linked"])) == 1
    if kind == "named pipe":
        os.mkfifo(events / name)  # nobody writes: a reader that opened it would wait for ever
    else:
        (events / name).symlink_to("/dev/zero")
    wanted = f"the event file {events / name} is a {kind}; a regular file is wanted"
    for read in (read_events, sessions):
        with pytest.raises(ValueError, match=wanted):
            read([events])


def test_runs_that_begin_alike_are_drawn_one_after_the_other(
    drawn: list[Figure], tmp_path: Path
) -> None:
    pruned = write_weights(tmp_path / "pruned", {0: 0.25, 4: 0.5, 6: 0.5})
    small = write_weights(tmp_path / "small", {0: 0.75, 3: 1.0})
    plot_mixture([pruned, small], tmp_path / "mixture.svg")
    weights = drawn[0].axes[0]
    lines = [line for line in weights.lines if line.get_label() == "cc"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 4, 6], [6, 9]]
    assert [list(line.get_ydata()) for line in lines] == [[0.25, 0.5, 0.5], [0.75, 1.0]]
    assert [text.get_text() for text in weights.texts] == ["pruned", "small"]
    (key,) = drawn[0].legends[0].get_texts()
    assert key.get_text() == "cc"
    assert "of all runs together" in drawn[0].axes[-1].get_xlabel()
    with pytest.raises(ValueError, match=r"pruned and .*small both begin at step 0, so they are"):
        read_events([pruned, small])
    with pytest.raises(ValueError, match=r"--tensorboard-dir .*pruned is given twice; leave one"):
        runs_in([pruned, small, pruned])


def test_a_change_is_drawn_where_it_is(drawn: list[Figure], tmp_path: Path) -> None:
    now = write_weights(tmp_path / "now", {0: 0.25, 10: 0.25, 15: 0.5, 20: 0.5})
    before = write_weights(tmp_path / "before", {10: 0.25, 20: 0.5})
    resumed = write_weights(tmp_path / "resumed", {10: 0.25, 20: 0.5}, {READING: "how to read it"})
    for number, (folder, where) in enumerate({now: 15, before: 10, resumed: 20}.items()):
        plot_mixture([folder], tmp_path / f"{number}.svg")
        line = drawn[number].axes[0].lines[0]
        drawn_by = {"steps-post": 0, "steps-pre": 1}[line.get_drawstyle()]
        steps, values = list(line.get_xdata()), list(line.get_ydata())
        jumps = [
            steps[n + 1 - drawn_by] for n in range(len(values) - 1) if values[n] != values[n + 1]
        ]
        assert jumps == [where]


def test_what_cannot_be_drawn_is_refused(
    events: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.png").write_text("do not lose me")
    with pytest.raises(ValueError, match=r"--output .*taken.png exists; choose another"):
        plot_mixture([events], tmp_path / "taken.png")
    with pytest.raises(ValueError, match=r"ends in '.gif'; wanted .png, .pdf or .svg"):
        plot_mixture([events], tmp_path / "mixture.gif")
    with pytest.raises(ValueError, match=r"--tensorboard-dir .*none holds no event files; give"):
        plot_mixture([tmp_path / "none"], tmp_path / "mixture.png")
    sink = TensorBoardSink(tmp_path / "other")
    sink.scalars(1, {"x": 1.0})
    sink.close()
    with pytest.raises(ValueError, match=r"other: no mix/weight/<domain> among the 1 tags"):
        plot_mixture([tmp_path / "other"], tmp_path / "mixture.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "megashear\[report\]"'):
        plot_mixture([events], tmp_path / "mixture.png")


def test_more_domains_than_colours_are_told_apart() -> None:
    numbers = range(len(figures.COLOURS) * len(figures.DASHES))
    styles = {(n % len(figures.COLOURS), n // len(figures.COLOURS)) for n in numbers}
    assert len(styles) == len(numbers)
