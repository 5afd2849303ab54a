"""One run at a time holds a --save; a dead one's is taken over; renamed iterations are noticed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint import description, hold
from megashear.checkpoint.description import (
    TRACKER,
    Description,
    iteration_name,
    write_description,
)
from megashear.checkpoint.hold import LOCK, held
from megashear.checkpoint.saver import forget_older
from megashear.files import integrity
from tests.unit.checkpoint.shapes import GROUPED

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(hold, "_LEASE_S", 0.4)


def holding(root: Path, here: Connection) -> None:
    """Hold a directory, with a forked process that lives on, as readers of a rank do."""
    with held(root):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        here.send(child)
        here.recv()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Starts another process that holds ``tmp_path``, and gives its id."""
    pids = []

    def start() -> int:
        here, there = FORK.Pipe()
        process = FORK.Process(target=holding, args=(tmp_path, there), daemon=True)
        process.start()
        assert process.pid is not None
        pids.extend([process.pid, here.recv()])
        return process.pid

    yield start
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_second_run_is_refused_and_told_whose_it_is(
    tmp_path: Path, owner: Callable[[], int]
) -> None:
    pid = owner()
    wanted = (
        rf"--save {tmp_path} is held by another run, process {pid} on {socket.gethostname()}, "
        rf"since 20\d\d-.*; wait for it, end it, or choose another --save"
    )
    with pytest.raises(ValueError, match=wanted), held(tmp_path):
        pass


@pytest.mark.parametrize("by_open_file", [False, True])
def test_a_killed_run_s_is_taken_over_at_once(
    tmp_path: Path,
    owner: Callable[[], int],
    by_open_file: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if by_open_file:  # a lock that what the killed process forked would hold on
        monkeypatch.setattr(fcntl, "lockf", fcntl.flock)
    pid = owner()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if by_open_file:
        with pytest.raises(ValueError, match="held by another run"), held(tmp_path):
            pass
        return
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert f"held by a run that did not end well, process {pid} on" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_file_system_it_goes_by_who_lives(
    tmp_path: Path, owner: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    pid = owner()
    with pytest.raises(ValueError, match=f"another run, process {pid} on"), held(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with held(tmp_path):
        pass


@pytest.mark.parametrize("elsewhere", [True, False])
def test_another_host_s_locks_are_given_time_to_run_out(
    tmp_path: Path,
    owner: Callable[[], int],
    elsewhere: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pid, pauses = owner(), []
    if elsewhere:
        path = tmp_path / LOCK
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "node7"}))
    monkeypatch.setattr(hold, "_LEASE_S", 0.0 if not elsewhere else 1e9)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if "node7" in caplog.text:  # it waits; now the server gives the lock back
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(hold.time, "sleep", pause)
    if elsewhere:
        with held(tmp_path):
            pass
        wanted = f"process {pid} on node7, since .*; waiting 1e[+]09 s for that host's locks"
        assert re.search(rf"--save {tmp_path} is held by {wanted}", caplog.text)
        assert caplog.text.count("waiting") == 1
    else:
        with pytest.raises(ValueError, match="is held by another run"), held(tmp_path):
            pass
        assert "waiting" not in caplog.text


def test_a_number_that_another_process_has_by_now_is_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    owner = {"pid": os.getppid(), "host": socket.gethostname()}
    began = hold._started(os.getppid())
    assert began is not None
    for started, lives in ((began, True), (None, True), (began - 1, False)):
        (tmp_path / LOCK).write_text(json.dumps(owner | {"started": started}))
        refused = pytest.raises(ValueError, match="is held by another run")
        with refused if lives else contextlib.nullcontext(), held(tmp_path):
            pass


def test_other_iterations_cost_a_start_only_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        described(tmp_path, step)
    (tmp_path / iteration_name(1) / integrity.CHECKSUMS).unlink()
    original, read = description.read_json_object, []

    def failing(path: Path, *more: str) -> dict[str, Any]:
        read.append(path.parent.name)
        if path.parent.name == iteration_name(2):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path, *more)

    def no_hash(*_: object, **more: object) -> None:
        raise AssertionError("an iteration that nobody asked for is hashed")

    monkeypatch.setattr(integrity, "verify", no_hash)
    monkeypatch.setattr(description, "read_json_object", failing)
    with held(tmp_path):
        pass
    assert sorted(read) == [iteration_name(1), iteration_name(2)]
    assert caplog.text == ""


def test_a_directory_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with held(tmp_path / "new" / "saved"):
        assert (tmp_path / "new" / "saved" / LOCK).is_file()
    assert not (tmp_path / "new" / "saved").exists()
    with held(tmp_path / "new"):
        (tmp_path / "new" / "kept").touch()
    assert (tmp_path / "new" / "kept").is_file()


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = [".iter_0000002.partial", ".iter_0000002.0af3.partial", f".{TRACKER}.partial"]
    stay = [".iter_x.mine.partial", ".iter_0000004.unnamed", "notes.partial"]
    for name in (*gone, *stay):
        (tmp_path / name).touch() if "txt" in name else (tmp_path / name).mkdir()
    (tmp_path / LOCK).write_text('{"pid": ')  # killed as it was written
    with held(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)


def described(root: Path, step: int) -> Path:
    directory = root / iteration_name(step)
    directory.mkdir(parents=True)
    write_description(directory, Description(shape=GROUPED, iteration=step, stage="prune"))
    integrity.write(directory)
    return directory


@pytest.mark.parametrize("linked", [False, True])
def test_a_renamed_or_linked_iteration_is_noticed_before_anything_is_moved(
    tmp_path: Path, linked: bool
) -> None:
    ten, wrong = described(tmp_path, 10), tmp_path / iteration_name(20)
    if linked:
        wrong.symlink_to(ten)
    else:
        ten.rename(wrong)
    (tmp_path / ".iter_0000002.partial").mkdir()
    before = sorted(tmp_path.iterdir())
    wanted = "iter_0000020 is of step 10, as its megashear.json says: .*; name it iter_0000010"
    with pytest.raises(ValueError, match=f"--save {tmp_path}: .*{wanted}"), held(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == before
    shutil.move(tmp_path / iteration_name(20), tmp_path / "best")  # any other name may be
    with held(tmp_path):
        pass


def test_a_link_elsewhere_is_no_iteration_to_delete(tmp_path: Path) -> None:
    root, other = tmp_path / "saved", tmp_path / "other"
    moved = described(other, 1)
    for step in (2, 3, 4):
        described(root, step)
    (root / moved.name).symlink_to(moved)
    with held(root):
        assert [path.name for path in forget_older(root, 4, keep=1, protected=None)] == [
            "iter_0000003",
            "iter_0000002",
        ]
    assert (root / moved.name).is_symlink()
    assert list(moved.iterdir())
