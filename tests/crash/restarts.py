"""A job under torchrun that is killed -9 and that torchrun itself starts again."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megashear.config import PretrainRun, PruneRun
from tests.crash.attempt import TIMEOUT_S, Kill, Outcome
from tests.crash.phases import Phases

ROOT = Path(__file__).parents[2]


def restarted(
    config: PruneRun | PretrainRun,
    world_size: int,
    log: Path,
    kills: Sequence[Kill],
    killed: Callable[[Kill, str], None],
) -> Outcome:
    """Let torchrun run a job to its end, with a kill in each of its attempts but the last.

    Args:
        config: the run.
        world_size: number of ranks.
        log: file that all output is appended to.
        kills: the first for the first attempt, and so on.
        killed: told of each kill and the phase that it fell in.
    """
    pipe, pickled = log.with_suffix(".pipe"), log.with_suffix(".pickle")
    pickled.write_bytes(pickle.dumps(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    numbers = [f"--nproc-per-node={world_size}", f"--max-restarts={len(kills)}"]
    with Phases(pipe) as phases, log.open("a") as output:
        job = subprocess.Popen(
            [*torchrun, *numbers, "-m", "tests.crash.worker", str(pipe), str(pickled)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            error = _watch(job, phases, list(kills), killed)
        finally:
            job.kill()
            job.wait()
            for pid in phases.pids.values():  # each a session of its own, that of a worker
                if _is_ours(pid, pipe):
                    os.kill(pid, signal.SIGKILL)
    return Outcome(fell=None, error=error, seconds=phases.seconds)


def _watch(
    job: subprocess.Popen[bytes],
    phases: Phases,
    kills: list[Kill],
    killed: Callable[[Kill, str], None],
) -> str | None:
    entries, deadline = 0, time.monotonic() + TIMEOUT_S
    while job.poll() is None:
        for rank, phase in phases.read():
            if not kills or (rank, phase) != (kills[0].rank, kills[0].phase):
                continue
            entries += 1
            if entries == kills[0].entry + 1:
                kill, entries = kills.pop(0), 0
                time.sleep(kill.delay_s)
                for victim in kill.victims:
                    os.kill(phases.pids[victim], signal.SIGKILL)
                phases.read()
                killed(kill, phases.of(kill.rank) or "between")
                deadline = time.monotonic() + TIMEOUT_S
                break
        if time.monotonic() > deadline:
            return f"hangs for {TIMEOUT_S:g} s"
        time.sleep(1e-3)
    phases.read()
    return f"torchrun exits with {job.returncode}" if job.returncode else None


def _is_ours(pid: int, pipe: Path) -> bool:
    try:
        return str(pipe).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
