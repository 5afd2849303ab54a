"""Say why an output cannot be written, before work is spent on it where that can be known."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

WAYS_OUT = {
    errno.ENOSPC: "the disk is full; free space, or choose an output on another disk",
    errno.EDQUOT: "the quota is used up; free space, or choose an output outside of it",
    errno.EFBIG: "a file would be longer than this process or file system may write (ulimit -f)",
    errno.EACCES: "this user may not write there; choose another output",
    errno.EPERM: "this user may not write there; choose another output",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EEXIST: "a file is in the way of a directory; choose another output",
    errno.ENOTDIR: "a file is in the way of a directory; choose another output",
    errno.ENAMETOOLONG: "its name is too long; choose a shorter one",
    errno.EIO: "the disk fails; choose an output on another one",
    errno.ESTALE: "the file system of another host has changed; choose another output",
}
"""Errors of writing that a user can correct, and how."""


class UnwritableError(ValueError):
    """An output cannot be written: no room, no permission, a disk that is read-only or fails."""


@contextlib.contextmanager
def writing(flag: str, path: Path | str) -> Iterator[None]:
    """Run a block that writes an output, and name the output in errors of the file system.

    Args:
        flag: what the user typed to name the output.
        path: of the output.

    Raises:
        UnwritableError: in place of an OSError that a user can correct.
    """
    try:
        yield
    except OSError as error:
        if (way_out := WAYS_OUT.get(error.errno or 0)) is None:
            raise
        raise UnwritableError(f"{flag} {path} cannot be written: {way_out}") from error


def check_new_file(flag: str, path: Path | str) -> None:
    """Refuse a file to write that exists or cannot be made, before work is spent on it.

    Args:
        flag: what the user typed to name it.
        path: of the file.

    Raises:
        ValueError: it exists, or cannot be made.
    """
    if Path(path).exists():
        raise ValueError(f"{flag} {path} exists; choose another or remove it first")
    check_writable(flag, path)


def check_writable(flag: str, path: Path | str, *, into: bool = False) -> None:
    """Refuse an output that cannot be made where it shall be, before work is spent on it.

    Args:
        flag: what the user typed to name it.
        path: of a file or directory to make; directories on the way to it need not be there.
        into: whether it is a directory that may be there, to write files into.

    Raises:
        UnwritableError: the nearest directory that is there does not take a new name.
    """
    whole = Path(path).absolute()
    for parent in (whole, *whole.parents) if into else whole.parents:
        try:
            is_there = os.path.lexists(parent)
        except OSError:
            is_there = False
        if not is_there:
            continue
        with writing(flag, path):
            if not parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
            if not os.access(parent, os.W_OK | os.X_OK):
                number = errno.EROFS if os.statvfs(parent).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(number, os.strerror(number), str(parent))
        return
