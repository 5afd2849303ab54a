"""The scripts of examples/launch as a cluster runs them: two agents on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher import api as launcher_api

from megashear.checkpoint.description import TRACKER
from megashear.checkpoint.weights import CheckpointWeights
from tests.end_to_end.torchrun import ROOT
from tests.text_run import SEQUENCE, TARGET, TextRun

LAUNCH = ROOT / "examples/launch"
STEPS = 4


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def environment(**knobs: object) -> dict[str, str]:
    """A clean one, with the knobs of a script; nothing of a job that these tests may run in."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    here = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return kept | here | {name: str(value) for name, value in knobs.items()}


def pruning(text: TextRun, save: Path) -> list[str]:
    flags = {
        "load": text.checkpoint,
        "data-path": text.data,
        "reference-loss": text.reference,
        "save": save,
        "train-iters": STEPS,
        "sparsity-warmup-iters": 2,
        "lr": 1e-3,
        "eval-interval": 2,
        "eval-sequences": 2,
        "seq-length": SEQUENCE,
        "global-batch-size": 4,
        "num-workers": 0,
        "pipeline-model-parallel-size": 2,
        **{key.replace("_", "-"): value for key, value in TARGET.items()},
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return [str(LAUNCH / "torchrun.sh"), "-m", "megashear", "prune", *words]


@pytest.mark.scenario
def test_two_nodes_do_what_one_does(text: TextRun, tmp_path: Path) -> None:
    """A stage on each of two nodes, which are two agents; and both stages on one, at once."""
    port = free_port()
    nodes = [
        {"NNODES": 2, "NODE_RANK": node, "MASTER_PORT": port, "NPROC_PER_NODE": 1}
        | {"MASTER_ADDR": "127.0.0.1"}
        for node in range(2)
    ]
    alone = {"NPROC_PER_NODE": 2}  # which finds a port by itself
    jobs = [
        subprocess.Popen(
            pruning(text, tmp_path / ("one" if knobs is alone else "two")),
            env=environment(**knobs),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        # the second node before the first: whoever comes early waits
        for knobs in (nodes[1], nodes[0], alone)
    ]
    try:
        said = [job.communicate(timeout=200)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0, 0], "\n".join(said)
    # rank 0 speaks, once: two nodes are one job
    met = "2 processes on cpu: tensor 1, pipeline 2, data 1"
    assert [(said[0] + said[1]).count(met), said[2].count(met)] == [1, 1]
    start, one, two = map(CheckpointWeights, (text.checkpoint, tmp_path / "one", tmp_path / "two"))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert [name for name in start if torch.equal(start[name], two[name])] == []  # it has trained


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "NODE_RANK: which of the 2 nodes is this?"),
        ({"NODE_RANK": 1}, "MASTER_ADDR: set it, the same on all nodes"),
    ],
)
def test_a_node_that_does_not_know_its_place_starts_nothing(
    given: dict[str, object], wanted: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [LAUNCH / "torchrun.sh", "-m", "megashear", "--version"],
        env=environment(NNODES=2, **given),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert wanted in done.stderr
    assert done.stdout == ""


def test_a_call_that_cannot_be_ends_before_torchrun_starts_anything(
    text: TextRun, tmp_path: Path
) -> None:
    words = [*pruning(text, tmp_path / "saved"), "--micro-batch-size", "3"]
    done = subprocess.run(
        words,
        env=environment(NPROC_PER_NODE=2),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "megashear prune: error: --global-batch-size 4 is not a multiple of --micro-batch-size * "
        "data-parallel size = 3 * 1; the nearest that are: 3 and 6\n"
    )


def torchrun_of(
    folder: Path, launcher: str, **knobs: object
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """How torchrun.sh calls a torch whose launcher has this source, and what it says."""
    sources = {
        "torch/__init__.py": "",
        "torch/distributed/__init__.py": "",
        "torch/distributed/launcher/api.py": launcher,
        "torch/distributed/run.py": "import os, sys; print(*sys.argv[1:], sep='\\n'); "
        "print(os.environ['PYTORCH_CUDA_ALLOC_CONF'])",
    }
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    done = subprocess.run(
        [LAUNCH / "torchrun.sh", "-m", "megashear", "--version"],
        env=environment(**knobs) | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done


KNOWS = Path(launcher_api.__file__).read_text()
"""The launcher of the torch that is installed."""
KNOWS_NOT = KNOWS.replace("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")


@pytest.mark.parametrize(
    ("launcher", "timeout", "warned"),
    [(KNOWS, 240, False), (KNOWS_NOT, 240, True), (KNOWS_NOT, 30, False)],
    ids=["new", "old", "not asked for"],
)
def test_a_torch_that_would_kill_sooner_is_told_of(
    launcher: str, timeout: int, warned: bool, tmp_path: Path
) -> None:
    if launcher is KNOWS and launcher == KNOWS_NOT:
        pytest.skip("the torch installed here is an older one")
    _, done = torchrun_of(tmp_path, launcher, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=timeout)
    assert ("it kills the processes 30 s after SIGTERM" in done.stderr) == warned
    assert ("--exit-duration-in-mins" in done.stderr) == warned


@pytest.mark.parametrize(
    ("knobs", "endpoint"),
    [
        ({}, "127.0.0.1:0"),
        ({"MASTER_PORT": 4242}, "127.0.0.1:4242"),
        ({"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "node0"}, "node0:29500"),
    ],
    ids=["any", "given", "two nodes"],
)
def test_only_several_nodes_have_to_agree_on_a_port(
    knobs: dict[str, object], endpoint: str, tmp_path: Path
) -> None:
    words, _ = torchrun_of(tmp_path, KNOWS, **knobs)
    assert words[words.index("--rdzv-endpoint") + 1] == endpoint


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_what_is_set_for_the_allocator_stays(name: str | None, tmp_path: Path) -> None:
    own = "max_split_size_mb:128"
    words, _ = torchrun_of(tmp_path, KNOWS, **({name: own} if name else {}))
    # the name that torch reads first
    assert words[-1] == (own if name else "expandable_segments:True")


SCONTROL = """#!/bin/sh
case "$*" in
  "show hostnames "*) echo 127.0.0.1 ;;
  "-o show job 4711") cat {record} ;;
  *) echo "$@" >> {calls} ;;
esac
"""
RECORD = (
    "JobId=4711 JobName=megashear JobState=RUNNING EndTime={end} PreemptEligibleTime="
    "2026-01-02T03:04:05 PreemptTime={preempted} NodeList=here"
)
"""What `scontrol -o show job` says, on one line."""


def record(*, left: int = 86400, preempted: str = "None") -> str:
    """Of a job whose time is over in so many seconds."""
    end = datetime.now(UTC) + timedelta(seconds=left)
    return RECORD.format(end=end.strftime("%Y-%m-%dT%H:%M:%S"), preempted=preempted)


@pytest.fixture
def slurm_job(tmp_path: Path) -> dict[str, str]:
    """What sbatch sets for a job of one node; scontrol names this host and notes other calls."""
    stand_in = tmp_path / "bin" / "scontrol"
    stand_in.parent.mkdir()
    (tmp_path / "record").write_text(record())
    stand_in.write_text(SCONTROL.format(calls=tmp_path / "calls", record=tmp_path / "record"))
    stand_in.chmod(0o755)
    found = environment(
        SLURM_JOB_ID=4711,
        SLURM_JOB_NUM_NODES=1,
        SLURM_JOB_NODELIST="here",
        SLURM_GPUS_ON_NODE=1,
        SRUN="env SLURM_NODEID=0",
        TZ="UTC",  # of the record's times
    )
    return found | {"PATH": f"{stand_in.parent}:{found['PATH']}"}


def slurm(job: dict[str, str], *words: object, **knobs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", LAUNCH / "slurm.sh", *map(str, words)],
        env=job | {name: str(value) for name, value in knobs.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


LAUNCHER = """#!/bin/sh
echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $JOB $NPROC_PER_NODE $MAX_RESTARTS"
exec "$PYTHON" "$@"
"""


def test_a_batch_script_runs_a_recipe_on_its_nodes(
    slurm_job: dict[str, str], tmp_path: Path
) -> None:
    launcher = tmp_path / "bin" / "launcher"  # in torchrun.sh's place: says what it is given
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    recipe = ROOT / "examples/recipe/04_prune.sh"
    done = slurm(slurm_job, recipe, EXTRA="--dry-run", LAUNCH=launcher, UNITS="masks")
    assert done.returncode == 2, done.stderr  # the recipe's data are not there
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "job 4711, start 1: 127.0.0.1",
        "1 0 127.0.0.1 24711 4711 1 3",
        "# megashear prune --config <this file>",
    ]
    assert "target: llama2-2.7b" in lines


@pytest.mark.parametrize(
    ("knobs", "said", "calls"),
    [
        ({}, "status 143 after", []),
        ({"SHORTEST": 0}, "queued again, to resume", ["requeue 4711"]),
        ({"SHORTEST": 0, "SLURM_RESTART_COUNT": 50}, "MAX_REQUEUES=50 reached", []),
    ],
    ids=["too soon", "stopped", "too often"],
)
def test_a_job_that_was_stopped_is_queued_again(
    slurm_job: dict[str, str], tmp_path: Path, knobs: dict[str, object], said: str, calls: list[str]
) -> None:
    done = slurm(slurm_job, "sh", "-c", "exit 143", **knobs)
    noted = tmp_path / "calls"
    assert (noted.read_text().splitlines() if noted.exists() else []) == calls
    assert said in done.stdout + done.stderr
    assert done.returncode == (0 if calls else 143)


@pytest.mark.parametrize(
    ("before", "after", "calls"),
    [("None", "2026-01-02T05:06:07", 1), ("None", "None", 0), ("2026-01-02T05:06:07",) * 2 + (0,)],
    ids=["now", "never", "at an earlier start"],
)
def test_a_young_job_that_was_preempted_is_queued_again(
    slurm_job: dict[str, str], tmp_path: Path, before: str, after: str, calls: int
) -> None:
    (tmp_path / "record").write_text(record(preempted=before))
    (tmp_path / "then").write_text(record(preempted=after))
    leave = f"cp {tmp_path / 'then'} {tmp_path / 'record'}; exit 143"
    done = slurm(slurm_job, "sh", "-c", leave)  # far sooner than SHORTEST
    noted = tmp_path / "calls"
    assert (noted.read_text().splitlines() if noted.exists() else []) == ["requeue 4711"] * calls
    assert (f"preempted at {after}" in done.stdout) == bool(calls)
    assert done.returncode == (0 if calls else 143)


@pytest.mark.parametrize(
    ("before", "after", "calls"),
    [
        *(("200", "300", 1), ("900", "1000", 1), (None, "0", 1)),
        *(("200", "200", 0), (None, None, 0), ("300", "200", 0), ("200", "nonsense", 0)),
    ],
    ids=["further", "longer", "the first", "stuck", "none at all", "gone back", "no number"],
)
def test_a_failing_job_goes_on_only_while_its_checkpoints_do(
    slurm_job: dict[str, str], tmp_path: Path, before: str | None, after: str | None, calls: int
) -> None:
    tracker = tmp_path / "save" / TRACKER
    tracker.parent.mkdir()
    if before is not None:
        tracker.write_text(before)
    step = f"echo {after} > {tracker}; exit 1" if after is not None else "exit 1"
    # often enough that without SAVE it would not be queued again
    done = slurm(
        slurm_job, "sh", "-c", step, SHORTEST=0, SAVE=tracker.parent, SLURM_RESTART_COUNT=9
    )
    assert (tmp_path / "calls").exists() == bool(calls)
    assert (f"no later checkpoint in {tracker.parent} since" in done.stderr) == (not calls)
    assert done.returncode == (0 if calls else 1)


@pytest.mark.parametrize(
    ("restarts", "left", "calls"),
    [(2, 86400, 1), (3, 86400, 0), (3, 250, 1)],
    ids=["seldom", "often", "time over"],
)
def test_without_sight_of_checkpoints_failures_are_counted(
    slurm_job: dict[str, str], tmp_path: Path, restarts: int, left: int, calls: int
) -> None:
    (tmp_path / "record").write_text(record(left=left))
    done = slurm(slurm_job, "sh", "-c", "exit 1", SHORTEST=0, SLURM_RESTART_COUNT=restarts)
    assert (tmp_path / "calls").exists() == bool(calls)
    assert ("With SAVE set" in done.stderr) == (not calls)


def test_a_job_that_is_done_is_not(slurm_job: dict[str, str], tmp_path: Path) -> None:
    done = slurm(slurm_job, "true", SHORTEST=0)
    assert done.returncode == 0
    assert "done after" in done.stdout
    assert not (tmp_path / "calls").exists()


def test_a_batch_script_without_a_script_says_how(slurm_job: dict[str, str]) -> None:
    done = slurm(slurm_job)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
