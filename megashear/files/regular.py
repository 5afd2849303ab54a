"""Open only regular files, and only files inside of a directory."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, Literal, overload

from megashear.files.pointers import refuse_pointer

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


class NotRegularError(ValueError):
    """What should be a file is a pipe, a device or a directory; the message names it."""


def check_regular(path: Path | str, name: str | None = None) -> os.stat_result:
    """Refuse a path that is no regular file: reading it could wait or last without end.

    Args:
        path: of the file; a symbolic link stands for what it leads to.
        name: what messages call it; by default the path.

    Returns:
        What the file system says of it.

    Raises:
        NotRegularError: it is a pipe, a device, a socket or a directory.
        OSError: it is not there, or cannot be looked at.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(found.st_mode)), "no file")
        raise NotRegularError(f"{name or path} is {kind}; a regular file is wanted")
    return found


@overload
def open_regular(path: Path | str, name: str | None = None) -> io.BufferedReader: ...


@overload
def open_regular(
    path: Path | str, name: str | None = None, *, buffering: Literal[0]
) -> io.FileIO: ...


def open_regular(
    path: Path | str, name: str | None = None, *, buffering: int = -1
) -> io.BufferedReader | io.FileIO:
    """Open a regular file to read its bytes, never waiting for a writer.

    Args:
        path: of the file; a symbolic link stands for what it leads to.
        name: what messages call it; by default the path.
        buffering: 0 reads from the file system itself.

    Raises:
        NotRegularError: it is a pipe, a device, a socket or a directory.
        ValueError: it is a pointer of Git LFS.
        OSError: it is not there, or cannot be opened.
    """
    check_regular(path, name)

    def opener(path: str, flags: int) -> int:
        # A pipe that took the file's place since would make open() wait for a writer.
        return os.open(path, flags | os.O_NONBLOCK)

    stream: Any = open(path, "rb", buffering=buffering, opener=opener)  # noqa: SIM115
    try:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise NotRegularError(f"{name or path} changed while it was opened; a file is wanted")
        refuse_pointer(path, name)
    except BaseException:
        stream.close()
        raise
    opened: io.BufferedReader | io.FileIO = stream
    return opened


def read_bytes(path: Path | str, max_bytes: int, name: str | None = None) -> bytes:
    """Read a small file whole.

    Args:
        path: of the file.
        max_bytes: the most that is read; a larger file is refused.
        name: what messages call it; by default the path.

    Raises:
        ValueError: it is not there, cannot be read, is no regular file, or is too large.
    """
    name = name or str(path)
    try:
        with open_regular(path, name) as file:
            data = file.read(max_bytes + 1)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise ValueError(
            f"{name} has {max(size, len(data)):,} bytes; a file of its kind has at most "
            f"{max_bytes:,}: is it another file?"
        )
    return data


def inside(directory: Path, name: object, named_by: Path | str) -> Path:
    """Return the path of a file that another file names, which must not lead elsewhere.

    A symbolic link in the directory may lead anywhere, as in a cache of downloads: the user put
    it there, and not who wrote the list.

    Args:
        directory: the user's, or that of the list.
        name: relative to it, as the list spells it.
        named_by: the list, for messages.

    Raises:
        ValueError: the name is no text, empty, absolute or has ``..`` in it.
    """
    if isinstance(name, str) and name and "\0" not in name:
        parts = Path(name).parts
        if parts and ".." not in parts and not Path(name).is_absolute():
            return directory / name
    raise ValueError(
        f"{named_by} names {str(name)[:200]!r}, which is not a file inside of {directory}; refused"
    )
