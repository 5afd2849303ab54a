"""One stage of a pipeline: a command that a user would type, run as its own processes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping


def run_stage(
    command: str, flags: Mapping[str, object], *, ranks: int | None = None, use_gpu: bool = False
) -> str:
    """Run a command of megashear, and show what it logs.

    Args:
        command: its name.
        flags: values by flag, with underscores; True for a flag without a value.
        ranks: processes that torchrun starts; None for a command that trains nothing.
        use_gpu: whether ranks may use a GPU; else they compute on the CPU everywhere, for a machine
            with one GPU has none for the second rank.

    Returns:
        What a training command prints for scripts, its summary; "" of another one, which prints
        for the user.

    Raises:
        ValueError: it failed; its own message is above.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = [*(torchrun if ranks else []), "-m", "megashear", command, *as_flags(flags)]
    print(f"$ {shlex.join(['python', *words])}", flush=True)
    done = subprocess.run(
        [sys.executable, *words],
        env=environment(use_gpu=use_gpu),
        stdout=subprocess.PIPE if ranks else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"a stage ended with status {done.returncode}; its message is above")
    return done.stdout or ""


def as_flags(values: Mapping[str, object]) -> list[str]:
    """Return the words of a command line."""
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def environment(*, use_gpu: bool = False) -> dict[str, str]:
    """Return the environment of the ranks."""
    return os.environ | {
        **({} if use_gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        # one thread per rank, and no spinning of ranks that wait for each other
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
