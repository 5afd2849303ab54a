"""A job over two hosts: it trains, ends when one is cut off, says who, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests import two_hosts
from tests.crash.attempt import attempt
from tests.crash.jobs import finished
from tests.distributed.test_resume import configuration, differences
from tests.text_run import TextRun
from tests.tiny import layout

WHY_NOT = two_hosts.why_not()


@pytest.mark.scenario
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_host_that_is_cut_off_ends_the_job_which_resumes(text: TextRun, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    # one rank a host: starting torchrun's processes is what takes the time here
    one, two = (
        configuration(text, "prune", layout(), folder, save_interval=2) for folder in folders
    )
    for folder in folders:
        folder.mkdir()
    assert attempt(one, 2, folders[0] / "log").error is None
    minutes = 0.4
    train = replace(two.train, distributed_timeout_minutes=minutes)
    found = two_hosts.cut_off(replace(two, train=train), 1, folders[1], at_step=4)
    first, second = found.said
    assert "rank 0: no progress for 24 s in step 4" in first
    assert "rank 1 hung in an unknown place" in first
    assert "rank 1 could not ask the others" in second
    assert "this host may be cut off from the first one" in second
    assert found.code == 1
    assert found.went_on == (0, 0)
    assert found.steps_again == train.train_iters - 2  # from the checkpoint before the cut
    # one host and two, cut off or not: the same bits
    assert differences(finished(folders[1]), finished(folders[0])) == set()


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_hosts_are_removed_with_what_runs_there() -> None:
    def fail() -> None:
        with two_hosts.two_hosts() as hosts:
            words = ["ip", "netns", "exec", hosts.names[1], "sleep", "600"]
            running.append(subprocess.Popen(words))
            raise ZeroDivisionError

    running: list[subprocess.Popen[bytes]] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert running[0].wait() == -signal.SIGKILL
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"megashear-{os.getpid()}-" not in listed.stdout
