"""Locks that the kernel takes back when their holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

_HELD = (errno.EACCES, errno.EAGAIN)
"""Errors of a lock that another process holds; any other error means that there are no locks."""


def take(handle: int, *, by_process: bool = False) -> bool:
    """Lock an open file or directory without waiting; return False where another holds the lock.

    Args:
        handle: number of the open file.
        by_process: keep the lock from processes that the holder forks; the file must be open for
            writing. Otherwise all that share the open file hold the lock.

    Raises:
        OSError: the file system has no locks.
    """
    lock = fcntl.lockf if by_process else fcntl.flock
    try:
        lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


def is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still at its path: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
