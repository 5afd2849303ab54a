"""Save a run's iterations: written aside, checksummed, synced, then made visible in one step."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megashear.checkpoint.description import (
    DESCRIPTION,
    TOKENIZER,
    TRACKER,
    Description,
    iteration_name,
    iterations,
    latest_iteration,
    write_description,
)
from megashear.checkpoint.writer import ShardedWrite
from megashear.files import durable, integrity
from megashear.files.integrity import SaveError
from megashear.files.workers import Task
from megashear.parallel.agree import (
    broadcast_object,
    flat_all_reduce,
    gather_objects,
    raise_together,
    reason,
)
from megashear.parallel.groups import ParallelGroups
from megashear.tokenizer import tokenizer_files

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 * 2**20
"""Free space to leave beside the tensors, bytes: for their index, the tokenizer, other files."""
_LONGEST_PAUSE_S = 0.5
"""Seconds between looks at a save that all ranks wait for; short beside any large one."""


_GIVE_UP_S = 30.0
"""Seconds that a process waits at its end for a tensor that is being written."""


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a finished save made, and how long it took."""

    directory: Path
    iteration: int
    num_bytes: int
    """Size of all its tensors, bytes."""
    stall_seconds: float
    """Seconds that training stood still for the save, on this rank."""
    seconds: float
    """Seconds from the beginning of the save until the checkpoint was visible."""


