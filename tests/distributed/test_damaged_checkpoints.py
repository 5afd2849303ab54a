"""Damaged files and kill -9 during a save: a run finds a whole checkpoint and repeats itself."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megashear.__main__ import main
from megashear.checkpoint.description import TRACKER, find_iteration, latest_iteration
from megashear.checkpoint.store import agree_on_iteration
from megashear.commands import outcome
from megashear.commands.outcome import CANNOT_SAVE
from megashear.files.integrity import DamagedError
from megashear.parallel import cpu_megatron
from megashear.parallel.groups import ParallelGroups
from megashear.train import loop
from tests import text_run
from tests.distributed.test_resume import (
    HALF,
    WHOLE,
    configuration,
    differences,
    finished,
    start,
)
from tests.distributed.test_saver import described, make, names, state
from tests.ranks import run_ranks
from tests.text_run import TextRun
from tests.tiny import layout
from tests.unit.checkpoint.test_find_iteration import bit, cut_short, empty, swap

Harm = Callable[[Path], object]
HARMS: list[Harm] = [bit, cut_short, empty, swap, Path.unlink]


def test_all_ranks_pass_over_damage_to_any_file(tmp_path: Path) -> None:
    root = tmp_path / "saved"

    def body(rank: int) -> int:
        for iteration in (3, 4):
            make(root).save(described(iteration), state(iteration, rank))
        groups = ParallelGroups.create(layout())
        newest, checked = root / "iter_0000004", 0
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        for path in files:
            for harm in HARMS:
                before = {}
                if rank == 0:
                    before = {other: other.read_bytes() for other in files}
                    harm(path)
                dist.barrier()
                assert agree_on_iteration(root, groups) == root / "iter_0000003", (path, harm)
                with pytest.raises(DamagedError, match="iter_0000004"):  # asked for by name
                    agree_on_iteration(newest, groups)
                dist.barrier()
                for other, data in before.items():
                    other.write_bytes(data)
                checked += 1
        dist.barrier()
        assert agree_on_iteration(root, groups) == newest
        return checked

    checked, other = run_ranks(2, body)
    assert checked == other >= 8 * len(HARMS)


def test_damage_in_any_ranks_share_is_found_and_all_that_were_tried_are_named(
    tmp_path: Path,
) -> None:
    root = tmp_path / "saved"

    def body(rank: int) -> None:
        for iteration in (3, 4):
            make(root).save(described(iteration), state(iteration, rank))
        groups = ParallelGroups.create(layout())
        if rank == 0:
            for iteration, name in ((3, "__0_0.distcp"), (4, "__1_0.distcp")):
                bit(root / f"iter_000000{iteration}" / name)
        dist.barrier()
        with pytest.raises(
            DamagedError, match=r"no whole .*4/__1_0\.distcp is damaged.*3/__0_0\.distcp is dam"
        ):
            agree_on_iteration(root, groups)
        # sizes are as they were
        assert agree_on_iteration(root, groups, contents=False).name == "iter_0000004"

    run_ranks(2, body)


def often(config: Any) -> Any:
    """With a checkpoint after every step."""
    return replace(config, train=replace(config.train, save_interval=1))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("background", "harm"), [(False, bit), (True, Path.unlink)])
def test_a_run_goes_on_from_the_last_whole_one_and_repeats_itself(
    text: TextRun, tmp_path: Path, background: bool, harm: Harm
) -> None:
    parallel, replicas = layout(), 2
    start(configuration(text, "prune", parallel, tmp_path / "whole"), replicas)
    stopped = often(
        configuration(
            *(text, "prune", parallel, tmp_path / "halves"),
            exit_interval=HALF,
            async_save=background,
        )
    )
    start(stopped, replicas)
    saved = tmp_path / "halves" / "saved"
    assert names(saved) == [f"iter_000000{n}" for n in range(1, HALF + 1)] + [TRACKER]
    newest = (saved / f"iter_000000{HALF}").glob("*.distcp")
    harm(max(newest, key=lambda path: path.stat().st_size))
    for path in saved.rglob("*"):
        os.utime(path, (0, 2**33))  # whatever the clock said
    resumed = configuration(
        text, "prune", parallel, tmp_path / "halves", resume=True, async_save=background, keep=2
    )
    start(often(resumed), replicas)
    assert differences(finished(tmp_path / "halves"), finished(tmp_path / "whole")) == set()
    kept = {f"iter_000000{HALF - 1}", f"iter_000000{WHOLE - 1}", f"iter_000000{WHOLE}"}
    assert set(names(saved)) == kept | {TRACKER, f".iter_000000{HALF}.unnamed"}
    assert find_iteration(saved, contents=True).name == f"iter_000000{WHOLE}"


def test_the_tracker_never_names_a_damaged_one_once_a_run_goes_on(
    text: TextRun, tmp_path: Path
) -> None:
    start(often(configuration(text, "pretrain", layout(), tmp_path, exit_interval=HALF)), 1)
    saved = tmp_path / "saved"
    bit(saved / f"iter_000000{HALF}" / "__0_0.distcp")

    def stop_before_the_first_step() -> None:
        def stop(trainer: object, first_step: int) -> None:
            assert latest_iteration(saved) == first_step == HALF - 1
            raise TimeoutError("enough")

        loop.Trainer.run = stop  # type: ignore[assignment,method-assign]

    with pytest.raises(AssertionError, match="TimeoutError: enough"):
        start(
            configuration(text, "pretrain", layout(), tmp_path, resume=True),
            1,
            stop_before_the_first_step,
        )


def killed(calls: int) -> None:
    """Kill this process -9 at one of its calls that change the disk."""
    made = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def alone(body: Callable[[], None]) -> int:
    """Run ``body`` as the only rank of a process of its own; that process's exit code."""

    def rank(meeting: str) -> None:
        dist.init_process_group("gloo", store=dist.FileStore(meeting, 1), rank=0, world_size=1)
        body()

    cpu_megatron.install()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=rank, args=(f"{folder}/s",))
        process.start()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_killed_at_any_call_that_changes_the_disk_a_whole_one_is_left(tmp_path: Path) -> None:
    def save(root: Path, iteration: int, calls: int | None = None) -> None:
        saving = make(root, keep=2)
        if calls is not None:
            killed(calls)
        saving.save(described(iteration), state(iteration, 0, 1))
        saving.prove(iteration)
        saving.finish()

    before = tmp_path / "before"
    assert alone(lambda: [save(before, iteration) for iteration in (1, 2, 3)] and None) == 0
    found, roots = [], []
    for calls in itertools.count(1):
        root = Path(shutil.copytree(before, tmp_path / str(calls)))
        code = alone(lambda root=root, calls=calls: save(root, 4, calls))  # type: ignore[misc]
        newest = find_iteration(root, contents=True)
        assert newest.name == f"iter_{latest_iteration(root):07d}"
        found.append(newest.name)
        roots.append(root)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found == sorted(found)  # from one instant on it is there
    assert found.count("iter_0000003") > 15
    assert found.count("iter_0000004") > 3
    # and whatever was left behind, the next save succeeds and clears it away
    assert alone(lambda: [save(root, 5) for root in roots] and None) == 0
    for root in roots:
        assert find_iteration(root, contents=True).name == "iter_0000005"
        assert not list(root.glob(".*"))


