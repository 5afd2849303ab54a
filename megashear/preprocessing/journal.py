"""What an unfinished run of preprocessing has done, so that the next one goes on there.

Beside the files in the making lies a folder with one JSON file a domain. It lists, for every input
file that was read to its end and for the one being read, how long the outputs were then: whatever
lies behind the last of these places is cut off before going on. The outputs are on the disk before
the journal says so, and the journal changes in one step, so a run may be killed anywhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megashear.files import durable
from megashear.files.structured import read_json_object

logger = logging.getLogger(__name__)

FOLDER = ".progress"
"""Name in the directory in the making; no domain's name begins with a dot."""
SETTINGS_NAME = "settings"
LOCK_NAME = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class SideState:
    """How far one side of a domain has been written."""

    documents: int = 0
    """Documents in the ``.bin``."""
    tokens: int = 0
    """Tokens in the ``.bin``."""
    largest_id: int = -1
    """Largest id among them."""
    largest_id_at: int = -1
    """Where it is first, in tokens from the file's beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainState:
    """How far a domain has been written."""

    train: SideState = SideState()
    """Training side."""
    held_out: SideState = SideState()
    """Held-out side."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    text_bytes: int = 0
    """Size of the texts tokenised, bytes of UTF-8."""
    pretokenised: int = 0
    """Documents that came as tokens."""
    lone_surrogates: int = 0
    """Halves of surrogate pairs replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The state of a domain at some point of its input."""

    file: str
    """Input file, absolute."""
    size: int
    """Its size, bytes."""
    mtime_ns: int
    """Its time of change."""
    chunks: int | None
    """Chunks of it that have been written; None where it has been read to its end."""
    state: DomainState
    """All that was written up to here, of this file and those before."""

    @classmethod
    def of(cls, file: Path, chunks: int | None, state: DomainState) -> Place:
        """The place after ``chunks`` chunks of ``file``, or at its end."""
        found = file.stat()
        return cls(
            file=str(file.absolute()),
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            chunks=chunks,
            state=state,
        )

    def is_in(self, file: Path) -> bool:
        """Whether ``file`` is what was read: the same path, size and time of change."""
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
    """Ends of the input files that were read, in order; the last may lie within its file."""
    counts: dict[str, Any] | None = None
    """Fields of the domain's DomainCounts where it is finished."""

    def fitting(self, files: Sequence[Path]) -> tuple[Place, ...]:
        """The places that lie in the first of these files, unchanged and in the same order."""
        fitting = []
        for place, file in zip(self.places, files):
            if not place.is_in(file):
                break
            fitting.append(place)
        return tuple(fitting)


def read_journal(directory: Path, name: str) -> Journal:
    """The journal of a domain; an empty one where there is none."""
    path = directory / FOLDER / f"{name}.json"
    if not path.is_file():
        return Journal()
    # Of any size, for it is ours: some 420 bytes for each input file.
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
    """Hold ``directory`` for a run with these settings, new or left behind by another.

    Where the block raises before anything worth keeping was written, the directory goes.

    Args:
        directory: made if it is not there.
        settings: all that the output depends on besides its input; fit for JSON.

    Raises:
        ValueError: a run is writing there, or one with other settings left it behind.
        KeyboardInterrupt: passed on, with what is kept as its text.
    """
    folder = directory / FOLDER
    if directory.exists() and not folder.is_dir():
        raise ValueError(
            f"{directory} exists and was not left behind by a run of megashear preprocess; move it "
            f"away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as lock:
        _lock(lock, directory)
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
    """Return whether a domain's journal lists work; a journal that cannot be read may."""
    try:
        journal = read_journal(directory, name)
    except ValueError:  # must not take the place of the error that ends the run
        return True
    return bool(journal.places or journal.counts)


def _lock(lock: Any, directory: Path) -> None:
    try:
        # Held by the process: a killed one leaves no lock behind.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing {directory}; wait for it, or write to another directory"
        ) from None
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): make sure that no other run writes to it", directory, error
        )


def _check_settings(path: Path, settings: Mapping[str, Any], directory: Path) -> None:
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        durable.replace(path, json.dumps(wanted, indent=2))
        return
    begun = read_json_object(path)
    changed = [key for key in {**wanted, **begun} if wanted.get(key) != begun.get(key)]
    if changed:
        told = ", ".join(f"{key} {begun.get(key)!r}, now {wanted.get(key)!r}" for key in changed)
        raise ValueError(
            f"{directory} was begun with other settings ({told}); go on with those, or delete "
            f"{directory} to begin anew"
        )
