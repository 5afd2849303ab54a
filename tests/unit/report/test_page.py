"""Pages hold what they are given and nothing of it is taken for HTML."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megashear.checkpoint.description import Description
from megashear.monitor import tags
from megashear.monitor.figures import Point
from megashear.monitor.tensorboard_sink import TensorBoardSink
from megashear.report import costs
from megashear.report.costs import COSTS
from megashear.report.curves import (
    recovery_figure,
    settling_figure,
    sparsity_figure,
    speed_figure,
    training_figure,
)
from megashear.report.page import (
    PageFigure,
    Section,
    bars,
    cards,
    large,
    moment,
    page,
    paragraph,
    preformatted,
    table,
)
from megashear.report.record import RunRecord, Session, read_run
from megashear.report.story import headline, sections_of, title_of
from megashear.report.write import write_report
from tests.end_to_end.test_report import check_alone
from tests.tiny import PAIRS

NASTY = '<b>"bold"</b> & <script>alert(1)</script>'


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """Event files of a pruning run over a domain whose name is HTML."""
    directory = tmp_path / "<i>run"
    for first, last in ((1, 3), (4, 6)):
        sink = TensorBoardSink(directory, purge_step=first if first > 1 else None)
        for step in range(first, last + 1):
            sink.scalars(
                step,
                {
                    tags.LM_LOSS: 5.0 - step,
                    tags.PENALTY: 0.0,
                    tags.TOKENS_PER_SECOND: 800.0,
                    tags.TOKENS_PER_SECOND_PER_DEVICE: 100.0,
                    tags.expected_sparsity("hidden"): step / 10,
                    tags.target_sparsity("hidden"): 0.5,
                    tags.mixture_weight(NASTY): 0.75,
                    tags.mixture_weight("plain"): 0.25,
                    tags.eval_loss(NASTY): 4.0,
                    tags.EVAL_MEAN_LOSS: 4.5,
                },
            )
        if last == 6:
            sink.replace(6, {tags.FULL_MEAN_LOSS: 4.25})
        sink.close()
    return directory


def test_names_of_domains_and_runs_are_only_names(events: Path, tmp_path: Path) -> None:
    (written,) = write_report([events], output=tmp_path / "page.html", title=NASTY)
    content = written.read_text(encoding="utf-8")
    parsed = check_alone(content)  # no script, and every element ends
    assert "script" not in parsed.names
    assert not {"b", "i"} & parsed.names
    words = " ".join(parsed.words)
    assert f"{NASTY} has most at the end, 75 %" in words
    assert "(<i>run)" in words


def test_a_record_counts_starts_processes_and_steps(events: Path) -> None:
    record = read_run(events)
    assert [(s.first_step, s.last_step) for s in record.sessions] == [(1, 3), (4, 6)]
    assert (record.stage, record.state, record.step) == ("prune", "running", 6)
    assert record.num_processes == 8
    assert record.tokens is None
    assert record.train_iters is None
    assert record.points[tags.FULL_MEAN_LOSS] == {6: 4.25}


def test_the_last_evaluation_counts_to_the_start_that_made_it(events: Path) -> None:
    last = max(point.wall_time for point in read_run(events).events[tags.FULL_MEAN_LOSS].values())
    (*_, session) = read_run(events).sessions
    assert session.ended == last
    for path in events.glob("*.at-6"):
        path.unlink()
    assert read_run(events).sessions[-1].ended < last


def test_a_start_for_the_last_evaluation_alone_is_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = 2 * 86400.0
    now = [1e9]
    monkeypatch.setattr("time.time", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    first = TensorBoardSink(tmp_path, purge_step=1)
    for step in (1, 2):
        passes(60)
        points = {tags.LM_LOSS: 2.0, tags.part_share("evaluation"): 0.5}
        first.scalars(step, points)
    first.close()  # killed in its last evaluation
    passes(queue)
    second = TensorBoardSink(tmp_path, purge_step=3, layout={"1": {"loss": [tags.LM_LOSS]}})
    second.images(2, {"mask": np.zeros((2, 2, 3), dtype=np.uint8)})
    passes(60)
    second.replace(2, {tags.FULL_MEAN_LOSS: 2.0})
    second.close()
    record = read_run(tmp_path)
    assert [(s.first_step, s.last_step) for s in record.sessions] == [(1, 2), (None, None)]
    assert [session.seconds for session in record.sessions] == [120, 60]
    assert record.seconds == 180
    assert record.evaluation_share == pytest.approx(0.5 * 120 / 180)
    assert "no step" in "".join(map(str, sections_of([record], None)[0].parts))


def test_evaluations_share_is_of_all_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1e9]
    monkeypatch.setattr("time.time", lambda: now[0])
    # every start logs the share of its own time so far
    for first_step, seconds, share in ((1, 900.0, 0.1), (3, 100.0, 0.6)):
        sink = TensorBoardSink(tmp_path, purge_step=first_step)
        for step, so_far in ((first_step, 0.9), (first_step + 1, share)):
            now[0] += seconds / 2
            sink.scalars(step, {tags.LM_LOSS: 2.0, tags.part_share("evaluation"): so_far})
        sink.close()
        now[0] += 3600
    record = read_run(tmp_path)
    assert record.evaluation_share == pytest.approx((900 * 0.1 + 100 * 0.6) / 1000)
    assert COSTS["evaluations took"](record) == "15.0 % of the wall time"


@pytest.mark.parametrize(
    ("iteration", "logged", "is_evaluated", "state"),
    [
        (6, 6, True, "finished"),
        (6, 6, False, "running"),  # the last evaluation is still to come, or on its way
        (4, 4, True, "ended early"),
        (4, 4, False, "running"),
        (4, 5, True, "running"),  # with more text behind its early end
    ],
)
def test_a_run_is_at_its_end_with_its_last_evaluation(
    iteration: int, logged: int, is_evaluated: bool, state: str
) -> None:
    details: dict[str, Any] = {"run": {"train": {"train_iters": 6}}}
    if is_evaluated:
        details["held_out_loss"] = {"loss": {"c": 2.0}}
    description = Description(
        shape=PAIRS["multi-head"][0],
        iteration=iteration,
        stage="pretrain",
        token_ids={},
        details=details,
    )
    record = RunRecord(
        name="run",
        save=None,
        description=description,
        events={tags.LM_LOSS: {logged: Point(value=2.0, wall_time=95.0)}},
        sessions=(Session(began=0.0, ended=100.0, first_step=1, last_step=logged),),
        now=101.0,
    )
    assert record.state == state
    later = dataclasses.replace(record, now=1e6)
    assert later.state == {"running": "stopped"}.get(state, state)


def test_a_run_that_is_silent_has_stopped(events: Path) -> None:
    record = read_run(events)
    later = type(record)(**{**vars(record), "now": record.now + 3600})
    assert later.state == "stopped"
    assert ">stopped<" in "".join(headline([later]))
    assert title_of([later, record]) == "Run report: <i>run and <i>run"


def test_a_page_of_nothing_but_curves_has_its_sections(events: Path) -> None:
    names = [section.name for section in sections_of([read_run(events)], None)]
    assert names == ["run", "cost", "words"]


def test_parts_say_what_they_are_given() -> None:
    assert table(["a", "b"], [["<", 1]]).count("&lt;") == 1
    assert 'style="width:25.00%"' in bars([("x", 4, 1)])
    assert '<span class="value">&amp;</span>' in cards([("a", "&", "b")])
    assert moment(0) == "1970-01-01 00:00 UTC"
    section = Section(name="a", title="A & B", parts=[paragraph("c")])
    assert check_alone(page("<t>", [paragraph("lead")], [section], now=0.0))


BLOCK = r"@media{} \{{((?:[^{{}}]*\{{[^{{}}]*\}})*)\s*\}}"
"""Rules of a style sheet that are for some media alone."""
IN_A_BOX = r'<div class="scroll">\s*(?:<div class="drawing">)?<(table|pre|svg)\b.*?</\1>'


def rules_of(css: str) -> dict[str, str]:
    """Return the declarations of each selector of a style sheet without blocks of media."""
    return {
        selector.strip(): declarations
        for selectors, declarations in re.findall(r"([^{}]+)\{([^{}]*)\}", css)
        for selector in selectors.split(",")
    }


def hidden_at_500_px(text: str) -> list[str]:
    """Return what may run out of sight on a narrow page: rules and elements."""
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    (narrow,) = re.findall(BLOCK.format(r" \(max-width: 600px\)"), style)
    lifted = rules_of(narrow)
    found = []
    for selector, rule in rules_of(re.sub(BLOCK.format("[^{]*"), "", style)).items():
        after = lifted.get(selector, "")
        unbroken = "white-space: nowrap" in rule or selector == "pre"
        if unbroken and not re.search(r"white-space: (normal|pre-wrap)", after):
            found.append(f"{selector} is not broken")
        if "min-width" in rule and "min-width" not in after:
            found.append(f"{selector} is too wide")
        if re.search(r"overflow(-x)?: hidden|display: none", rule + after):
            found.append(f"{selector} is cut off")
    rest = re.sub(IN_A_BOX, "", text, flags=re.DOTALL)
    return found + [f"{tag} cannot scroll" for tag in ("table", "pre", "svg") if f"<{tag}" in rest]


@pytest.mark.parametrize(
    ("right", "wrong", "faults"),
    [
        ("", "", []),
        # the twins: every rule and every box is needed
        ("white-space: normal;", "", [".number is not broken"]),
        ("white-space: pre-wrap;", "", ["pre is not broken"]),
        ("min-width: 40px;", "", [".bars td.bar is too wide"]),
        ("overflow-x: auto", "overflow-x: hidden", [".scroll is cut off"]),
        ('class="scroll"', "", [f"{tag} cannot scroll" for tag in ("table", "pre", "svg")]),
    ],
)
def test_a_narrow_page_hides_nothing(
    events: Path, right: str, wrong: str, faults: list[str]
) -> None:
    run = read_run(events)
    more = Section(name="a", title="A", parts=[bars([("x", 4, 1)]), preformatted("b")])
    text = page("t", headline([run]), [*sections_of([run], None), more], now=0.0)
    assert right in text
    assert hidden_at_500_px(text.replace(right, wrong)) == faults


def test_text_that_no_template_wrote_is_escaped() -> None:
    section = Section(name="a", title="A", parts=["<b>part"])  # type: ignore[list-item]
    content = page("t", ["<i>lead"], [section], now=0.0)  # type: ignore[list-item]
    assert "&lt;i&gt;lead" in content
    assert "&lt;b&gt;part" in content
    assert "<b>" not in content


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (950, "950"),
        (41_234, "41.2 k"),
        (3_443_136, "3.44 M"),
        (1_279_104, "1.28 M"),
        (9_999_999, "10.0 M"),
        (999_999, "1.00 M"),
        (6_738_415_616, "6.74 B"),
        (50_331_648_000, "50.3 B"),
    ],
)
def test_large_numbers_have_three_digits(number: float, words: str) -> None:
    assert large(number) == words


def test_a_figure_has_its_name_and_sentence(events: Path) -> None:
    (run, *_) = sections_of([read_run(events)], None)
    drawn = [part for part in run.parts if isinstance(part, PageFigure)]
    assert [part.name for part in drawn] == [
        *("run-loss", "run-sparsity", "run-domains", "run-timeline", "run-speed")
    ]
    assert "farthest at the end are hidden dimensions, 0.600 where 0.500" in drawn[1].caption


def test_runs_that_follow_each_other_are_on_one_axis() -> None:
    runs = [
        {tags.LM_LOSS: {1: 3.0, 4: 4.0}, tags.EVAL_MEAN_LOSS: {4: 4.5}},
        {tags.LM_LOSS: {1: 3.5, 3: 3.25}},
    ]
    figure = recovery_figure(
        runs, [100.0, 10.0], ["pruned", "small"], {"source": 2.75}, xlabel="tokens"
    )
    (panel,) = figure.axes
    lines = {tuple(line.get_ydata()): list(line.get_xdata()) for line in panel.get_lines()}
    assert lines[3.0, 4.0] == [100.0, 400.0]
    assert lines[4.5,] == [400.0]
    assert lines[3.5, 3.25] == [410.0, 430.0]  # from where the first ended, by its own tokens
    assert lines[2.75, 2.75] == [0, 1]  # across
    assert [text.get_text() for text in panel.texts] == ["pruned", "small"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["source, 2.750", "training text", "held-out text"]


def test_rates_norms_utilisation_and_memory_are_the_points() -> None:
    points = {
        tags.LEARNING_RATE: {1: 1e-3, 2: 5e-4},
        tags.MASK_LEARNING_RATE: {1: 1.0, 2: 0.5},
        tags.GRAD_NORM: {1: 2.0, 2: 0.5},
        tags.TOKENS_PER_SECOND: {1: 10.0, 2: 20.0},
        tags.MODEL_FLOPS_UTILISATION: {1: 0.25, 2: 0.5},
        tags.MEMORY_RESERVED: {1: 3.0, 2: 4.0},
    }
    rates, norms = training_figure(points).axes
    assert [list(line.get_ydata()) for line in rates.lines] == [[1e-3, 5e-4], [1.0, 0.5]]
    assert [list(line.get_ydata()) for line in norms.lines] == [[2.0, 0.5]]
    _, utilisation, memory = speed_figure(points).axes
    assert list(utilisation.lines[0].get_ydata()) == [25.0, 50.0]
    assert list(memory.lines[0].get_ydata()) == [3.0, 4.0]


def test_a_run_that_kept_no_command_says_so(tmp_path: Path) -> None:
    def words_of(environment: dict[str, Any] | None) -> str:
        details: dict[str, Any] = {"run": {"train": {"train_iters": 6}}}
        if environment is not None:
            details["environment"] = environment
        description = Description(
            shape=PAIRS["multi-head"][0],
            iteration=6,
            stage="pretrain",
            token_ids={},
            details=details,
        )
        record = RunRecord(name="run", save=None, description=description)
        return "".join(map(str, sections_of([record], None)[1].parts))

    found = {"torch": "2.11", "python": "3.11", "command": ["prune", "--save", "a b"]}
    more = {"processes": 4, "processes on a host": 2}
    assert "kept neither versions nor its command" in words_of(None)
    text = html.unescape(words_of(found | more))
    assert "torchrun --nnodes 2 --nproc-per-node 2 -m megashear prune --save 'a b'" in text
    assert "2.11" in text
    assert "kept neither" not in text
    assert "<pre>megashear prune --save 'a b'</pre>" in html.unescape(words_of(found))


def test_a_run_of_before_says_its_device_in_its_details() -> None:
    def device_of(**details: Any) -> str | None:
        description = Description(
            shape=PAIRS["multi-head"][0], iteration=6, stage="pretrain", details=details
        )
        return costs._device(RunRecord(name="run", save=None, description=description))

    assert device_of(device="H100") == "H100"
    assert device_of(environment={"torch": "2.11"}) is None
    assert device_of(environment={"device": "H200"}) == "H200"


def test_curves_of_masks_are_the_points() -> None:
    kind = "hidden"
    points = {
        tags.expected_sparsity(kind): {1: 0.1, 2: 0.2},
        tags.target_sparsity(kind): {1: 0.15, 2: 0.25},
        tags.actual_size(kind): {2: 30.0},
        tags.undecided(kind): {2: 0.5},
        tags.churn(kind): {2: 0.125},
    }
    asked, expected, closed = sparsity_figure(points, {kind: 40}).axes[0].lines
    assert list(asked.get_ydata()) == [0.15, 0.25]
    assert list(expected.get_ydata()) == [0.1, 0.2]
    assert (list(closed.get_xdata()), list(closed.get_ydata())) == ([2], [0.25])
    undecided, churn = settling_figure(points).axes
    assert list(undecided.lines[0].get_ydata()) == [50.0]
    assert list(churn.lines[0].get_ydata()) == [12.5]


def test_parts_of_a_step_lie_on_each_other() -> None:
    points = {tags.TOKENS_PER_SECOND: {1: 10.0, 2: 20.0}}
    assert len(speed_figure(points).axes) == 1
    for number, part in enumerate(tags.STEP_PARTS, start=1):
        points[tags.part_seconds(part)] = {1: float(number), 2: 1.0}
    fields = speed_figure(points).axes[1].collections
    tops = [max(y for x, y in field.get_paths()[0].vertices if x == 1) for field in fields]
    assert tops == [1.0, 3.0, 6.0, 10.0]
