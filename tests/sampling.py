"""Which cases of a long matrix a plain run takes.

A test marked ``sampled(n)`` runs with ``n`` of its cases, chosen by the commit, so that every case
runs within some commits; so does a test without the mark that starts ranks, with `OF_RANKS` of
them. Of all tests marked ``scenario``, whole jobs that torchrun starts and something ends,
`NUM_SCENARIOS` run: no law and no twin is one of them. ``--slow`` runs all. Other tests always run
whole.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

SCENARIOS = "scenarios"
SEED_VARIABLE = "MEGASHEAR_TEST_SAMPLE"
NUM_SCENARIOS = 1
"""Tests marked ``scenario`` that a plain run takes."""
RANKS = "tests/distributed/"
"""Folder of the tests that start ranks."""
OF_RANKS = 1
"""Cases of each of these tests that a plain run takes, unless a mark says another number. All of
them take twice as long as the 15 minutes that `.ci/run` should take on two slow cores."""
LEFT_OUT = pytest.StashKey[int]()


def seed() -> str:
    """Return what chooses the sample: the variable, or the commit, or "0" without git."""
    if chosen := os.environ.get(SEED_VARIABLE):
        return chosen
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "0"
    return found.stdout.strip()[:12] or "0"


def sample(names: list[str], count: int, seed: str) -> set[str]:
    """Return ``count`` of ``names``, at least one; their order does not count."""
    assert count > 0

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode()).digest()

    return set(sorted(names, key=place)[:count])


def left_out(items: list[pytest.Item], seed: str) -> set[str]:
    """Return the node ids that a plain run leaves out."""
    matrices: dict[str, list[str]] = defaultdict(list)
    counts: dict[str, int] = {}
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None:
            function = item.nodeid.split("[", 1)[0]
            matrices[function].append(item.nodeid)
            (counts[function],) = mark.args
        elif item.get_closest_marker("scenario") is not None:
            matrices[SCENARIOS].append(item.nodeid)
            counts[SCENARIOS] = NUM_SCENARIOS
        elif item.nodeid.startswith(RANKS):
            function = item.nodeid.split("[", 1)[0]
            matrices[function].append(item.nodeid)
            counts[function] = OF_RANKS
    return {
        name
        for function, names in matrices.items()
        for name in set(names) - sample(names, counts[function], seed)
    }


def is_wanted_whole(config: pytest.Config) -> bool:
    """Return whether to leave no case out: with ``--slow``, or where one case was named."""
    return config.getoption("--slow") or any("[" in str(name) for name in config.args)


def deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the cases out that a plain run leaves out, and have pytest count them."""
    if is_wanted_whole(config):
        return
    out = left_out(items, seed())
    config.stash[LEFT_OUT] = len(out)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
    items[:] = [item for item in items if item.nodeid not in out]


def summary(config: pytest.Config) -> str:
    """Return a line that says which sample was taken, and how to run all."""
    count = config.stash.get(LEFT_OUT, 0)
    return (
        f"long matrices: {count} cases left out by sample {seed()} "
        f"({SEED_VARIABLE}=... chooses another; --slow runs all)"
    )
