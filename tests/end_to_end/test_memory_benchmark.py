"""The script that holds a plan to a GPU's allocator runs without one, and says so."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import SOURCE, TARGET

TOOL = Path(__file__).parents[2] / "tools/benchmarks/memory.py"


@pytest.mark.scenario
def test_plan_and_allocator_are_printed_side_by_side(tmp_path: Path) -> None:
    for name, shape in (("source", SOURCE), ("target", TARGET)):
        (tmp_path / name).write_text(json.dumps(dataclasses.asdict(shape)))
    words = ["--shape", tmp_path / "source", "--target-shape", tmp_path / "target", "--bf16"]
    done = subprocess.run(
        [sys.executable, TOOL, *words, "--seq-length", "16", "--steps", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *rows = done.stdout.splitlines()
    assert first == "stage 0: GiB planned, and of the fullest of 1 ranks allocated"
    names = ["lasting", "lasting and the passes", "lasting, in Adam's step"]
    assert [row.strip().split("  ")[0] for row in rows] == names
    assert all(row.endswith("not measured") for row in rows)
