"""Run long jobs in threads, under one bar; all stop when one fails."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from tqdm import tqdm

MOST_WORKERS = 4
"""Most threads by default: each holds a parameter in memory, and all share one disk."""


Result = TypeVar("Result")


class Task(Generic[Result]):
    """A function that runs in a thread of its own and ends with the process, done or not."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._error: BaseException | None = None
        # a daemon: a process that fails must not wait for minutes of work before it ends
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait ``seconds`` at most for the function to end; return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Wait for the function to end and return its value.

        Raises:
            BaseException: what the function raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error


def default_workers() -> int:
    """Return one thread for each processor core of this process, up to `MOST_WORKERS`."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def run_all(jobs: Sequence[Generator[int, None, None]], workers: int) -> int:
    """Run generators to their ends, ``workers`` at a time, in order.

    Threads suffice: reading, writing and hashing release the interpreter.

    Args:
        jobs: generators that yield the bytes of each piece of work when it is done.
        workers: number of threads; 1 runs all jobs in the thread of the caller.

    Returns:
        Sum of what all jobs yielded, bytes.

    Raises:
        ValueError: ``workers`` is less than 1.
        Exception: the error of the first job that failed. The other jobs are closed after their
            current piece, and also when the caller is interrupted.
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
    """Show a bar of bytes, and give the function that advances it from any thread.

    Args:
        doing: the name of the bar.
        num_bytes: bytes at the end of the bar.
        progress: whether to show the bar; None shows it when stderr is a terminal.
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
