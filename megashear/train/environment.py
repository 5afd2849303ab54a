"""What a run ran on and how it was started, which its checkpoints keep."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from megashear import __version__
from megashear.parallel import device
from megashear.parallel.groups import ParallelGroups

ENVIRONMENT = "environment"
"""Key of `environment` in a checkpoint's details."""


def environment(groups: ParallelGroups, command: Sequence[str]) -> dict[str, Any]:
    """Return versions, device, processes and command of this start, as plain values.

    Args:
        groups: where this rank stands.
        command: words of the command line from the command's name on; none where there was none.
    """
    return {
        "megashear": __version__,
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "python": platform.python_version(),
        "device": device.name() or "CPU",
        "processes": groups.world_size,
        "processes on a host": int(os.environ.get("LOCAL_WORLD_SIZE", groups.world_size)),
        "command": list(command),
    }
