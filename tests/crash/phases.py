"""What a rank is doing, told to whoever kills it: by wrappers around functions of the product."""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megashear.checkpoint import saver
from megashear.files import integrity
from megashear.train import checkpoints, loop, prepare

PHASES = (
    "start",
    "training",
    "evaluation",
    "weights",
    "checksums",
    "rename",
    "latest",
    "deletion",
    "last losses",
)
"""From the fork to the first step; steps; evaluations; a save's files of weights; its list of
checksums; the rename that makes it visible; the pointer to the latest; deletion of older ones; the
held-out losses that the last checkpoint is given. A later one hides an earlier one: a kill counts
for what a save does in threads, not for what the loop does meanwhile."""
OF_RANK_0 = frozenset(PHASES[4:])
"""Only rank 0 does these."""
BRIEF = frozenset(PHASES[5:])
"""A few calls of the operating system, which a signal from outside would hardly ever meet."""
LINGER_S = 0.004
"""Pause before and after each such call: as long as a slow disk's, and more than a signal takes."""


@dataclass
class Reporter:
    """Writes one line for each phase that begins (+) or ends (-).

    Args:
        pipe: named pipe; lines of all ranks arrive whole and in each rank's own order.
        rank: of this process.
        lingers: whether brief phases are drawn out.
    """

    pipe: Path
    rank: int
    lingers: bool = True
    _file: int = -1
    _here: threading.local = field(default_factory=threading.local)

    def install(self) -> None:
        """Wrap the functions that phases are made of, in this process."""
        self._file = os.open(self.pipe, os.O_WRONLY)
        self.tell("+start")
        self._wrap(loop._Run, "_train_one_step", "training")
        self._wrap(loop._Run, "evaluate", "evaluation")
        self._wrap(saver.ShardedWrite, "write", "weights")
        self._wrap(integrity, "write", "checksums")
        self._wrap(Path, "rename", "rename", only=_makes_visible)
        self._wrap(saver, "name_latest", "latest")
        self._wrap(prepare, "name_latest", "latest")  # a resumed run names where it resumes
        self._wrap(saver, "forget_older", "deletion")
        self._wrap(checkpoints, "amend_description", "last losses", only=lambda *_: self.rank == 0)
        run = loop.Trainer.run

        @functools.wraps(run)
        def started(*args: Any, **kwargs: Any) -> Any:
            self.tell("-start")
            return run(*args, **kwargs)

        loop.Trainer.run = started  # type: ignore[method-assign]
        if self.lingers:
            for name in ("rename", "replace", "fsync"):
                setattr(os, name, self._drawn_out(getattr(os, name)))

    def tell(self, what: str) -> None:
        """Write one line, in one call."""
        os.write(self._file, f"{self.rank} {os.getpid()} {what}\n".encode())

    def _wrap(
        self, owner: Any, name: str, phase: str, *, only: Callable[..., bool] | None = None
    ) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def told(*args: Any, **kwargs: Any) -> Any:
            if only is not None and not only(*args):
                return original(*args, **kwargs)
            self.tell(f"+{phase}")
            self._here.brief = phase in BRIEF
            self._pause()
            try:
                return original(*args, **kwargs)
            finally:
                self._pause()
                self._here.brief = False
                self.tell(f"-{phase}")

        setattr(owner, name, told)

    def _drawn_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._pause()
            result = function(*args, **kwargs)
            self._pause()
            return result

        return call

    def _pause(self) -> None:
        if self.lingers and getattr(self._here, "brief", False):
            time.sleep(LINGER_S)


def _makes_visible(source: Path, target: Path) -> bool:
    return (
        source.suffix == ".partial" and re.fullmatch(r"iter_\d{7,}", Path(target).name) is not None
    )


class Phases:
    """The phases that each rank is in, from their lines.

    Args:
        pipe: where to make the named pipe.
    """

    def __init__(self, pipe: Path) -> None:
        self.pipe = pipe
        os.mkfifo(pipe)
        # for writing too, so that it does not end when the last rank leaves
        self._file = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""
        self.pids: dict[int, int] = {}
        self._active: dict[int, list[str]] = {}
        self._since: dict[tuple[int, str], float] = {}
        self.seconds: dict[str, list[float]] = {}
        """How long each phase took, by phase."""

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self.pipe.unlink()

    def read(self) -> list[tuple[int, str]]:
        """Ranks and phases that began since; does not wait."""
        while True:
            try:
                self._rest += os.read(self._file, 65536)
            except BlockingIOError:
                break
        *lines, self._rest = self._rest.split(b"\n")
        begun = []
        for line in lines:
            rank_word, pid_word, what = line.decode().split(" ", 2)
            rank, pid, phase = int(rank_word), int(pid_word), what[1:]
            if self.pids.get(rank) != pid:  # a new process has this rank
                self.pids[rank], self._active[rank] = pid, []
            if what[0] == "+":
                self._active[rank].append(phase)
                self._since[rank, phase] = time.monotonic()
                begun.append((rank, phase))
            elif phase in self._active[rank]:
                self._active[rank].remove(phase)
                taken = time.monotonic() - self._since[rank, phase]
                self.seconds.setdefault(phase, []).append(taken)
        return begun

    def of(self, rank: int) -> str | None:
        """The phase that a rank is in, of several the last in `PHASES`; None between two."""
        return max(self._active.get(rank, []), key=PHASES.index, default=None)
