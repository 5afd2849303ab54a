"""`torchrun -m megashear ...` as a user types it, on this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(
    processes: int, *words: object, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run a command of megashear in several processes to its end.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    # --standalone takes a free port, so that runs at the same time cannot meet
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*start, f"--nproc-per-node={processes}", "-m", "megashear", *map(str, words)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        try:
            stdout, stderr = job.communicate(timeout=timeout_s)
        except BaseException:
            # one that is killed at once would leave its ranks, which are in sessions of their own
            job.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(timeout=60)
            job.kill()
            raise
    return subprocess.CompletedProcess(command, job.returncode, stdout, stderr)
