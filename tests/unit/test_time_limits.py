"""A test that hangs is named and ended, and so are the processes that it started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANGS = """
import multiprocessing, time

def test_waits_for_a_process_that_does_not_end():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    process.join()

def test_comes_after_it():
    pass
"""


def test_a_test_that_hangs_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    words = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "--timeout=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.time_limits", *words, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    # without the hook Python would still wait for the process, and this would end with 100 s
    assert "FAILED test_hangs.py::test_waits_for_a_process_that_does_not_end" in done.stdout
    assert "Failed: Timeout (>0.5s)" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_this_suite_has_a_limit(request: pytest.FixtureRequest) -> None:
    assert float(request.config.getini("timeout")) > 0
