"""Ends a job in which a rank makes no progress, and names the rank."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import threading
import time
import traceback
import uuid
from types import FrameType, TracebackType

import torch.distributed as dist

from megashear.parallel.agree import broadcast_object

logger = logging.getLogger(__name__)

EXIT_HUNG = 70
"""Exit status of a job in which a rank hung (EX_SOFTWARE of sysexits.h)."""

_KEY = "megashear/hung"
_SLACK_S = 1.0
"""Seconds that the last calls of the store may take."""
_WAITING = (
    os.path.join("torch", "distributed", ""),
    # the host waits for a device, which may wait for another rank
    os.path.join("torch", "cuda", ""),
    # waits for a message of another stage in a method that has no frame of its own
    os.path.join("pipeline_parallel", "p2p_communication.py"),
)
"""Parts of paths of frames in which a rank waits for others."""
_LAUNCHER = os.path.join("torch", "distributed", "elastic", "")
"""Part of paths of the launcher's frames, which are around a whole run."""


class Watchdog:
    """Ends this process when it has reported no progress for too long.

    All ranks of a job that hangs stop together: one does not come, and the others wait for it in a
    collective. Then each rank writes to a store what it does and whether it waits. Ranks that wait
    for no other are named, with their tracebacks, on the stderr of every rank.

    Args:
        store: a store that all ranks share.
        rank: number of this process.
        world_size: number of processes.
        timeout_s: seconds without a `beat` after which a rank counts as hung.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout_s = timeout_s
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._beat = (time.monotonic(), "starting")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Report progress, and what the rank does next ("step 12")."""
        self._beat = (time.monotonic(), doing)

    def __enter__(self) -> Watchdog:
        self.beat("starting")  # time between making and entering the watchdog does not count
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        # a tenth of the time limit is the most that this notices late
        pause = min(self.timeout_s / 10, 10.0)
        while not self._ended.wait(pause):
            since, doing = self._beat
            if time.monotonic() - since > self.timeout_s:
                self._end(doing)

    def _end(self, doing: str) -> None:
        stack = _stack_of(self._main)
        own = {"doing": doing, "waits": _waits(stack), "stack": _printed(stack)}
        hung, silence = self._ask(own)
        if silence is not None:
            hung = [] if own["waits"] else [(self.rank, own)]
            print(f"rank {self.rank} could not ask the others: {silence}", file=sys.stderr)
        where = f"rank {self.rank}: no progress for {self.timeout_s:g} s in {doing}"
        if not hung and silence is not None:
            where += f"; it waits for a rank on the other side, here:\n{own['stack']}"
        elif not hung:
            where += "; every rank that answered waits for another one, this one here:\n"
            where += str(own["stack"])
        for rank, theirs in hung:
            where += (
                f"\nrank {rank} hung in {theirs['doing']}; it waits for no other rank and is "
                f"at:\n{theirs['stack']}"
            )
        print(where, file=sys.stderr, flush=True)
        # not sys.exit: the main thread would not end
        os._exit(EXIT_HUNG)

    def _ask(
        self, own: dict[str, object]
    ) -> tuple[list[tuple[int, dict[str, object]]], str | None]:
        """Return the hung ranks that `_find_hung` found, or why it failed."""
        found: list[list[tuple[int, dict[str, object]]]] = []
        errors: list[str] = []

        def ask() -> None:
            try:
                found.append(self._find_hung(own))
            except Exception as error:  # the host of the store may be down
                errors.append(str(error))

        # in a thread: without a network a call of the store may never return
        asking = threading.Thread(target=ask, name="asks where the others are", daemon=True)
        asking.start()
        asking.join(self._patience_s() + _SLACK_S)
        if found:
            return found[0], None
        unheard = "no answer from where the ranks met; this host may be cut off from the first one"
        return [], next(iter(errors), unheard)

    def _patience_s(self) -> float:
        """Return the seconds in which all other ranks that run will have noticed a hang.

        Their clocks started at their last beats, which are not farther apart than this.
        """
        return self.timeout_s / 2 + 2

    def _find_hung(self, own: dict[str, object]) -> list[tuple[int, dict[str, object]]]:
        """Return the ranks that do not answer in time, or answer that they wait for no other."""
        self.store.set(f"{_KEY}/{self.rank}", json.dumps(own))
        deadline = time.monotonic() + self._patience_s()
        found: dict[int, dict[str, object]] = {}
        while len(found) < self.world_size and time.monotonic() < deadline:
            for rank in range(self.world_size):
                key = f"{_KEY}/{rank}"
                if rank not in found and self.store.check([key]):
                    found[rank] = json.loads(self.store.get(key))
            time.sleep(0.1)
        for rank in range(self.world_size):
            found.setdefault(
                rank,
                {"doing": "an unknown place", "waits": False, "stack": "  it does not answer\n"},
            )
        return [(rank, theirs) for rank, theirs in sorted(found.items()) if not theirs["waits"]]


def collective_timeout_s(minutes: float) -> float:
    """Return the time limit of collectives: more than that of the watchdog, which names ranks."""
    return 90 * minutes + 30


def make_watchdog(rank: int, world_size: int, timeout_s: float) -> Watchdog:
    """Return a watchdog that shares the launcher's store. Collective over the world.

    Without a launcher, and for a process that is alone, the watchdog knows only this process.
    """
    host = os.environ.get("MASTER_ADDR")
    if world_size == 1 or host is None:
        return Watchdog(dist.HashStore(), 0, 1, timeout_s)
    store = dist.TCPStore(
        host,
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=30),
    )
    # the launcher's store outlives restarts, and answers of an earlier attempt do not count
    name = broadcast_object(uuid.uuid4().hex, source=0)
    return Watchdog(dist.PrefixStore(name, store), rank, world_size, timeout_s)


def _stack_of(thread: int) -> list[traceback.FrameSummary]:
    frame: FrameType | None = sys._current_frames().get(thread)
    return [] if frame is None else list(traceback.extract_stack(frame))


def _waits(stack: list[traceback.FrameSummary]) -> bool:
    paths = [entry.filename for entry in stack if _LAUNCHER not in entry.filename]
    return any(part in path for path in paths for part in _WAITING)


def _printed(stack: list[traceback.FrameSummary]) -> str:
    return "".join(traceback.format_list(stack))
