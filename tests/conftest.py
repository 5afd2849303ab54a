"""What forked ranks need before any of them starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting ranks must not spin

import threading

import torch
import tqdm

from tests.time_limits import pytest_collection_modifyitems, pytest_sessionfinish

__all__ = ["pytest_collection_modifyitems", "pytest_sessionfinish"]

# forking after threaded ops hangs the child
torch.set_num_threads(1)
# tqdm's own lock is shared with forked processes: one that is killed as it draws its bar would keep
# it, and stop every bar drawn later
tqdm.tqdm.set_lock(threading.RLock())
