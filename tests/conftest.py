"""One thread before any torch op: forking after threaded ops hangs the child."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting ranks must not spin

import torch

torch.set_num_threads(1)
