"""A rank that hangs ends the job, is named, and shows where it hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import time

import torch
import torch.distributed as dist

from megashear.parallel.watchdog import make_watchdog


def read_for_ever():
    time.sleep(600)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with make_watchdog(rank, 2, timeout_s=float(sys.argv[1])) as watchdog:
        for step in range(20):
            watchdog.beat(f"step {step}")
            if rank == 1 and step == 3 and sys.argv[2] == "hang":
                read_for_ever()
            dist.all_reduce(torch.ones(1))
            time.sleep(0.05)
    dist.destroy_process_group()
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_rank_that_hangs_is_named_with_its_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "3", "hang")
    assert done.returncode != 0
    assert "no progress for 3 s in step 3" in done.stderr
    assert "rank 1 hung in step 3; it waits for no other rank and is at" in done.stderr
    assert "in read_for_ever" in done.stderr
    assert "rank 0 hung" not in done.stderr
    assert "exitcode  : 70" in done.stderr


def test_a_job_that_makes_progress_is_left_alone(tmp_path: Path) -> None:
    done = run(tmp_path, "30", "go on")
    assert done.returncode == 0, done.stderr
    assert "no progress" not in done.stderr
