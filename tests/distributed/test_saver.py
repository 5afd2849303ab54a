"""Saves are whole or not there: what is written, when it is visible, what goes, what fails."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megashear.checkpoint import saver, writer
from megashear.checkpoint.description import (
    TRACKER,
    Description,
    find_iteration,
    latest_iteration,
    read_description,
)
from megashear.checkpoint.saver import Saver
from megashear.checkpoint.writer import ShardedWrite, WrittenFiles
from megashear.files import integrity
from megashear.files.integrity import SaveError
from megashear.parallel.groups import ParallelGroups
from tests.ranks import run_ranks
from tests.tiny import layout
from tests.unit.checkpoint.shapes import GROUPED

RANKS = 2
ROWS = 40
"""Rows of a tensor on each rank; the width is another one."""


def values(iteration: int, rank: int) -> Tensor:
    return torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(100 * iteration + rank))


def state(iteration: int, rank: int, world_size: int = RANKS) -> dict[str, Any]:
    """A sharded state dict: one split tensor, one that all ranks hold, and plain values."""
    whole = torch.arange(7.0) + iteration
    return {
        "split": ShardedTensor.from_rank_offsets(
            "split", values(iteration, rank), (0, rank, world_size)
        ),
        "same": ShardedTensor.from_rank_offsets("same", whole, replica_id=rank),
        "steps": [iteration, 0.5],
    }


def described(iteration: int) -> Description:
    return Description(shape=GROUPED, iteration=iteration, stage="pretrain")


def load(directory: Path, rank: int) -> dict[str, Any]:
    empty = state(0, rank)
    for entry in (empty["split"], empty["same"]):
        entry.data = torch.zeros_like(entry.data)
    loaded: dict[str, Any] = dist_checkpointing.load(empty, str(directory))
    return loaded


def make(root: Path, **options: Any) -> Saver:
    groups = ParallelGroups.create(layout())
    groups.destroy()  # a saver asks only where its rank stands
    return Saver(root, groups, **options)


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_is_what_megatron_core_writes(tmp_path: Path, background: bool) -> None:
    (tmp_path / "theirs").mkdir()

    def body(rank: int) -> None:
        saving = make(tmp_path / "ours", background=background)
        held = state(3, rank)
        before = saving.save(described(3), held)
        # training goes on at once
        held["split"].data.zero_()
        held["same"].data.zero_()
        held["steps"][0] = 99
        (saved,) = before + saving.wait()
        assert (before == []) == background
        assert saved.num_bytes == (RANKS * ROWS * 24 + 7) * 4
        assert 0 <= saved.stall_seconds <= saved.seconds
        dist_checkpointing.save(state(3, rank), str(tmp_path / "theirs"))
        ours, theirs = load(saved.directory, rank), load(tmp_path / "theirs", rank)
        assert torch.equal(ours["split"], values(3, rank))
        assert torch.equal(ours["split"], theirs["split"])
        assert torch.equal(ours["same"], theirs["same"])
        assert ours["steps"] == theirs["steps"] == [3, 0.5]

    run_ranks(RANKS, body)
    root = tmp_path / "ours"
    assert names(root) == ["iter_0000003", TRACKER]
    assert find_iteration(root, contents=True) == root / "iter_0000003"
    assert {"__0_0.distcp", "__1_0.distcp"} <= integrity.read(root / "iter_0000003").keys()


def test_a_save_in_the_background_has_the_same_bytes(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        make(tmp_path / "waited").save(described(3), state(3, rank))
        saving = make(tmp_path / "background", background=True)
        saving.save(described(3), state(3, rank))
        saving.wait()

    run_ranks(RANKS, body)
    waited, background = (digests(tmp_path / name) for name in ("waited", "background"))
    assert waited == background
    assert len(waited) >= 8


def held_back(release: threading.Event, rank: int) -> None:
    """Let rank 1 write only when it is told to."""
    write = ShardedWrite.write

    def later(self: ShardedWrite) -> WrittenFiles:
        if rank == 1:
            release.wait()
        return write(self)

    ShardedWrite.write = later  # type: ignore[method-assign]


def test_it_is_visible_when_all_ranks_are_done_and_not_before(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        release = threading.Event()
        held_back(release, rank)
        saving = make(tmp_path / "saved", background=True)
        saving.save(described(3), state(3, rank))
        for _ in range(5):
            assert saving.poll() == []
            assert saving.in_flight
            time.sleep(0.02)  # time enough for rank 0's own files
        assert not list((tmp_path / "saved").glob("iter_*"))
        assert latest_iteration(tmp_path / "saved") is None
        release.set()
        (saved,) = saving.wait()
        assert not saving.in_flight
        assert saved.directory == find_iteration(tmp_path / "saved", contents=True)

    run_ranks(RANKS, body)


def test_a_second_save_waits_for_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body(rank: int) -> list[str]:
        caplog.set_level("INFO", "megashear")
        release = threading.Event()
        held_back(release, rank)
        saving = make(tmp_path / "saved", background=True)
        saving.save(described(3), state(3, rank))
        release.set()
        (first,) = saving.save(described(4), state(4, rank))
        assert first.iteration == 3
        (second,) = saving.wait()
        assert second.iteration == 4
        assert torch.equal(load(first.directory, rank)["split"], values(3, rank))
        assert torch.equal(load(second.directory, rank)["split"], values(4, rank))
        return caplog.messages

    messages, _ = run_ranks(RANKS, body)
    assert "step 4: waiting for the save of step 3, which is still being written" in messages
    assert latest_iteration(tmp_path / "saved") == 4


def until_told(saving: Saver, rank: int) -> None:
    """Save, and look at it after each step of a run."""
    saving.save(described(4), state(4, rank))
    while True:
        saving.poll()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("failing", ["write of rank 1", "commit"])
def test_a_failure_is_told_on_all_ranks_and_what_was_there_is_untouched(
    tmp_path: Path, background: bool, failing: str
) -> None:
    root = tmp_path / "saved"

    def body(rank: int) -> None:
        saving = make(root, background=background)
        saving.save(described(3), state(3, rank))
        saving.wait()

        def fail(*args: Any) -> Any:
            raise OSError(5, "Input/output error", "some/file")

        if failing == "commit":
            writer.ShardedWrite.finish = fail  # type: ignore[method-assign]
        elif rank == 1:
            ShardedWrite.write = fail  # type: ignore[method-assign]
        with pytest.raises(
            SaveError,
            match=r"iter_0000004 cannot be written: rank [01]: Input/output error: some/file",
        ):
            until_told(saving, rank)
        assert not saving.in_flight

    run_ranks(RANKS, body)
    assert names(root) == ["iter_0000003", TRACKER]
    assert find_iteration(root, contents=True).name == "iter_0000003"


def test_older_ones_go_when_a_newer_one_is_known_to_be_good(tmp_path: Path) -> None:
    root = tmp_path / "saved"

    def body(rank: int) -> list[list[str]]:
        seen = []
        saving = make(root, keep=2, protected=root / "iter_0000001")
        for iteration in range(1, 6):
            if iteration == 3 and rank == 0:
                (root / "iter_0000000").mkdir()  # not ours
                (root / "notes").mkdir()
                shutil.copytree(root / "iter_0000001", root / "iter_0000009")  # newer
            saving.save(described(iteration), state(iteration, rank))
            before = names(root)
            saving.prove(iteration - 1)  # not this one: nothing goes for it
            assert rank != 0 or names(root) == before
            saving.prove(iteration)
            saving.finish()
            seen.append([name for name in names(root) if name.startswith("iter")])
        return seen

    seen, _ = run_ranks(RANKS, body)
    others = ["iter_0000000", "iter_0000001"]
    assert seen == [
        ["iter_0000001"],
        ["iter_0000001", "iter_0000002"],
        [*others, "iter_0000002", "iter_0000003", "iter_0000009"],
        [*others, "iter_0000003", "iter_0000004", "iter_0000009"],
        [*others, "iter_0000004", "iter_0000005", "iter_0000009"],
    ]
    assert (root / "notes").is_dir()
    assert find_iteration(root, contents=True).name == "iter_0000005"


def test_a_deletion_that_takes_long_holds_nothing_up(tmp_path: Path) -> None:
    root = tmp_path / "saved"

    def body(rank: int) -> tuple[list[str], list[str], bool]:
        may_go, beats, original = threading.Event(), [], saver.forget_older

        def slow(*args: Any, **more: Any) -> list[Path]:
            may_go.wait()
            return original(*args, **more)

        saver.forget_older = slow
        saving = make(root, keep=1, resumed=1, beat=beats.append)
        saving.save(described(2), state(2, rank))
        saving.prove(1)  # the run begins with it: nothing is older
        saving.prove(2)
        saving.save(described(3), state(3, rank))
        saving.prove(3)
        there = names(root)
        dist.barrier()
        threading.Timer(0.05, may_go.set).start()
        saving.finish()
        return there, names(root), any("deleting" in beat for beat in beats)

    for there, left, told in run_ranks(RANKS, body):
        assert [name for name in there if name.startswith("iter")] == [
            "iter_0000002",
            "iter_0000003",
        ]
        assert [name for name in left if name.startswith("iter")] == ["iter_0000003"]
        assert told


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "saved"
    for name in (".iter_0000002.partial", ".iter_0000002.0af3.partial", ".iter_x.mine.partial"):
        (root / name).mkdir(parents=True)
    run_ranks(RANKS, lambda rank: bool(make(root).save(described(3), state(3, rank))))
    assert names(root) == [".iter_x.mine.partial", "iter_0000003", TRACKER]


def test_an_iteration_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        saving = make(tmp_path / "saved")
        saving.save(described(3), state(3, rank))
        with pytest.raises(ValueError, match="iter_0000003 exists; choose another --save"):
            saving.save(described(3), state(3, rank))

    run_ranks(RANKS, body)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def fill(disk: Path, leave: int) -> None:
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"x" * (free - leave))


def test_a_disk_that_is_full_is_told_before_anything_is_written(small_disk: Path) -> None:
    root = small_disk / "saved"

    def body(rank: int) -> None:
        saving = make(root)
        complaint = r"a checkpoint is 0\.0\d\d GB and 0\.00\d GB are free; free some, choose"
        with pytest.raises(SaveError, match=complaint):
            saving.check(10_000_000)
        with pytest.raises(SaveError, match=complaint):
            saving.save(described(3), state(3, rank))

    run_ranks(RANKS, body)


def test_a_disk_that_fills_up_meanwhile_leaves_the_last_one_whole(small_disk: Path) -> None:
    root = small_disk / "saved"

    def body(rank: int) -> None:
        saver.SPARE_BYTES = 0
        saving = make(root)
        saving.save(described(3), state(3, rank))
        for left in (0, 5_000, 12_000):
            check = saver._check_space

            def others_write_too(root: Path, needed: int, left: int = left) -> None:
                fill(small_disk, left)

            saver._check_space = others_write_too
            with pytest.raises(
                SaveError, match=r"iter_0000004 cannot be (written|made): .*No space left on device"
            ):
                saving.save(described(4), state(4, rank))
            saver._check_space = check
            if rank == 0:
                (small_disk / "filler").unlink()
            torch.distributed.barrier()
        saving.save(described(4), state(4, rank))

    run_ranks(RANKS, body)
    assert names(root) == ["iter_0000003", "iter_0000004", TRACKER]
    for name in ("iter_0000003", "iter_0000004"):
        find_iteration(root / name, contents=True)


def test_a_file_that_cannot_grow_leaves_the_last_one_whole(tmp_path: Path) -> None:
    root = tmp_path / "saved"

    def body(rank: int) -> None:
        saving = make(root)
        saving.save(described(3), state(3, rank))
        for most in (1_000, 4_000):
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
            try:
                with pytest.raises(SaveError, match=r"iter_0000004 cannot be .*: File too large"):
                    saving.save(described(4), state(4, rank))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        saving.save(described(4), state(4, rank))

    run_ranks(RANKS, body)
    assert names(root) == ["iter_0000003", "iter_0000004", TRACKER]
    for name in ("iter_0000003", "iter_0000004"):
        find_iteration(root / name, contents=True)


NOBODY = 65534


def as_nobody(root: Path, body: Callable[[], None]) -> None:
    """Run ``body`` with the rights of a user who owns nothing."""
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    try:
        (root / "probe").write_text("")
    except PermissionError:
        body()
    else:
        (root / "probe").unlink()
        raise AssertionError("this user may write anywhere")


def test_a_directory_without_permission_is_told_on_all_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "saved").mkdir()
        root.chmod(0o555)
        (root / "saved").chmod(0o555)

        def body(rank: int) -> None:
            savers = {place: make(place) for place in (root / "saved", root / "new")}

            def save() -> None:
                for place, saving in savers.items():
                    with pytest.raises(SaveError, match=rf"--save {place}: rank 0: Permission"):
                        saving.check(10)
                    with pytest.raises(SaveError, match="cannot be made: rank 0: Permission"):
                        saving.save(described(3), state(3, rank))

            as_nobody(root, save)

        run_ranks(RANKS, body)
        root.chmod(0o755)


def test_a_read_only_disk_is_told_on_all_ranks(small_disk: Path) -> None:
    root = small_disk / "saved"
    root.mkdir()
    again = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(again, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted read-only here")

    def body(rank: int) -> None:
        saving = make(root)
        with pytest.raises(SaveError, match=r"--save .*saved: rank 0: Read-only file system"):
            saving.check(10)
        with pytest.raises(SaveError, match=r"iter_0000003 cannot be made: rank 0: Read-only"):
            saving.save(described(3), state(3, rank))

    run_ranks(RANKS, body)


def test_values_are_added_once_and_listed(tmp_path: Path) -> None:
    from megashear.checkpoint.store import amend_description

    losses = {"loss": {"c": 1.5}}

    def body(rank: int) -> None:
        groups = ParallelGroups.create(layout())
        (saved,) = Saver(tmp_path / "saved", groups).save(described(3), state(3, rank))
        amend_description(saved.directory, {"held_out_loss": losses}, groups)

    run_ranks(RANKS, body)
    directory = find_iteration(tmp_path / "saved", contents=True)
    assert read_description(directory).details == {"held_out_loss": losses}


def test_no_name_of_a_place_or_a_time_is_in_the_index(tmp_path: Path) -> None:
    run_ranks(RANKS, lambda rank: bool(make(tmp_path / "s").save(described(3), state(3, rank))))
    index = (tmp_path / "s" / "iter_0000003" / ".metadata").read_bytes()
    assert b"partial" not in index
    assert pickle.loads(index).storage_meta is None
