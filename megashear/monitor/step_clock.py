"""What the time of a step goes to, by host timers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class StepClock:
    """Seconds of timed steps by part. Parts are apart: one inside another counts for itself alone.

    On a CPU the host does the work, and a step costs a few reads of its clock. On a GPU the host
    only hands work out, so parts mean something only if the device is waited for between them:
    time few steps there.

    Args:
        synchronize: waits until the device has done its work; called at the ends of parts.
        clock: seconds from any origin, never running back.
    """

    def __init__(
        self,
        *,
        synchronize: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._num_steps = 0
        self._is_timing = False
        self._open: list[str] = []  # parts, the innermost last
        self._since = 0.0

    @contextlib.contextmanager
    def step(self, *, is_timed: bool) -> Iterator[None]:
        """Enclose a step, whose parts count if it is timed."""
        self._is_timing = is_timed
        try:
            yield
        finally:
            self._is_timing = False
            self._num_steps += is_timed

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Enclose a part of a step; outside timed steps nothing is done."""
        if not self._is_timing:
            yield
            return
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def window(self) -> dict[str, float]:
        """Return the seconds of a step by part, mean over the timed steps since the last call."""
        steps = max(1, self._num_steps)
        means = {name: seconds / steps for name, seconds in self._seconds.items()}
        self._seconds, self._num_steps = {}, 0
        return means

    def _count(self) -> None:
        """Give the time since the last change of parts to the part that was innermost."""
        self._synchronize()
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
