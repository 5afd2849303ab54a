"""Tokens per second and time left, from a clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How fast a window of steps went."""

    tokens_per_second: float
    """Over all devices; 0 where the window holds no time."""
    tokens_per_second_per_device: float
    """The same, per process."""
    seconds_per_step: float
    """Mean over the window, training alone."""


class Throughput:
    """Meters training over log windows, leaving out evaluations and checkpoints.

    Args:
        num_devices: processes of the run.
        clock: seconds from any origin, never running back.
    """

    def __init__(
        self, *, num_devices: int = 1, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if num_devices < 1:
            raise ValueError(f"num_devices is {num_devices}; a run has at least 1")
        self._num_devices = num_devices
        self._clock = clock
        self._start = clock()
        self._left_out = 0.0  # seconds of the window spent paused
        self._steps, self._tokens = 0, 0
        self._all_seconds, self._all_steps = 0.0, 0  # finished windows
        self._begin = self._start
        self._paused: dict[str, float] = {}  # seconds by what took them

    def step(self, tokens: int) -> None:
        """Count one optimizer step of ``tokens`` tokens, over all devices."""
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Leave out the time of the block: an evaluation, a checkpoint. Not to be nested.

        Args:
            what: name of what takes the time, for :meth:`share`.
        """
        begin = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - begin
            self._left_out += seconds
            self._paused[what] = self._paused.get(what, 0.0) + seconds

    def share(self, what: str) -> float:
        """Return the share of the time since the start that blocks of this name took, 0 to 1."""
        passed = self._clock() - self._begin
        return self._paused.get(what, 0.0) / passed if passed > 0 else 0.0

    def window(self) -> Rate:
        """Rate since the last call, or since the start; begins the next window."""
        now = self._clock()
        seconds = max(now - self._start - self._left_out, 0.0)
        rate = self._tokens / seconds if seconds else 0.0
        result = Rate(
            tokens_per_second=rate,
            tokens_per_second_per_device=rate / self._num_devices,
            seconds_per_step=seconds / self._steps if self._steps else 0.0,
        )
        self._all_seconds += seconds
        self._all_steps += self._steps
        self._start, self._left_out = now, 0.0
        self._steps, self._tokens = 0, 0
        return result

    def eta(self, steps_left: int) -> float | None:
        """Return the seconds that the steps left will take at the mean pace of all windows so far.

        Evaluations and checkpoints still to come are not in it. None before the first window.
        """
        if not self._all_steps:
            return None
        return steps_left * self._all_seconds / self._all_steps
