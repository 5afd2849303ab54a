"""How long a test may take, and what is ended with one that takes longer.

pytest-timeout's method is a signal: it raises in the test that hangs, so that ``finally`` ends the
ranks which the test started, the test is named, and the next one runs.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

LIMITS_S = {"distributed": 300, "end_to_end": 900}
"""Limit by folder, many times what its slowest test takes on two quiet cores. Elsewhere it is the
one in pyproject.toml; a mark at a test counts before both."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of the slow folders with its limit."""
    for item in items:
        limit = LIMITS_S.get(Path(item.path).parent.name)
        if limit is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit))


def pytest_sessionfinish() -> None:
    """End the processes that a stopped test left: Python would wait for them before it exits."""
    for process in multiprocessing.active_children():
        process.kill()
