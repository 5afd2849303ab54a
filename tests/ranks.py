"""Real ranks without GPUs: forked gloo processes that meet through a file."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megashear.parallel import cpu_megatron


def _rank_main(rank: int, world_size: int, store: str, body: Callable, reports: Any) -> None:
    os.setpgrp()  # megatron-core's checkpoint writer starts helpers; they must end with the rank
    # torch makes its pool of threads anew after a fork, and two threads that were the first to ask
    # for it could find none
    torch.set_num_threads(torch.get_num_threads())
    error, result = None, b""
    try:
        meeting = dist.FileStore(store, world_size)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world_size)
        result = pickle.dumps(body(rank))  # bytes: a queued tensor dies with its process
    except BaseException:
        error = traceback.format_exc()
    reports.put((rank, error, result))
    reports.close()
    reports.join_thread()
    # the parent ends all ranks together: one that left now would break the meeting of slower ones
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()


def run_ranks(world_size: int, body: Callable[[int], Any], timeout_s: float = 120.0) -> list:
    """Run ``body(rank)`` in ``world_size`` gloo processes and return the results by rank.

    Forks, so the 5 s import of megatron.core is paid once per test session; meets through a
    file, so no port can collide. The first rank to fail fails the test, with its traceback.
    """
    cpu_megatron.install()
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rest = (world_size, f"{folder}/store", body, reports)
        ranks = [context.Process(target=_rank_main, args=(r, *rest)) for r in range(world_size)]
        for process in ranks:
            process.start()
        try:
            for _ in ranks:
                rank, error, result = _next_report(reports, ranks, results, timeout_s)
                assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
                results[rank] = pickle.loads(result)
        finally:
            for process in ranks:
                assert process.pid is not None  # it was started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _next_report(reports: Any, ranks: list, results: dict, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            return reports.get(timeout=1.0)
        except queue.Empty:
            # a killed rank (out of memory, say) reports nothing
            for rank, process in enumerate(ranks):
                if rank not in results and process.exitcode not in (None, 0):
                    raise AssertionError(f"rank {rank} died: exit {process.exitcode}") from None
    silent = sorted(set(range(len(ranks))) - set(results))
    raise AssertionError(f"ranks {silent} silent for {timeout_s:g} s")
