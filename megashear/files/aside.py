"""Write directories that appear whole or not at all: written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megashear.files import durable, locks
from megashear.files.output import WAYS_OUT, UnwritableError

_SPARE_BYTES = 2**24
"""Free space beyond the weights, bytes: for headers, descriptions, the tokenizer's files."""


@contextlib.contextmanager
def written_aside(output: Path | str) -> Iterator[Path]:
    """Give an empty directory beside ``output`` that becomes ``output`` when the block ends well.

    If the block raises, the directory is removed and ``output`` never existed. A process that is
    killed leaves ``.NAME.partial``, which the next process for the same output removes. While its
    writer lives, the directory is locked. Everything is on the disk before the name appears.

    Raises:
        ValueError: ``output`` exists already: nothing is ever overwritten; another process is
            writing it.
        UnwritableError: the parent cannot be written to, or is full.
    """
    output = Path(output).absolute()
    check_absent(output)
    # On the same file system as the output, or the rename would not be one step.
    aside = output.parent / f".{output.name}.partial"
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(aside))
        except OSError as error:
            _explain(error, output)
            raise
        try:
            yield aside
            _sync(aside)
            check_absent(output)  # rename replaces an empty directory without asking
            aside.rename(output)
            durable.sync_directory(output.parent)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                _explain(error, output)
            raise


def check_absent(output: Path | str) -> None:
    """Refuse an output that exists, before long work for it.

    Raises:
        ValueError: it exists.
    """
    output = Path(output).absolute()
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists; choose another output or remove it first")


def check_space(directory: Path, num_bytes: int) -> None:
    """Refuse an output for which the disk has no room.

    Args:
        directory: where it will be written.
        num_bytes: of the weights.

    Raises:
        ValueError: less is free; both numbers are in the message.
    """
    free, wanted = shutil.disk_usage(directory).free, num_bytes + _SPARE_BYTES
    if free < wanted:
        raise ValueError(
            f"the disk of {directory.parent} has {free / 2**30:.2f} GiB free and the output takes "
            f"{wanted / 2**30:.2f} GiB; free some, choose another output or a smaller --dtype"
        )


def forget(handle: int, begin: int, num_bytes: int) -> None:
    """Let the kernel drop its copy of part of a file that this process needs no longer.

    Without this advice the kernel drops copies of other files too, slowly, once memory is full. Of
    a file that was written, it also gathers gigabytes for the sync at the end to wait for; with the
    advice it begins to write them to the disk now.

    Args:
        handle: number of the open file.
        begin: first byte of the part.
        num_bytes: length of the part, bytes.
    """
    with contextlib.suppress(OSError):  # advice: some file systems take none
        os.posix_fadvise(handle, begin, num_bytes, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _locked(aside: Path) -> Iterator[None]:
    """Make an empty ``aside`` and hold its lock, which the kernel frees if the process dies."""
    for _ in range(2):
        with contextlib.suppress(FileExistsError):
            aside.mkdir()
        handle = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(handle, aside)
            if not locks.is_at(handle, aside):
                continue  # its writer ended meanwhile
            for path in aside.iterdir():  # of one that was killed
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield
            return
        finally:
            os.close(handle)
    raise ValueError(f"{aside} changes hands; another process writes the same output")


def _lock(handle: int, aside: Path) -> None:
    try:
        is_taken = locks.take(handle)
    except OSError:
        # without locks, what another process may be writing is not touched
        if any(aside.iterdir()):
            raise ValueError(
                f"{aside} was left by a process that was killed, or one is still writing it, which "
                f"this file system cannot tell; remove it if none is"
            ) from None
        return
    if not is_taken:
        raise ValueError(
            f"another process is writing {aside}; wait for it, end it, or choose another output"
        )


def _explain(error: OSError, output: Path) -> None:
    """Raise an error with the way out of a write that failed; return where there is none."""
    way_out = WAYS_OUT.get(error.errno or 0)
    if way_out is not None:
        raise UnwritableError(f"cannot write {output}, nothing of it is left: {way_out}") from error


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        else:
            durable.sync_directory(path)
    durable.sync_directory(directory)
