"""Ctrl-C and stopped runs: one line, last, that says what is kept and how to resume."""

import errno
import importlib
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megashear.__main__ import main
from megashear.commands import outcome
from megashear.files.output import UnwritableError
from megashear.train.result import RunResult


def pressed(text: str = "") -> outcome.Main:
    """A command in which somebody presses Ctrl-C."""

    @outcome.user_errors("megashear cut", interrupted="nothing is left")
    def command(argv: Sequence[str]) -> int:
        if text:
            raise KeyboardInterrupt(text)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal did not come")

    return command


def test_ctrl_c_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert pressed()([]) == outcome.INTERRUPTED == 130
    assert capsys.readouterr().err == "megashear cut: interrupted; nothing is left\n"
    assert pressed("3 of 7 files stay")([]) == 130
    assert capsys.readouterr().err == "megashear cut: interrupted; 3 of 7 files stay\n"


def test_ctrl_c_in_a_command_that_is_not_wrapped_is_a_traceback() -> None:
    with pytest.raises(KeyboardInterrupt):
        pressed().__wrapped__([])  # type: ignore[attr-defined]


def test_ctrl_c_while_a_command_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["cut"]) == 130
    assert capsys.readouterr().err == "megashear cut: interrupted before it began\n"


@pytest.mark.parametrize(
    ("error", "status", "wanted"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 3, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), 3, "a/b: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
        (UnwritableError("--output a cannot be written"), 3, "--output a cannot be written"),
    ],
)
def test_what_the_file_system_refuses_is_one_line(
    error: Exception, status: int, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error)([]) == status
    assert capsys.readouterr().err == f"megashear cut: error: {wanted}\n"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "reset"),
        OSError(2**20, "?", "a"),
        OSError(errno.EIO, "Input/output error", "a/b"),  # of a read, as far as anyone knows
        OSError(errno.ESTALE, "Stale file handle", "a/b"),
    ],
)
def test_an_error_of_the_system_that_is_no_file_s_keeps_its_traceback(error: OSError) -> None:
    with pytest.raises(OSError, match=re.escape(str(error.strerror))):
        failing(error)([])


def failing(error: Exception) -> outcome.Main:
    @outcome.user_errors("megashear cut")
    def command(argv: Sequence[str]) -> int:
        raise error

    return command


def test_of_several_ranks_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert pressed()([]) == 130
    outcome.report_stop("megashear prune", STOPPED, resumes=True)
    assert capsys.readouterr().err == ""


STOPPED = RunResult(
    step=7,
    stopped="SIGTERM was received",
    exit_status=143,
    skipped_last=0,
    held_out={},
    held_out_errors={},
    eval_sequences=8,
    evaluation_share=0.12345,
    checkpoint=Path("saved/iter_0000007"),
    tensorboard=None,
)
DONE = replace(STOPPED, stopped=None, exit_status=0)


@pytest.mark.parametrize(
    ("result", "resumes", "wanted"),
    [
        (STOPPED, True, "saved step 7 in saved/iter_0000007; the same command resumes from it"),
        (STOPPED, False, "iter_0000007; the same command with --resume resumes from it"),
        (replace(STOPPED, pruning=DONE), True, "saved step 7 in saved"),
        (replace(STOPPED, checkpoint=None), False, "7 is not saved, because --save is not given"),
        (
            replace(STOPPED, held_out={"loss": {"c": 4.5}}),
            False,
            "the last step, 7, is evaluated and saved in saved/iter_0000007\n",
        ),
    ],
)
def test_a_stopped_run_ends_with_what_is_saved(
    result: RunResult, resumes: bool, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome.report_stop("megashear prune", result, resumes=resumes)
    said = capsys.readouterr().err
    assert said.startswith("megashear prune: stopped because SIGTERM was received; ")
    assert wanted in said
    assert said.count("\n") == 1


def test_a_run_that_is_done_ends_without(capsys: pytest.CaptureFixture[str]) -> None:
    outcome.report_stop("megashear prune", DONE, resumes=True)
    outcome.report_stop("megashear prune", replace(DONE, pruning=DONE), resumes=True)
    assert capsys.readouterr().err == ""
