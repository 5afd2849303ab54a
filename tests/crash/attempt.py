"""One start of a job on forked ranks, ended by kill -9 or by itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from megashear.config import PretrainRun, PruneRun
from megashear.parallel import cpu_megatron
from megashear.train import run
from tests.crash.phases import Phases, Reporter

TIMEOUT_S = 300.0
"""No start of these runs takes as long, however busy the machine."""
GRACE_S = 5.0
"""Between a launcher's SIGTERM to the ranks that are left and its SIGKILL; torchrun has 30 s."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When to kill whom."""

    phase: str
    """When a rank enters this phase,"""
    rank: int
    """this rank,"""
    entry: int
    """for the n-th time since the start, from 0,"""
    delay_s: float
    """and this many seconds have gone by,"""
    victims: tuple[int, ...]
    """these ranks are killed,"""
    notice_s: float
    """and after these seconds the launcher notices and ends the others."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a start of a job ended."""

    fell: str | None
    """Phase in which ranks were killed; None if they were not."""
    error: str | None = None
    """What went wrong before that."""
    seconds: dict[str, list[float]]
    """How long phases took."""
    groups: tuple[int, ...] = ()
    """Process groups of the ranks, if they were killed: what they started may live a little on."""


def attempt(
    config: PruneRun | PretrainRun,
    world_size: int,
    log: Path,
    kill: Kill | None = None,
    broken: Callable[[], None] | None = None,
) -> Outcome:
    """Start a job as torchrun would, on ranks forked from this process.

    Args:
        config: the run.
        world_size: number of ranks.
        log: file that the ranks' output is appended to.
        kill: when to kill whom; None lets it end.
        broken: called in each rank before anything else, to break the product.
    """
    cpu_megatron.install()
    meeting, pipe = log.with_suffix(".meeting"), log.with_suffix(".pipe")
    meeting.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    rest = (world_size, config, log, meeting, pipe, kill is not None, broken)
    ranks: list[BaseProcess] = [
        context.Process(target=_rank_main, args=(rank, *rest)) for rank in range(world_size)
    ]
    with Phases(pipe) as phases:
        for process in ranks:
            process.start()
        outcome = None
        try:
            outcome = _watch(ranks, phases, kill)
            return outcome
        finally:
            if outcome is None or not outcome.groups:
                for process in ranks:
                    end_group(process.pid or 0)
                    process.join()


def _rank_main(
    rank: int,
    world_size: int,
    config: PruneRun | PretrainRun,
    log: Path,
    meeting: Path,
    pipe: Path,
    lingers: bool,
    broken: Callable[[], None] | None,
) -> None:
    os.setpgrp()  # what a rank starts must end with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        if broken is not None:
            broken()
        Reporter(pipe, rank, lingers).install()
        store = dist.FileStore(str(meeting), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        start(config)
        dist.barrier()  # one that leaves early would break the others' last collective
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def start(config: PruneRun | PretrainRun) -> None:
    """What the command calls."""
    if isinstance(config, PruneRun):
        run.prune(config)
    else:
        run.pretrain(config)


def _watch(ranks: list[BaseProcess], phases: Phases, kill: Kill | None) -> Outcome:
    deadline = time.monotonic() + TIMEOUT_S
    entries = 0
    while any(process.exitcode is None for process in ranks):
        for rank, phase in phases.read():
            if kill is not None and (rank, phase) == (kill.rank, kill.phase):
                entries += 1
                if entries == kill.entry + 1:
                    time.sleep(kill.delay_s)
                    return _kill(ranks, phases, kill)
        if failed := {rank: p.exitcode for rank, p in enumerate(ranks) if p.exitcode}:
            return Outcome(fell=None, error=f"exit codes {failed}", seconds=phases.seconds)
        if time.monotonic() > deadline:
            return Outcome(fell=None, error=f"hangs for {TIMEOUT_S:g} s", seconds=phases.seconds)
        time.sleep(1e-3)
    phases.read()
    codes = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
    error = f"exit codes {codes}" if codes else None
    return Outcome(fell=None, error=error, seconds=phases.seconds)


def _kill(ranks: list[BaseProcess], phases: Phases, kill: Kill) -> Outcome:
    # before, so that what a victim did not live to see does not count as an error of its own
    phases.read()
    fell = phases.of(kill.rank)
    for rank in kill.victims:
        os.kill(ranks[rank].pid or 0, signal.SIGKILL)
    for rank in kill.victims:
        ranks[rank].join()
    if kill.rank in kill.victims:
        phases.read()
        fell = phases.of(kill.rank)  # the last that it could tell
    time.sleep(kill.notice_s)
    rest = [process for rank, process in enumerate(ranks) if rank not in kill.victims]
    for process in rest:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in rest:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    groups = tuple(process.pid or 0 for process in ranks)
    return Outcome(fell=fell or "between", seconds=phases.seconds, groups=groups)


def outlived(groups: tuple[int, ...], deadline: float) -> int:
    """How many process groups have members when the monotonic clock is there; then none."""
    while any(map(_lives, groups)) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = [group for group in groups if _lives(group)]
    for group in found:
        end_group(group)
    return len(found)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end_group(group: int) -> None:
    """Kill all members of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
