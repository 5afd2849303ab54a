"""Journal of what an unfinished run of preprocessing has done, so that the next run resumes there.

Beside the unfinished files lies a folder with one JSON file for each domain. It lists, for every
input file that was read to its end and for the one being read, how long the outputs were then: a
run that resumes first cuts off what lies after the last of these places. The outputs are on the
disk before the journal says so, and the journal changes in one step, so a run may be killed
anywhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megashear.files import durable, locks
from megashear.files.structured import read_json_object

logger = logging.getLogger(__name__)

FOLDER = ".progress"
"""Name of the journal's folder; no domain's name begins with a dot."""
SETTINGS_NAME = "settings"
LOCK_NAME = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class SideState:
    """State of one written side of a domain."""

    documents: int = 0
    """Number of documents in the ``.bin``."""
    tokens: int = 0
    """Number of tokens in the ``.bin``."""
    largest_id: int = -1
    """Largest id in the ``.bin``."""
    largest_id_at: int = -1
    """Number of the first token with the largest id, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainState:
    """State of a written domain."""

    train: SideState = SideState()
    """State of the training side."""
    held_out: SideState = SideState()
    """State of the held-out side."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of documents left out, by reason."""
    text_bytes: int = 0
    """Size of the texts tokenised, bytes of UTF-8."""
    pretokenised: int = 0
    """Number of documents that came as tokens."""
    lone_surrogates: int = 0
    """Number of halves of surrogate pairs that were replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Point of a domain's input, and the state of its output there."""

    file: str
    """Absolute path of the input file."""
    size: int
    """Size of the file, bytes."""
    mtime_ns: int
    """Time of the file's last change."""
    chunks: int | None
    """Number of the file's chunks that are written; None where it was read to its end."""
    state: DomainState
    """State of everything written up to here, of this file and those before it."""

    @classmethod
    def of(cls, file: Path, chunks: int | None, state: DomainState) -> Place:
        """Return the place after ``chunks`` chunks of ``file``, or at its end."""
        found = file.stat()
        return cls(
            file=str(file.absolute()),
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            chunks=chunks,
            state=state,
        )

    def is_in(self, file: Path) -> bool:
        """Return whether ``file`` is the one that was read: equal path, size and time of change."""
        found = file.stat()
        return (self.file, self.size, self.mtime_ns) == (
            str(file.absolute()),
            found.st_size,
            found.st_mtime_ns,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """What is known of one domain."""

    places: tuple[Place, ...] = ()
    """Ends of the input files that were read, in order; the last place may lie within its file."""
    counts: dict[str, Any] | None = None
    """Fields of the domain's DomainCounts; None while the domain is unfinished."""

    def fitting(self, files: Sequence[Path]) -> tuple[Place, ...]:
        """Return the places up to the first one that does not fit its file in ``files``."""
        fitting = []
        for place, file in zip(self.places, files):
            if not place.is_in(file):
                break
            fitting.append(place)
        return tuple(fitting)


def read_journal(directory: Path, name: str) -> Journal:
    """Read the journal of a domain; return an empty one where there is none."""
    path = directory / FOLDER / f"{name}.json"
    if not path.is_file():
        return Journal()
    # Read at any size, for we wrote it: some 420 bytes for each input file.
    content = read_json_object(path, max_bytes=path.stat().st_size)
    places = []
    try:
        for place in content["places"]:
            state = place.pop("state")
            train, held_out = SideState(**state.pop("train")), SideState(**state.pop("held_out"))
            state = DomainState(train=train, held_out=held_out, **state)
            places.append(Place(**place, state=state))
        return Journal(places=tuple(places), counts=content["counts"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say what a run of megashear preprocess has done: {error}; delete "
            f"{directory} to begin anew"
        ) from None


def write_journal(directory: Path, name: str, journal: Journal) -> None:
    """Replace the journal of a domain in one step."""
    durable.replace(directory / FOLDER / f"{name}.json", json.dumps(asdict(journal)))


@contextlib.contextmanager
def unfinished(directory: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold ``directory``, new or left by an earlier run, for a run with these settings.

    If the block raises before anything worth keeping was written, the directory is removed.

    Args:
        directory: directory to hold; made if it does not exist.
        settings: everything that the output depends on besides its input; fit for JSON.

    Raises:
        ValueError: another run is writing there, or a run with other settings left the directory.
        KeyboardInterrupt: raised again; its text says what is kept.
    """
    folder = directory / FOLDER
    if directory.exists() and not folder.is_dir():
        raise ValueError(
            f"{directory} exists and was not left behind by a run of megashear preprocess; move it "
            f"away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as lock:
        _lock(lock.fileno(), directory)
        _check_settings(folder / SETTINGS_NAME, settings, directory)
        try:
            yield
        except BaseException as error:
            names = [path.stem for path in folder.glob("*.json")]
            is_kept = any(_is_kept(directory, name) for name in names)
            if not is_kept:
                shutil.rmtree(directory)
            kept = (
                f"what is done so far stays in {directory}; the same command resumes there"
                if is_kept
                else "nothing that could be kept was done yet; the same command begins anew"
            )
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            if is_kept:
                logger.warning(kept)
            raise


def _is_kept(directory: Path, name: str) -> bool:
    """Return whether a domain's journal lists work; True where it cannot be read."""
    try:
        journal = read_journal(directory, name)
    except ValueError:  # must not take the place of the error that ends the run
        return True
    return bool(journal.places or journal.counts)


def _lock(handle: int, directory: Path) -> None:
    try:
        is_taken = locks.take(handle)
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): make sure that no other run writes to it", directory, error
        )
        return
    if not is_taken:
        raise ValueError(
            f"another run is writing {directory}; wait for it, or write to another directory"
        )


def _check_settings(path: Path, settings: Mapping[str, Any], directory: Path) -> None:
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        durable.replace(path, json.dumps(wanted, indent=2))
        return
    begun = read_json_object(path)
    changed = [key for key in {**wanted, **begun} if wanted.get(key) != begun.get(key)]
    if changed:
        pairs = ", ".join(f"{key} {begun.get(key)!r}, now {wanted.get(key)!r}" for key in changed)
        raise ValueError(
            f"{directory} was begun with other settings ({pairs}); resume with those, or delete "
            f"{directory} to begin anew"
        )
