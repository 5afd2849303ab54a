"""What forked ranks need before any of them starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting ranks must not spin

import signal
import threading
from typing import Any

import pytest
import torch
import tqdm

from tests import sampling, time_limits

# a shell that starts pytest in the background ignores SIGINT for it and for all that it starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# forking after threaded ops hangs the child
torch.set_num_threads(1)
# tqdm's own lock is shared with forked processes: one that is killed as it draws its bar would keep
# it, and stop every bar drawn later
tqdm.tqdm.set_lock(threading.RLock())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--slow``."""
    parser.addoption("--slow", action="store_true", help="run every case of the long matrices")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a plain run leaves out; mark the rest with time limits."""
    sampling.deselect(config, items)
    time_limits.pytest_collection_modifyitems(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what stopped tests left; pass the count of cases left out to the process that reports."""
    time_limits.pytest_sessionfinish()
    if hasattr(session.config, "workeroutput"):  # one process of several
        count = session.config.stash.get(sampling.LEFT_OUT, 0)
        session.config.workeroutput["left_out"] = count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the count of a process that ran tests; all of them left out the same."""
    output = getattr(node, "workeroutput", None) or {}
    node.config.stash[sampling.LEFT_OUT] = output.get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which sample was taken."""
    if not sampling.is_wanted_whole(config):
        terminalreporter.write_line(sampling.summary(config))
