"""What a run ran on and how it was started, which its checkpoints keep."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from megatron import core

from megashear import __version__
from megashear.parallel import device


def environment(world_size: int, command: Sequence[str]) -> dict[str, Any]:
    """Return versions, device, processes and command of this start, as plain values.

    Args:
        world_size: number of processes.
        command: words of the command line from the command's name on; none where there was none.
    """
    return {
        "megashear": __version__,
        "torch": torch.__version__,
        "megatron-core": core.__version__,
        "python": platform.python_version(),
        "device": device.name() or "CPU",
        "processes": world_size,
        "processes on a host": int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        "command": list(command),
    }
