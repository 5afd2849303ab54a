"""List sizes and checksums of a directory's files, so that damage to any file is found."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megashear.files import durable
from megashear.files.regular import (
    NotRegularError,
    check_regular,
    inside,
    open_regular,
    read_bytes,
)

CHECKSUMS = "checksums.txt"
"""The list; `sha256sum -c checksums.txt` reads it too."""

_TITLE = "# sha256 and size of each file, written by megashear; by hand: sha256sum -c " + CHECKSUMS
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\\]+)\n# (\d{1,18}) bytes\n")
_END = re.compile(r"# sha256 of all above: ([0-9a-f]{64})\n")
_LIST_BYTES = 64 * 2**20
"""Largest list that is read, bytes: half a million files."""
_READ_BYTES = 4 * 2**20
"""Bytes read at a time: enough that threads hash beside each other, little beside a model."""


class DamagedError(ValueError):
    """A file is not what was written; the message names it, what it is and what it should be."""


class SaveError(RuntimeError):
    """A checkpoint could not be written: no space, no permission, a disk that fails. Earlier
    checkpoints are untouched."""


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and checksum of a file."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal digest of the content."""


def write(
    directory: Path | str, known: Mapping[str, FileSum] | None = None, *, threads: int = 4
) -> None:
    """List every file below a directory, and sync files, folders and the list to the disk.

    The list replaces an older one in one step. Call it when the last file is written, before the
    directory is renamed to where others see it.

    Args:
        directory: one checkpoint's, or a converted model's.
        known: sums by path inside of ``directory`` (with ``/``) of files that were hashed while
            they were written and are synced already; all others are read here.
        threads: files read at a time.

    Raises:
        OSError: a file cannot be read, or the list not be written.
    """
    directory = Path(directory)
    sums = dict(known or {})
    found = list(_files(directory))
    with ThreadPoolExecutor(threads) as pool:
        rest = [name for name in found if name not in sums]
        sums |= zip(rest, pool.map(lambda name: _sum(directory / name, sync=True), rest))
    missing = sorted(sums.keys() - set(found))
    assert not missing, f"{directory} has no {missing}, which were said to be written"
    for folder in sorted({(directory / name).parent for name in found}):
        durable.sync_directory(folder)
    _write_list(directory, sums)


def add(directory: Path | str, name: str, text: str) -> None:
    """Add a text file to a listed directory: it counts from the moment the new list is there.

    Args:
        directory: with a list.
        name: of the file; not listed yet.
        text: its content.

    Raises:
        DamagedError: there is no whole list.
        OSError: it cannot be written.
    """
    directory = Path(directory)
    sums = read(directory)
    assert name not in sums, f"{name} is listed in {directory} already"
    durable.replace(directory / name, text)
    _write_list(directory, sums | {name: _sum(directory / name)})


def read(directory: Path | str) -> dict[str, FileSum]:
    """Read the list of a directory: sums by path inside of it.

    Raises:
        DamagedError: the list is missing, not as it was written, or names what does not lie in the
            directory.
    """
    path = Path(directory) / CHECKSUMS
    if not path.exists():
        raise DamagedError(f"{path} is missing")
    try:
        text = read_bytes(path, _LIST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise DamagedError(str(error)) from None
    head, _, _ = text.rpartition("# sha256 of all above: ")
    end = _END.fullmatch(text, len(head))
    wanted = end[1] if end else "no line with its own sha256"
    found = hashlib.sha256(head.encode()).hexdigest()
    lines = head.removeprefix(_TITLE + "\n")
    entries = list(_LINE.finditer(lines))
    if end is None or found != wanted or "".join(entry[0] for entry in entries) != lines:
        raise DamagedError(f"{path} is damaged: its sha256 is {found}, it ends with {wanted}")
    try:
        for entry in entries:
            inside(path.parent, entry[2], path)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    return {entry[2]: FileSum(int(entry[3]), entry[1]) for entry in entries}


def verify(
    directory: Path | str,
    names: Iterable[str] | None = None,
    *,
    contents: bool = True,
    threads: int = 4,
) -> None:
    """Compare the files of a directory with its list. Files that are not listed are ignored.

    Args:
        directory: with a list.
        names: which of the listed files; all unless given.
        contents: compare checksums too; otherwise only sizes, which reads no file.
        threads: files read at a time.

    Raises:
        DamagedError: a file is missing, cannot be read, or has another size or checksum; the
            first by name, with what was found and what was written.
    """
    directory = Path(directory)
    sums = read(directory)
    chosen = sorted(sums if names is None else names)
    for name in chosen:  # first: a truncated file is found before hours of reading
        _check_size(directory / name, sums[name])
    if contents:
        with ThreadPoolExecutor(threads) as pool:
            check = pool.map(lambda name: _check_contents(directory / name, sums[name]), chosen)
            list(check)


class HashingFile:
    """A file being written, with its size and checksum; it is synced if no error closes it.

    Hashed are the bytes that were given, so that a disk that stores others is found out when the
    file is verified.

    Args:
        path: file to make.

    Raises:
        OSError: it cannot be made, written or synced.
    """

    def __init__(self, path: Path | str) -> None:
        self._file: BinaryIO = Path(path).open("wb", buffering=_READ_BYTES)  # noqa: SIM115 (own)
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append ``data`` and return its number of bytes."""
        self._file.write(data)
        self._digest.update(data)
        length = memoryview(data).nbytes
        self._size += length
        return length

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Give buffered bytes to the operating system."""
        self._file.flush()

    @property
    def sum(self) -> FileSum:
        """Return size and checksum of all that was written."""
        return FileSum(self._size, self._digest.hexdigest())

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            if kind is None:
                self._file.close()
            else:  # a full disk refuses the rest of the buffer as well
                with contextlib.suppress(OSError):
                    self._file.close()


def _files(directory: Path) -> Iterator[str]:
    """Yield the paths of all files below, without the list."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = (Path(folder) / name).relative_to(directory).as_posix()
            if path not in (CHECKSUMS, f".{CHECKSUMS}.partial"):
                yield path


def _sum(path: Path, *, sync: bool = False) -> FileSum:
    digest, size = hashlib.sha256(), 0
    with open_regular(path, buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            size += len(data)
        if sync:
            os.fsync(file.fileno())
    return FileSum(size, digest.hexdigest())


def _write_list(directory: Path, sums: Mapping[str, FileSum]) -> None:
    lines = []
    for name in sorted(sums):
        line = f"{sums[name].sha256}  {name}\n# {sums[name].size} bytes\n"
        assert _LINE.fullmatch(line), f"{name!r} cannot be listed"
        lines.append(line)
    text = _TITLE + "\n" + "".join(lines)
    own = hashlib.sha256(text.encode()).hexdigest()
    durable.replace(directory / CHECKSUMS, f"{text}# sha256 of all above: {own}\n")


def _check_size(path: Path, wanted: FileSum) -> None:
    try:
        size = check_regular(path).st_size
    except NotRegularError as error:
        raise DamagedError(f"{error}; {wanted.size:,} bytes were written") from None
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing; {wanted.size:,} bytes were written") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    if size != wanted.size:
        raise DamagedError(f"{path} is {size:,} bytes; {wanted.size:,} were written")


def _check_contents(path: Path, wanted: FileSum) -> None:
    try:
        found = _sum(path)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    if found.sha256 != wanted.sha256:
        raise DamagedError(
            f"{path} is damaged: its sha256 is {found.sha256}, {wanted.sha256} was written"
        )
