"""Long jobs side by side in threads, under one bar; all stop when one fails."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from tqdm import tqdm

MOST_WORKERS = 4
"""Threads by default, at most: each holds a parameter in memory, and one disk serves all."""


def default_workers() -> int:
    """One thread for each processor core of this process, up to `MOST_WORKERS`."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def run_all(jobs: Sequence[Generator[int, None, None]], workers: int) -> int:
    """Run generators to their ends, ``workers`` at a time, in order.

    Reading, writing and hashing leave the interpreter to others, so threads do.

    Args:
        jobs: each yields after every piece of its work, the bytes it has done.
        workers: threads; 1 runs all in the caller's.

    Returns:
        Sum of what all jobs yielded, bytes.

    Raises:
        ValueError: no worker. Else the error of the first job that failed; the others are closed
            at their next piece, also where the caller is interrupted.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, wanted 1 or more threads")
    if workers == 1:
        return sum(sum(job) for job in jobs)
    stop = threading.Event()

    def run(job: Generator[int, None, None]) -> int:
        done = 0
        with contextlib.closing(job):
            for piece in job:
                done += piece
                if stop.is_set():
                    break
        return done

    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        waiting = [pool.submit(run, job) for job in jobs]
        try:
            done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
            for future in waiting:
                if future in done:
                    future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return sum(future.result() for future in waiting)


@contextlib.contextmanager
def byte_bar(doing: str, num_bytes: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, and what advances it, from any thread.

    Args:
        doing: what it is a bar of.
        num_bytes: where it ends.
        progress: whether to show it; None shows it when stderr is a terminal.
    """
    disable = None if progress is None else not progress  # tqdm's None asks for a terminal
    lock = threading.Lock()
    with tqdm(
        total=num_bytes, desc=doing, unit="B", unit_scale=True, unit_divisor=1024, disable=disable
    ) as bar:

        def advance(done: int) -> None:
            with lock:
                bar.update(done)

        yield advance
