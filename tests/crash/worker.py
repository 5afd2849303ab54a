"""A process of torchrun that tells what it is doing: the run in a file, a command of megashear."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch

from megashear.parallel.launch import recorded
from tests.crash.attempt import start
from tests.crash.phases import Reporter


def main() -> int:
    """Run the configuration in the second argument, telling phases to the pipe in the first."""
    pipe, config = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    Reporter(pipe, int(os.environ["RANK"])).install()
    start(pickle.loads(config.read_bytes()))
    return 0


if __name__ == "__main__":
    raise SystemExit(recorded(main))
