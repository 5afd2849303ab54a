"""`torchrun -m megashear ...` as a user types it, on this machine."""

from __future__ import annotations

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
    return subprocess.run(
        [*start, f"--nproc-per-node={processes}", "-m", "megashear", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