class Saver:
    """Writer of a run's iterations into one directory, one at a time.

    Every rank makes one and calls the same methods in the same order; all are collective over the
    world.

    Args:
        root: the run's checkpoint directory.
        groups: where this rank stands.
        background: let `save` return once everything is copied to host memory; the rest is done
            by threads, and `poll` or `wait` reports when the checkpoint is visible.
        keep: newest iterations to keep; older ones are deleted once a newer one is known to be
            good, see `prove`. 0 keeps all.
        protected: an iteration that is never deleted: the one that the run started from.
        resumed: the iteration in ``root`` that the run resumes from, which counts as this
            process's own: a job that saves only when it is stopped proves it, and no other.
        beat: called while a save is waited for and makes progress, see `Watchdog`; not called
            while a disk hangs.
    """

    def __init__(
        self,
        root: Path | str,
        groups: ParallelGroups,
        *,
        background: bool = False,
        keep: int = 0,
        protected: Path | None = None,
        resumed: int | None = None,
        beat: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self.root, self._groups, self._beat = Path(root), groups, beat
        self._background, self._keep, self._protected = background, keep, protected
        self._pending: _SaveInFlight | None = None
        # iterations that this process has made visible, or begins with
        self._unproven = [] if resumed is None else [resumed]
        self._deletion: Task[Any] | None = None
        # A thread that still writes while the interpreter is taken down ends the process with a
        # signal instead of its exit code.
        atexit.register(self._abandon)

    @property
    def in_flight(self) -> bool:
        """Return whether a save has begun and is not visible yet; equal on all ranks."""
        return self._pending is not None

    def check(self, needed: int) -> None:
        """Refuse a directory that cannot take even one checkpoint.

        Args:
            needed: bytes of one.

        Raises:
            SaveError: on every rank: it cannot be made or written, or its disk has less free.
        """
        with raise_together(task=f"--save {self.root}"):
            if self._groups.rank == 0:
                self.root.mkdir(parents=True, exist_ok=True)
                probe = (
                    self.root / ".writable"
                )  # one name, so that a killed run leaves one file at most
                try:
                    durable.replace(probe, "can this be written?\n")
                finally:
                    probe.unlink(missing_ok=True)
                _check_space(self.root, needed)

    def save(
        self,
        description: Description,
        state: dict[str, Any],
        *,
        tokenizer: Path | str | Sequence[Path] | None = None,
    ) -> list[SaveReport]:
        """Save one iteration.

        Args:
            description: shape, iteration, stage and plain values.
            state: sharded state dict, as `dist_checkpointing.save` takes it.
            tokenizer: the tokenizer's files, or their directory, carried along.

        Returns:
            Saves that have become visible: an earlier one that had to be waited for, and this one
            unless it is in the background.

        Raises:
            SaveError: on every rank, if it cannot be written; what was saved before is untouched.
        """
        # wait for the save before
        start = time.monotonic()
        finished = []
        if self._pending is not None:
            logger.info(
                "step %d: waiting for the save of step %d, which is still being written",
                *(description.iteration, self._pending.description.iteration),
            )
            finished += self.wait()
        # make the directory
        final = self.root / iteration_name(description.iteration)
        name = broadcast_object(f".{final.name}.{uuid.uuid4().hex[:8]}.partial", 0)
        aside = self.root / name
        with raise_together(task=f"{final} cannot be made"):
            if self._groups.rank == 0:
                _make_way(self.root, final, description.iteration)
                if _is_done(self._deletion):  # a deletion under way removes its own, and takes long
                    forget_partial(self.root)
                aside.mkdir(parents=True)
        # plan who writes what
        with raise_together(task=f"{final} cannot be written"):
            carried = tokenizer_files.find(tokenizer)
        write = ShardedWrite(state, aside, keep_copy=self._background)
        total = sum(gather_objects(write.num_bytes))
        with raise_together(task=f"{final} cannot be written"):
            if self._groups.rank == 0:
                _check_space(self.root, total)
        # begin to write
        self._pending = _SaveInFlight(
            description=description,
            tokenizer=carried,
            write=write,
            final=final,
            num_bytes=total,
            start=start,
            task=Task(write.write),
        )
        if not self._background:
            finished += self.wait()
        else:
            self._pending.stall_seconds = time.monotonic() - start
        return finished

    def poll(self) -> list[SaveReport]:
        """Look at the save in flight without waiting for it.

        Returns:
            The save, if it has become visible; else nothing.

        Raises:
            SaveError: on every rank, if some rank could not write.
        """
        pending = self._pending
        if pending is None or not _done_everywhere(pending.task):
            return []
        if not pending.committing:
            # the tracker of a run of many ranks is written by one, when all of them are done
            written = self._results(pending)
            if self._groups.rank == 0:
                pending.task = Task(lambda: self._commit(pending, written))
            pending.committing = True
            return []
        self._results(pending)
        self._pending = None
        self._unproven.append(pending.description.iteration)
        saved = SaveReport(
            directory=pending.final,
            iteration=pending.description.iteration,
            num_bytes=pending.num_bytes,
            stall_seconds=pending.stall_seconds or time.monotonic() - pending.start,
            seconds=time.monotonic() - pending.start,
        )
        return [saved]

    def wait(self) -> list[SaveReport]:
        """Wait until no save is in flight, and return what `poll` returns."""
        pause, written = 1e-3, -1
        finished: list[SaveReport] = []
        while self._pending is not None:
            pending = self._pending
            if pending.task.wait(pause) or pending.write.num_written != written:
                written = pending.write.num_written
                self._beat(f"saving step {pending.description.iteration}")
            # not one long collective: those time out, and a large checkpoint takes long
            finished += self.poll()
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return finished

    def prove(self, iteration: int) -> None:
        """Note that iterations up to one are good, and delete those beyond --keep.

        A checkpoint is known to be good when a later step was taken from its weights. Until then
        it does not count, and nothing older is deleted. A thread deletes, for large iterations
        take long and the other ranks train meanwhile; `finish` waits for it. Collective over
        nothing.

        Args:
            iteration: the newest iteration that is known to be good.
        """
        proven = [number for number in self._unproven if number <= iteration]
        if not proven:
            return
        self._unproven = [number for number in self._unproven if number > iteration]
        if not self._keep or self._groups.rank != 0:
            return
        before = None if _is_done(self._deletion) else self._deletion  # or none is ever forgotten
        self._deletion = Task(lambda: self._delete(max(proven), before))

    def finish(self) -> None:
        """Wait until iterations beyond --keep are deleted. Collective over the world."""
        pause = 1e-3
        while not _done_everywhere(self._deletion):
            time.sleep(pause)
            self._beat("deleting older checkpoints")
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def go_back(self, iteration: int) -> Path | None:
        """Name the newest iteration up to one the latest, so that a resume begins there.

        Later iterations remain until the run reaches their step again. Collective over the world.

        Args:
            iteration: the newest iteration that is known to be good.

        Returns:
            Its directory; None if no iteration is so old, and nothing is changed.

        Raises:
            SaveError: on every rank, if the tracker cannot be written.
        """
        good = None
        with raise_together(task=f"{self.root / TRACKER} cannot be written"):
            if self._groups.rank == 0:
                good = next(iter(_ours(self.root, iteration)), None)
                if good is not None:
                    name_latest(self.root, good)
        good = broadcast_object(good, 0)
        return None if good is None else self.root / iteration_name(good)

    def _delete(self, good: int, before: Task[Any] | None) -> None:
        if before is not None:
            before.wait()
        try:
            forget_older(self.root, good, keep=self._keep, protected=self._protected)
        except OSError as error:  # this save is whole; a full disk would end the next one
            logger.warning("--keep %d: nothing is deleted: %s", self._keep, reason(error))

    def _abandon(self) -> None:
        """Give up a save in flight, because this process ends. Collective over nothing."""
        if self._deletion is not None:
            self._deletion.wait(_GIVE_UP_S)
        if self._pending is not None:
            self._pending.write.cancel()
            self._pending.task.wait(_GIVE_UP_S)

    def _results(self, pending: _SaveInFlight) -> list[Any]:
        """Return what the tasks of all ranks returned, once they are done."""
        try:
            with raise_together(task=f"{pending.final} cannot be written"):
                own = pending.task.result()
        except SaveError:
            self._pending = None
            if self._groups.rank == 0:
                shutil.rmtree(pending.write.directory, ignore_errors=True)
            raise
        return gather_objects(own)

    def _commit(self, pending: _SaveInFlight, written: list[Any]) -> None:
        """Make a written iteration whole, visible and the latest, in this order; on rank 0."""
        aside, iteration = pending.write.directory, pending.description.iteration
        sums = pending.write.finish(written)
        (aside / TOKENIZER).mkdir()
        tokenizer_files.copy(pending.tokenizer, aside / TOKENIZER)
        described = dataclasses.replace(
            pending.description,
            tokenizer_sha256=tokenizer_files.fingerprint(pending.tokenizer),
            token_ids=tokenizer_files.token_ids(pending.tokenizer) | pending.description.token_ids,
        )
        write_description(aside, described)
        integrity.write(aside, sums)
        aside.rename(pending.final)
        durable.sync_directory(self.root)
        name_latest(self.root, iteration)


@dataclass(kw_only=True)
class _SaveInFlight:
    """A save in flight."""

    description: Description
    tokenizer: list[Path]
    write: ShardedWrite
    final: Path
    num_bytes: int
    start: float
    task: Task[Any]
    committing: bool = False
    stall_seconds: float = 0.0


def forget_older(root: Path, newest: int, *, keep: int, protected: Path | None) -> list[Path]:
    """Delete old iterations of a run, so that ``keep`` are left up to ``newest``.

    Only directories that megashear wrote are deleted: none newer than ``newest``, no links, and
    never ``protected``. A deletion that is interrupted leaves a hidden directory, which is no
    checkpoint and is removed by the next deletion.

    Args:
        root: the run's checkpoint directory.
        newest: the newest iteration that is known to be good.
        keep: number of iterations to keep, with ``newest``.
        protected: an iteration to keep in any case.

    Returns:
        Directories that were deleted.
    """
    deleted = []
    ours = [path for path in _ours(root, newest).values() if not path.is_symlink()]
    for path in ours[keep:]:
        if protected is not None and path.resolve() == protected.resolve():
            continue
        gone = root / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
        path.rename(gone)  # whole or not there, at any instant
        shutil.rmtree(gone, ignore_errors=True)
        deleted.append(path)
    if deleted:
        logger.info("deleted %s, as --keep asks", ", ".join(path.name for path in deleted))
    return deleted


def _ours(root: Path, newest: int) -> dict[int, Path]:
    """Return the iterations up to one that megashear wrote, newest first."""
    return {
        number: path
        for number, path in iterations(root).items()
        if number <= newest and (path / DESCRIPTION).is_file()
    }


def name_latest(root: Path, iteration: int) -> None:
    """Point the tracker at an iteration, in one step; on rank 0."""
    durable.replace(root / TRACKER, str(iteration))


def _make_way(root: Path, final: Path, iteration: int) -> None:
    if not final.exists():
        return
    newest = latest_iteration(root)
    if newest is None or newest >= iteration:
        raise ValueError(f"{final} exists; choose another --save, or remove it if it is not needed")
    # damaged, or killed before it was named: the run resumed from an older iteration and is here
    # again; the directory is renamed, for nothing is overwritten
    beside = root / f".{final.name}.unnamed"
    if beside.is_symlink():
        beside.unlink()
    shutil.rmtree(beside, ignore_errors=True)
    final.rename(beside)
    logger.warning("the run did not resume from %s; it is %s now", final, beside.name)


def forget_partial(root: Path) -> None:
    """Remove what killed saves and deletions left behind, and nothing else."""
    for path in root.glob(".iter_*.partial"):
        if re.fullmatch(r"\.iter_\d{7,}\.(\w+\.)?partial", path.name):
            shutil.rmtree(path, ignore_errors=True)
    for name in (f".{TRACKER}.partial", ".writable", "..writable.partial"):
        (root / name).unlink(missing_ok=True)


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed + SPARE_BYTES:
        raise SaveError(
            f"a checkpoint is {_gigabytes(needed)} and {_gigabytes(free)} are free; free some, "
            f"choose a --save on another disk, or keep fewer with --keep"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"


def _is_done(task: Task[Any] | None) -> bool:
    return task is None or task.wait(0.0)


def _done_everywhere(task: Task[Any] | None) -> bool:
    done = torch.tensor([int(_is_done(task))], dtype=torch.int32)
    world: Any = dist.group.WORLD
    return bool(flat_all_reduce([done], world, dist.ReduceOp.MIN)[0])
