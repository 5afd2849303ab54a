"""Hold a run's checkpoint directory for one run at a time, with names that agree with contents."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megashear.checkpoint.description import MisnamedError, check_name, iterations
from megashear.checkpoint.saver import forget_partial
from megashear.files import locks
from megashear.files.structured import parse_json
from megashear.parallel.agree import raise_together
from megashear.parallel.groups import ParallelGroups

logger = logging.getLogger(__name__)

LOCK = ".megashear.lock"
"""File in --save that names the run that holds it, locked while that run lives."""
_PATIENCE_S = 5.0
"""Seconds to wait for an owner that is ending."""
_LEASE_S = 100.0
"""Seconds to wait for an owner on another host, which may be gone: a Linux server of NFSv4 keeps
the locks of a host that is gone for 90 s (nfsd's lease time)."""
_PAUSE_S = 0.05


@contextlib.contextmanager
def held_together(roots: Sequence[Path | str | None], groups: ParallelGroups) -> Iterator[None]:
    """Hold directories for one run, by rank 0 for all ranks. Collective over the world.

    Args:
        roots: checkpoint directories, made if need be; None stands for none.
        groups: where this rank stands.

    Raises:
        ValueError: on every rank: another run holds one, or it has names that contradict what
            they hold.
        SaveError: on every rank: one cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        for root in roots:
            if root is None:
                continue
            with raise_together(task=f"--save {root}"):
                if groups.rank == 0:
                    stack.enter_context(held(Path(root)))
        yield


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold a directory against other runs, and remove what killed saves left in it.

    The kernel takes the lock back when the process ends, however it ends; processes that it forked
    do not hold the lock.

    Raises:
        ValueError: another run holds it, or a name in it contradicts what it holds.
        OSError: it cannot be made or written.
    """
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    handle = _take(root)
    try:
        check_names(root)
        forget_partial(root)
        yield
    finally:
        with contextlib.suppress(OSError):
            (root / LOCK).unlink()  # first, so that the next run makes a file of its own
        os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):
                root.rmdir()  # nothing was saved


def check_names(root: Path) -> None:
    """Refuse iterations that were renamed, before anything is moved or deleted by its name.

    Raises:
        ValueError: one is named for another step than it is of.
    """
    for path in iterations(root).values():
        try:
            check_name(path)
        except MisnamedError as error:
            raise ValueError(f"--save {root}: {error}") from None
        except (ValueError, OSError):
            continue  # damaged, or a disk that fails: refused later if the run needs the iteration


def _take(root: Path) -> int:
    """Lock the file of a directory, write its owner into it, and return the open file's number."""
    path, start, is_told = root / LOCK, time.monotonic(), False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        owner = _owner(handle)
        is_taken = _lock(handle, owner)
        if is_taken and locks.is_at(handle, path):
            break
        os.close(handle)
        waited, is_elsewhere = time.monotonic() - start, _is_elsewhere(owner)
        if not is_taken and waited > _PATIENCE_S and is_elsewhere and not is_told:
            logger.warning(
                "--save %s is held by %s; waiting %g s for that host's locks to run out, in case "
                "it is gone",
                *(root, _name(owner), _LEASE_S),
            )
            is_told = True
        if not is_taken and waited > (_LEASE_S if is_elsewhere else _PATIENCE_S):
            raise ValueError(
                f"--save {root} is held by another run, {_name(owner)}; wait for it, end it, or "
                f"choose another --save; if that run is gone, remove {path}"
            )
        time.sleep(_PAUSE_S)
    if owner:
        logger.warning(
            "--save %s was held by a run that did not end well, %s; if it is still there, end one "
            "of the two",
            *(root, _name(owner)),
        )
    own = {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(own).encode() + b"\n", 0)
    return handle


def _lock(handle: int, owner: dict[str, Any]) -> bool:
    try:
        # a process that a killed rank forked must not hold the lock
        return locks.take(handle, by_process=True)
    except OSError:  # without locks, a process of this host can be asked for
        return not (owner.get("host") == socket.gethostname() and _lives(owner))


def _owner(handle: int) -> dict[str, Any]:
    """Return the owner that the lock file names; empty where the file is new or half written."""
    try:
        found = parse_json(os.pread(handle, 4096, 0), "the lock")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "which has not said yet who it is"
    job = f" (job {owner['job']})" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"


def _is_elsewhere(owner: dict[str, Any]) -> bool:
    return owner.get("host", socket.gethostname()) != socket.gethostname()


def _lives(owner: dict[str, Any]) -> bool:
    pid, started = owner.get("pid"), owner.get("started")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # containers start to count anew: the number may be another process's by now
    return started is None or _started(pid) in (None, started)


def _started(pid: int) -> int | None:
    """Return when a process began, in ticks since its host began; None if unknown."""
    try:
        # the second field, a name in brackets, may have spaces; the 22nd is the start
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
