"""Worker processes that end with the process that started them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence

LOOK_S = 1.0
"""Seconds between looks at whether the parent is there."""


def begin_worker(parent: int, ignored: Sequence[signal.Signals] = ()) -> None:
    """Begin a worker process: let it end when its parent is gone, and ignore some signals.

    The parent is named, not asked for, so that a worker ends too whose parent was killed before
    the worker could ask.

    Args:
        parent: number of the process that started the worker.
        ignored: signals that reach all processes of a job, but are for the parent.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
