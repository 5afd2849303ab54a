"""Reasons to end a run before its last step: a signal, a time limit, an interval, bad numbers."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from megashear.config import TrainConfig

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that a batch system, a launcher and a keyboard send to end a job."""
DIVERGED = 4
"""Exit status of a run whose loss or weights are not finite."""
_OVER = 0.5
"""Request of a rank whose time is over: below every signal's number, so signals count more."""
REQUESTS = (_OVER, *map(float, SIGNALS))
"""Requests that a rank can make."""


class DivergedError(RuntimeError):
    """Loss or weights are not finite, and more steps would not mend that; equal on all ranks."""


_STARTED = time.monotonic()
"""When this process began, about: a job's time limit counts loading too."""


@dataclass
class Stops:
    """Collects what asks this rank to stop; ranks agree on it once a step.

    Args:
        train: the flags.
    """

    train: TrainConfig
    received: int = 0
    """Number of the first signal received; 0 is none."""
    started: float = _STARTED
    """When the job began, seconds of `time.monotonic`; both parts of a job have one beginning."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests, so that the step is finished and saved."""
        # only the main thread of a process may set handlers
        if not self.train.exit_signal_handler or not _in_main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self) -> float:
        """Return what this rank asks for after a step; ranks then take the greatest request of all.

        Every rank reads its clock: clocks differ, and the first whose time is over counts.
        """
        if self.received:
            return float(self.received)
        limit = 60 * self.train.exit_duration_in_mins
        over = bool(limit) and time.monotonic() - self.started >= limit
        return _OVER if over else 0.0

    def reason(self, request: float, step: int | None) -> str | None:
        """Return why the run ends after ``step`` steps, as ranks agreed; None if it continues.

        Args:
            request: what ranks agreed on.
            step: steps done; None after the last one, where no interval ends what is at its end.
        """
        if request == _OVER:
            return f"--exit-duration-in-mins {self.train.exit_duration_in_mins} is over"
        if request:
            return f"{signal.Signals(int(request)).name} was received"
        if step is not None and self.train.exit_interval and step % self.train.exit_interval == 0:
            return f"--exit-interval {self.train.exit_interval} asks for it"
        return None

    def _receive(self, number: int, frame: object) -> None:
        # launchers send more than one; the first counts
        self.received = self.received or number


def exit_status(request: float) -> int:
    """Return the exit status of the process: 0, or 128 + the signal's number, as in a shell."""
    return 0 if request in (0.0, _OVER) else 128 + int(request)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
