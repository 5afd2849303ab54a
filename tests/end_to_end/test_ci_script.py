""".ci/run fails where a step fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = """#!/usr/bin/env bash
echo "$1" >> "$CALLS"
[ "$1" != "$FAILING" ]
"""


def run(folder: Path, failing: str) -> tuple[int, list[str], str]:
    """Exit status, targets made and output, where ``make`` fails for one target."""
    program, calls = folder / "bin" / "make", folder / "calls"
    program.parent.mkdir()
    program.write_text(MAKE)
    program.chmod(0o755)
    own = {"PATH": f"{program.parent}:{os.environ['PATH']}", "CALLS": calls, "FAILING": failing}
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run"],
        env=os.environ | {name: str(value) for name, value in own.items()},
        capture_output=True,
        text=True,
    )
    return done.returncode, calls.read_text().split(), done.stdout


@pytest.mark.parametrize("failing", ["venv", "test", "lint", "quickstart"])
def test_a_step_that_fails_fails_the_whole(tmp_path: Path, failing: str) -> None:
    status, made, output = run(tmp_path, failing)
    assert status != 0
    assert "green" not in output
    # nothing slow is begun after a failure, and lint is not lost behind the tests
    assert ("quickstart" in made) == (failing == "quickstart")
    assert ("test" in made) == (failing != "venv")


def test_it_is_green_where_all_steps_are(tmp_path: Path) -> None:
    status, made, output = run(tmp_path, "nothing")
    assert status == 0
    assert sorted(made) == ["lint", "quickstart", "test", "venv"]
    assert "=== green after" in output
