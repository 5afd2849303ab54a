"""The page of a job that pruned, was stopped, went on and recovered: it says what happened."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megashear.__main__ import main
from megashear.checkpoint.description import find_iteration, read_description
from megashear.checkpoint.store import read_log_alpha
from megashear.monitor import notes
from megashear.report.record import RunRecord, read_runs
from tests import text_run
from tests.ranks import run_ranks
from tests.text_run import TextRun
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)
from tests.unit.report.test_mask_map import images_in

PRUNED, STOPPED, RECOVERED, BATCH = 6, 4, 4, 4
"""Steps of pruning, of its first start, of recovery; sequences of a step."""
SOURCE_LOSS = {"words": 3.0, "paths": 3.5, "numbers": 2.5}
"""As if the source had been evaluated."""
VOID = {"meta", "br", "hr", "img", "input", "link"}
"""Elements of HTML that have no end."""


class Page(HTMLParser):
    """What a test asks of a page: balanced elements, addresses, words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")
            assert not name.startswith("on"), f"a script in {tag} {name}"
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_alone(text: str) -> Page:
    """Hold a page to what it promises: whole, and in need of nothing else."""
    page = Page(text)
    assert not page.names & {"script", "link", "iframe", "object", "embed", "base"}
    inner = {address.removeprefix("#") for address in page.addresses if address.startswith("#")}
    others = [address for address in page.addresses if not address.startswith("#")]
    assert all(address.startswith("data:image/png;base64,") for address in others)
    assert inner <= {*page.ids}
    assert len(page.ids) == len({*page.ids}), "ids are unique"
    assert not re.search(r"@import|url\((?!#)", text)
    assert {*re.findall(r"https?://[^\"'\s<]*", text)} <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }, "names of formats, which nothing fetches"
    return page


