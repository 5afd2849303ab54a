"""Start and end torch.distributed from torchrun's environment."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import tempfile
from collections.abc import Iterator

import torch.distributed as dist

from megashear.config import ModelConfig, ParallelConfig
from megashear.parallel import device
from megashear.parallel.groups import ParallelGroups

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def distributed(
    parallel: ParallelConfig, model: ModelConfig, *, timeout_s: float = 600.0
) -> Iterator[ParallelGroups]:
    """Join the processes that torchrun started, or be the only one, and divide them.

    Everything that the configuration and the environment alone can get wrong is refused before
    processes meet. Collective over the world.

    Args:
        parallel: how to divide the processes.
        model: checked against the device.
        timeout_s: seconds after which a collective that some rank does not enter fails.

    Raises:
        ValueError: layout, device or settings do not fit; the same on every rank.
        RuntimeError: megatron-core is missing or of another version.
    """
    # set by srun for each of its steps, not in a batch script around it
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ValueError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks that do not know of each "
            f"other; start one per node, each with torchrun -m megashear"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel.data_parallel_size(world_size)
    device.install()
    device.check_settings(parallel, model)
    device.select(int(os.environ.get("LOCAL_RANK", "0")))
    if model.deterministic_mode:
        device.use_deterministic_kernels()
    with process_group(timeout_s=timeout_s):
        groups = ParallelGroups.create(parallel)
        found = [name for name, is_here in device.find_accelerators().items() if is_here]
        logger.info(
            "%d processes on %s: tensor %d, pipeline %d, data %d; found of apex and "
            "transformer_engine: %s",
            groups.world_size,
            device.device().type,
            groups.tensor_size,
            groups.pipeline_size,
            groups.data_size,
            ", ".join(found) or "none, torch's own optimizers and kernels serve",
        )
        try:
            yield groups
        finally:
            groups.destroy()


@contextlib.contextmanager
def process_group(*, timeout_s: float = 600.0) -> Iterator[None]:
    """Hold torch.distributed open: torchrun's processes, or a private group of one.

    A process group that is open already is used and left open.
    """
    if dist.is_initialized():
        yield
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    with tempfile.TemporaryDirectory(prefix="megashear-") as folder:
        if "RANK" in os.environ:
            dist.init_process_group(device.backend(), timeout=timeout)
            yield
            # not after an error: tearing nccl down waits for peers that wait for this rank, and
            # torchrun ends them only once this process is gone
            dist.destroy_process_group()
        else:
            # alone: meet oneself through a file, so that no port can be taken
            store = dist.FileStore(f"{folder}/store", 1)
            dist.init_process_group(
                device.backend(), store=store, rank=0, world_size=1, timeout=timeout
            )
            try:
                yield
            finally:
                dist.destroy_process_group()