@pytest.mark.parametrize("background", [False, True])
def test_killed_at_any_instant_the_run_finds_a_whole_one(tmp_path: Path, background: bool) -> None:
    root, chance = tmp_path / "saved", random.Random(0)
    reached = 0
    for turn in range(6):
        delays = [chance.uniform(0.1, 0.6) for _ in range(2)]
        if turn % 2:
            delays[chance.randrange(2)] = 30.0  # one rank alone

        def body(rank: int, delays: list[float] = delays, reached: int = reached) -> None:
            saving = make(root, background=background, keep=2)
            timer = threading.Timer(delays[rank], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
            for iteration in range(reached + 1, reached + 10_000):
                saving.save(described(iteration), state(iteration, rank))
                saving.poll()
                saving.prove(iteration - 1)

        with pytest.raises(AssertionError):
            run_ranks(2, body)
        if (root / TRACKER).is_file():
            newest = find_iteration(root, contents=True)
            assert newest.name == f"iter_{latest_iteration(root):07d}"
            reached = int(newest.name[5:])
    assert reached > 1


def test_a_save_that_fails_ends_the_command_with_its_own_code(
    text: TextRun, tmp_path: Path
) -> None:
    def body(rank: int) -> tuple[int, str]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        outcome.PATIENCE_S = 0.0  # no torchrun ends the second rank meanwhile
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main(
                [
                    *("pretrain", "--load", str(text.checkpoint), "--data-path", str(text.data)),
                    *("--reweight", "constant", "--train-iters", "2", "--eval-interval", "0"),
                    *("--seq-length", str(text_run.SEQUENCE), "--save", str(tmp_path / "saved")),
                ]
            )
        return code, said.getvalue()

    (code, said), (other, same) = run_ranks(2, body)
    assert code == other == CANNOT_SAVE
    assert "megashear pretrain: error: " in said
    assert "iter_0000002 cannot be written: rank 0" in said
    assert "File too large" in said
    assert same.replace(" on rank 1:", ":").splitlines()[-1] == said.splitlines()[-1]
    assert not (tmp_path / "saved").exists()  # nothing was saved there