@pytest.fixture(scope="module")
def job(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a job: saved, recovered and the event files of both."""
    folder = tmp_path_factory.mktemp("job")
    common = {
        "data_path": str(text.data),
        "reference_loss": str(text.reference),
        "log_interval": 1,
        "eval_interval": 2,
        "eval_sequences": 4,
        "global_batch_size": BATCH,
        "micro_batch_size": 4,
        "seq_length": text_run.SEQUENCE,
        "num_workers": 0,
    }
    then = common | {
        "train_iters": RECOVERED,
        "save": str(folder / "recovered"),
        "tensorboard_dir": str(folder / "tensorboard" / "recovered"),
    }
    (folder / "then.yaml").write_text(yaml.safe_dump(then))
    prune = (
        common
        | text_run.TARGET
        | {
            "load": str(text.checkpoint),
            "train_iters": PRUNED,
            "save": str(folder / "pruned"),
            "tensorboard_dir": str(folder / "tensorboard" / "pruned"),
            "sparsity_warmup_iters": 4,
            "mask_lr": 3.0,  # or no gate would close in so few steps
            "then_pretrain": str(folder / "then.yaml"),
        }
    )
    (folder / "prune.yaml").write_text(yaml.safe_dump(prune))
    argv = ["prune", "--config", str(folder / "prune.yaml")]
    assert run_ranks(1, lambda rank: main([*argv, "--exit-interval", str(STOPPED)])) == [0]
    assert run_ranks(1, lambda rank: main([*argv, "--resume"])) == [0]
    return folder


@pytest.fixture(scope="module")
def written(job: Path) -> str:
    """The page of the job, by the command."""
    output = job / "page.html"
    source = job / "source.json"
    source.write_text(json.dumps({"held-out loss": SOURCE_LOSS}))
    argv = ["report", str(job / "pruned"), "--output", str(output), "--images", str(job / "png")]
    argv += ["--source-loss", str(source)]
    assert run_ranks(1, lambda rank: main(argv)) == [0]
    return output.read_text(encoding="utf-8")


def records_of(*run: Path, **more: Any) -> list[RunRecord]:
    """What is read of runs, by a process of its own."""
    (found,) = run_ranks(1, lambda rank: read_runs(run, **more))
    assert isinstance(found, list)
    return found


def test_a_page_needs_nothing_else(written: str) -> None:
    page = check_alone(written)
    assert {"svg", "table", "figure", "figcaption", "details"} <= page.names
    assert "prefers-color-scheme: dark" in written


@pytest.mark.parametrize(
    "broken",
    [
        '<script src="x.js"></script>',
        '<img src="https://example.org/a.png">',
        "<p>never closed",
        '<a href="#nowhere">a</a>',
        "<style>body { background: url(a.png) }</style>",
        '<p onclick="alert(1)">a</p>',
    ],
)
def test_a_page_that_needs_something_is_noticed(written: str, broken: str) -> None:
    with pytest.raises(AssertionError):
        check_alone(written.replace("</main>", f"{broken}</main>"))


def test_the_records_are_the_jobs(job: Path) -> None:
    pruned, recovered = records_of(job / "pruned")
    assert (pruned.stage, recovered.stage) == ("prune", "pretrain")
    assert (pruned.state, recovered.state) == ("finished", "finished")
    assert [(s.first_step, s.last_step) for s in pruned.sessions] == [(1, STOPPED), (5, PRUNED)]
    assert [(s.first_step, s.last_step) for s in recovered.sessions] == [(1, RECOVERED)]
    assert [saved.step for saved in pruned.iterations] == [STOPPED, PRUNED]
    assert all(saved.saved_at is not None for saved in pruned.iterations)
    first = pruned.iterations[0]
    assert first.path is not None
    assert first.num_bytes == sum(f.stat().st_size for f in first.path.rglob("*") if f.is_file())
    assert (pruned.num_processes, recovered.num_processes) == (1, 1)
    assert pruned.tokens == PRUNED * BATCH * text_run.SEQUENCE
    assert recovered.tokens == RECOVERED * BATCH * text_run.SEQUENCE
    assert pruned.source_shape == recovered.source_shape == text_run.SHAPE
    assert pruned.target_shape == recovered.target_shape
    assert pruned.points == {
        **text_run.scalars(job / "tensorboard" / "pruned"),
        notes.READING: {},  # says that weights hold from their steps on; a text has no points
    }


def test_the_pages_numbers_are_the_files(job: Path, written: str) -> None:
    words = " ".join(Page(written).words)
    cut = read_description(find_iteration(job / "recovered"))
    before, after = text_run.SHAPE.num_params(), cut.shape.num_params()
    for number in (f"{before:,}", f"{after:,}", f"{100 * after / before:.1f} %"):
        assert number in words, number
    losses = cut.details["held_out_loss"]["loss"]
    mean = sum(losses.values()) / len(losses)
    errors = cut.details["held_out_standard_error"]["loss"]
    error = math.hypot(*errors.values()) / len(errors)
    assert f"{mean:.3f} +- {error:.3f} nats per token over all held-out text" in words
    assert f"That is {mean - 3:.3f} above the model before pruning, 3.000." in words
    reference = sum(text_run.REFERENCE.values()) / len(losses)
    assert f"That is {mean - reference:.3f} above the mean of the references" in words
    assert "The masks ha" in words
    assert torch.__version__ in words
    command = ["prune", "--config", str(job / "prune.yaml"), "--resume"]
    assert f"megashear {shlex.join(command)}" in words  # of the last start
    curve = list(text_run.scalars(job / "tensorboard" / "recovered")["train/lm-loss"].values())
    assert f"goes from {curve[0]:.2f} to {curve[-1]:.2f} nats per token" in words
    assert "The run was started 2 times" in words
    assert "--mask-lr" in words  # not at its default
    config = re.findall(r"<pre>(.*?)</pre>", written, flags=re.DOTALL)
    assert len(config) == 4  # of each run, settings and command
    settings = yaml.safe_load(html.unescape(config[0]))
    assert settings["mask_lr"] == 3.0
    assert settings["train_iters"] == PRUNED


def test_the_pages_map_is_the_masks(job: Path, written: str) -> None:
    (log_alpha,) = run_ranks(1, lambda rank: read_log_alpha(job / "pruned"))
    heads, neurons, hidden = images_in(written)[:3]
    layers = text_run.SHAPE.num_layers

    def least(row: Any, keep: int) -> set[int]:
        """Units that go: all but the most open, the first among equal ones."""
        order = sorted(range(len(row)), key=lambda unit: float(row[unit]))
        return {*order[: len(row) - keep]}

    target = text_run.TARGET
    gone = least(log_alpha["layer"][0], target["target_num_layers"])
    assert {*np.flatnonzero(hidden[0, :, 3] == 0).tolist()} == least(
        log_alpha["hidden"][0], target["target_hidden_size"]
    )
    for layer in range(layers):
        closed = least(log_alpha["intermediate"][layer], target["target_ffn_hidden_size"])
        width = text_run.SHAPE.ffn_hidden_size
        wanted = {*range(width)} if layer in gone else closed
        assert {*np.flatnonzero(neurons[layer, :, 3] == 0).tolist()} == wanted
        closed = {*range(8)}
        for group in {*range(4)} - least(log_alpha["group"][layer], 2):
            inside = least(log_alpha["head"][layer * 4 + group], 1)
            closed -= {group * 2 + unit for unit in {0, 1} - inside}
        wanted = {*range(8)} if layer in gone else closed
        assert {*np.flatnonzero(heads[layer, :, 3] == 0).tolist()} == wanted


def test_every_figure_is_a_picture_with_a_sentence(job: Path, written: str) -> None:
    figures = re.findall(r'<figure id="([^"]+)">.*?<figcaption>(.*?)</figcaption>', written, re.S)
    names = [name for name, _ in figures]
    assert {"run1-masks", "run1-loss", "run1-sparsity", "run1-domains", "run1-timeline"} <= {*names}
    assert "run1-settling" in names
    assert {"recovery", "run1-training"} <= {*names}
    assert {"run2-loss", "run2-domains", "run2-timeline", "run2-speed"} <= {*names}
    assert all(re.match(r"[A-Z].{20,}\.$", caption) for _, caption in figures)
    assert {path.stem for path in (job / "png").iterdir()} == {*names}
    for path in (job / "png").iterdir():
        image = Image.open(path).convert("RGB")
        assert image.getpixel((0, 0)) == (255, 255, 255)  # white paper
        assert len(image.getcolors(2**24)) > 3


def test_what_is_there_is_left_alone(
    job: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = str(job / "pruned"), str(job / "page.html")
    assert main(["report", run, "--output", page]) == 2
    assert "page.html exists; add --overwrite to replace it" in capsys.readouterr().err
    other = str(job / "other.html")
    assert main(["report", run, "--output", other, "--images", str(job / "png")]) == 2
    assert "png exists; choose another directory" in capsys.readouterr().err
    assert main(["report", run, "--output", str(job / "a.pdf")]) == 2
    assert "a.pdf ends in '.pdf'; wanted .html" in capsys.readouterr().err
    before = sorted(path.name for path in (job / "pruned").rglob("*"))
    repeated = ["report", run, "--output", page, "--overwrite"]
    repeated += ["--source-loss", str(job / "source.json")]
    assert run_ranks(1, lambda rank: main([*repeated])) == [0]
    again = Path(page).read_text(encoding="utf-8")
    assert re.sub(r"on 20\S+ \S+ UTC", "", again) == re.sub(r"on 20\S+ \S+ UTC", "", written)
    assert sorted(path.name for path in (job / "pruned").rglob("*")) == before


def test_folders_that_moved_together_are_found(job: Path, tmp_path: Path) -> None:
    for name in ("pruned", "tensorboard"):
        shutil.copytree(job / name, tmp_path / "elsewhere" / name)
    shutil.move(job / "tensorboard", job / "hidden")
    try:
        record, *_ = records_of(tmp_path / "elsewhere" / "pruned")
        assert record.tensorboard == (tmp_path / "elsewhere" / "tensorboard" / "pruned",)
        assert [saved.step for saved in record.iterations] == [STOPPED, PRUNED]
    finally:
        shutil.move(job / "hidden", job / "tensorboard")


def test_a_run_without_a_checkpoint_says_so(job: Path, tmp_path: Path) -> None:
    events = shutil.copytree(job / "tensorboard" / "pruned", tmp_path / "events")
    argv = ["report", str(events), "--output", str(tmp_path / "page.html")]
    assert run_ranks(1, lambda rank: main(argv)) == [0]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    words = " ".join(check_alone(text).words)
    assert "The run has saved no checkpoint yet." in words
    assert "running" in words
    assert '<figure id="run-loss">' in text
    assert '<figure id="run-masks">' not in text


def test_a_run_without_event_files_says_so(job: Path) -> None:
    shutil.move(job / "tensorboard", job / "hidden")
    try:
        (record,) = records_of(job / "recovered")
        assert record.events == {}
        assert "a run writes them with --tensorboard-dir" in record.notes[0]
        moved = [job / "hidden" / "recovered"]
        (record,) = records_of(job / "recovered", tensorboard_dirs=moved)
        assert record.events
        assert record.notes == ()
    finally:
        shutil.move(job / "hidden", job / "tensorboard")


@pytest.mark.parametrize("name", ["nowhere", "empty", "text", "converted", "damaged"])
def test_what_is_no_run_is_refused(
    name: str,
    job: Path,
    text: TextRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = {
        "nowhere": "no run at .*nowhere: it is not a directory; give a run's --save",
        "empty": "no run at .*empty: it holds no checkpoint and no event files; give the --save",
        "text": "no run at .*: it holds no checkpoint and no event files",
        "converted": "is a checkpoint of stage 'converted' and no run; `megashear inspect ",
        "damaged": r"no whole checkpoint in .*; tried, newest first: ",
    }[name]
    run = {"text": text.jsonl, "converted": text.checkpoint}.get(name, tmp_path / name)
    if name == "empty":
        run.mkdir()
    if name == "damaged":
        shutil.copytree(job / "pruned", run)
        for file in run.glob("iter_*/*.distcp"):
            file.write_bytes(file.read_bytes()[:-1])
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()


def test_as_many_tensorboard_directories_as_runs_are_wanted(job: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of --tensorboard-dir for 2 runs .* one for each"):
        read_runs([job / "pruned", job / "recovered"], [job / "tensorboard" / "pruned"])
