"""Outputs that cannot be written are one line that names the flag, and exit code 3, at once."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megashear.__main__ import main
from megashear.checkpoint.hold import held
from megashear.commands.outcome import CANNOT_SAVE, USAGE
from tests.ranks import run_ranks
from tests.text_run import SEQUENCE, TextRun

OUTPUTS = {
    "report": ["{run}", "--output", "{out}/x.html"],
    "report-images": ["{run}", "--output", "{run}/x.html", "--images", "{out}/figures"],
    "evaluate": ["--load", "{model}", "--data-path", "{data}", "--output", "{out}/x.json"],
    "reference-loss": ["--losses", "{losses}", "--output", "{out}/deep/x.yaml"],
    "inspect": ["{model}", "--json", "{out}/x.json"],
    "plot-mixture": ["--tensorboard-dir", "{run}/events", "--output", "{out}/x.png"],
    "convert": ["--input", "{model}", "--output", "{out}/x"],
    "cut": ["--load", "{model}", "--output", "{out}/x"],
    "quickstart": ["--short", "--output", "{out}/x"],
    "preprocess": ["--input", "{jsonl}", "--output", "{out}/x", "--tokenizer-model", "{tokenizer}"],
}


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, for root as well."""
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("a folder cannot be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def pretrain(text: TextRun, folder: Path, *more: str) -> tuple[int, str]:
    """Run a few steps; exit code and what it says on stderr but for the log."""

    def body(rank: int) -> tuple[int, str]:
        flags = {
            "load": text.checkpoint,
            "save": folder / "saved",
            "tensorboard-dir": folder / "events",
            "data-path": text.data,
            "train-iters": 3,
            "eval-interval": 0,
            "reweight": "constant",
            "seq-length": SEQUENCE,
            "num-workers": 0,
        }
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = main(["pretrain", *words, *more])
        return status, stderr.getvalue()

    (found,) = run_ranks(1, body)
    return found


@pytest.fixture(scope="module")
def run(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after one step."""
    folder = tmp_path_factory.mktemp("run")
    assert pretrain(text, folder, "--exit-interval", "1")[0] == 0
    return folder


def one_line(said: str, wanted: str) -> None:
    *before, line = said.splitlines()
    assert wanted in line
    assert "Traceback" not in said
    assert not [other for other in before if "error" in other]


@pytest.mark.parametrize("where", ["saved", "events"])
def test_a_run_whose_directory_has_become_read_only_ends_at_once(
    text: TextRun, run: Path, tmp_path: Path, where: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with read_only(folder / where):
        status, said = pretrain(text, folder, "--resume")
    assert status == CANNOT_SAVE == 3
    flag = "--save" if where == "saved" else "--tensorboard-dir"
    one_line(said, f"megashear pretrain: error: {flag} {folder / where}")
    assert "ead-only" in said
    assert pretrain(text, folder, "--resume")[0] == 0  # once it can be written


def test_two_runs_with_one_save_and_renamed_iterations_are_refused(
    text: TextRun, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = sorted((folder / "saved").rglob("*"))
    with held(folder / "saved"):
        status, said = pretrain(text, folder, "--resume")
    assert status == USAGE
    one_line(said, f"held by another run, process {os.getpid()} on ")
    (folder / "saved" / "iter_0000001").rename(folder / "saved" / "iter_0000003")
    shutil.copytree(run / "saved" / "iter_0000001", folder / "saved" / "iter_0000001")
    status, said = pretrain(text, folder, "--resume", "--keep", "1")
    assert status == USAGE
    one_line(said, "iter_0000003 is of step 1, as its megashear.json says: it was renamed")
    (folder / "saved" / "iter_0000001").rename(folder / "saved" / "other")
    (folder / "saved" / "iter_0000003").rename(folder / "saved" / "iter_0000001")
    shutil.rmtree(folder / "saved" / "other")
    assert sorted((folder / "saved").rglob("*")) == before
    assert pretrain(text, folder, "--resume", "--keep", "1")[0] == 0


@pytest.mark.parametrize("obstacle", ["read-only", "file"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_made_is_refused_before_the_work(
    text: TextRun,
    run: Path,
    tmp_path: Path,
    name: str,
    obstacle: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, losses = tmp_path / "out", tmp_path / "losses.json"
    losses.write_text('{"parameters": 1000, "held-out loss": {"a": 2.0}}')
    places = text._asdict() | {"run": run / "saved", "model": text.checkpoint}
    places |= {"out": out, "losses": losses}
    words = [word.format(**places) for word in OUTPUTS[name]]
    words = [word.replace("saved/events", "events") for word in words]
    os.environ.pop("RANK", None)
    with contextlib.ExitStack() as stack:
        if obstacle == "file":
            out.write_text("in the way")
        else:
            out.mkdir()
            stack.enter_context(read_only(out))
        status = main([name.removesuffix("-images"), *words])
    said = capsys.readouterr().err
    assert status == CANNOT_SAVE, said
    one_line(said, f"{out}/")
    assert ("ead-only" if obstacle == "read-only" else "a file is in the way") in said
    assert not (run / "saved" / "x.html").exists()
