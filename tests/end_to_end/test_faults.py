"""torchrun with ranks that fail: who failed is said, a restart resumes, a signal saves first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megashear.checkpoint.description import latest_iteration
from tests.end_to_end.torchrun import ROOT
from tests.text_run import SEQUENCE, TextRun

SCRIPT = """
import os
import sys
import time

from megashear.__main__ import recorded_main
from megashear.train import step as train_step


def fail_at(step, how):
    if os.environ["RANK"] != "1" or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    original, calls = train_step.ready_gradients, [0]

    def a_rank_that_fails(optimizer):
        calls[0] += 1
        if calls[0] == step:
            how()
        return original(optimizer)

    train_step.ready_gradients = a_rank_that_fails


def raise_error():
    raise ZeroDivisionError("this rank has had enough")


if __name__ == "__main__":
    if sys.argv.pop(1) == "raise":
        fail_at(4, raise_error)
    else:
        original = train_step.ready_gradients
        train_step.ready_gradients = lambda optimizer: (time.sleep(0.2), original(optimizer))[1]
    raise SystemExit(recorded_main())
"""


def command(text: TextRun, folder: Path, how: str, steps: int, *agent: str) -> list[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    run = {
        "load": text.checkpoint,
        "save": folder / "saved",
        "save-interval": 2,
        "data-path": text.data,
        "train-iters": steps,
        "eval-interval": 0,
        "reweight": "constant",
        "seq-length": SEQUENCE,
        "global-batch-size": 4,
        "num-workers": 2,
    }
    flags = [word for key, value in run.items() for word in (f"--{key}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*torchrun, *agent, str(script), how, "pretrain", *flags, "--resume"]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.scenario
def test_an_error_is_shown_with_its_rank_and_a_restart_resumes(
    text: TextRun, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        command(text, tmp_path, "raise", 6, "--max-restarts=1"),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError: this rank has had enough" in done.stderr
    assert "resuming" in done.stderr
    assert "at step 2" in done.stderr
    assert latest_iteration(tmp_path / "saved") == 6


@pytest.mark.scenario
def test_an_error_that_is_not_restarted_ends_the_job_and_names_the_rank(
    text: TextRun, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        command(text, tmp_path, "raise", 6),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in report
    assert "in a_rank_that_fails" in report
    assert "ZeroDivisionError: this rank has had enough" in report


@pytest.mark.scenario
def test_a_signal_to_every_process_of_a_job_saves_before_it_ends(
    text: TextRun, tmp_path: Path, environment: dict[str, str]
) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        job = subprocess.Popen(
            command(text, tmp_path, "slowly", 500),
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 200
            while latest_iteration(tmp_path / "saved") is None and job.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            before = latest_iteration(tmp_path / "saved")
            os.killpg(job.pid, signal.SIGTERM)  # launcher, ranks and their readers
            job.wait(timeout=100)
        finally:
            job.kill()
    said = (tmp_path / "stderr").read_text()
    assert "SIGTERM was received" in said, said
    after = latest_iteration(tmp_path / "saved")
    assert before is not None
    assert after is not None
    assert before <= after < 500
    assert f"step {after}: stopping" in said
    assert job.returncode != 0
