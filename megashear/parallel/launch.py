"""Start and end torch.distributed from torchrun's environment."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from megashear.config import ModelConfig, ParallelConfig
from megashear.config.defaults import TIMEOUT_MINUTES
from megashear.parallel import cpu_megatron, device, kernel_choice
from megashear.parallel.agree import gather_objects
from megashear.parallel.groups import ParallelGroups

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def distributed(
    parallel: ParallelConfig, model: ModelConfig, *, timeout_s: float = 60 * TIMEOUT_MINUTES
) -> Iterator[ParallelGroups]:
    """Join the processes that torchrun started, or be the only one, and divide them into groups.

    Errors in the configuration and in the environment are raised before processes meet. Collective
    over the world.

    Args:
        parallel: the layout.
        model: settings that the device must support.
        timeout_s: seconds after which a collective fails if a rank does not enter it.

    Raises:
        ValueError: layout, device or settings do not fit; on every rank alike.
        RuntimeError: megatron-core is missing or has another version.
    """
    # refuse; srun sets this variable for each of its steps, not for the batch script around them
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ValueError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks that do not know of each "
            f"other; start one per node, each with torchrun -m megashear"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel.data_parallel_size(world_size)
    cpu_megatron.install()
    device.check_settings(parallel, model)
    # prepare the device
    device.select(int(os.environ.get("LOCAL_RANK", "0")))
    device.keep_memory()
    if model.deterministic_mode:
        kernel_choice.use_deterministic_kernels()
    # meet
    with process_group(timeout_s=timeout_s):
        groups = ParallelGroups.create(parallel)
        _choose_kernels(model)
        found = [name for name, is_here in device.find_accelerators().items() if is_here]
        logger.info(
            "%d processes on %s: tensor %d, pipeline %d, data %d; optional packages found: %s",
            groups.world_size,
            device.device().type,
            groups.tensor_size,
            groups.pipeline_size,
            groups.data_size,
            ", ".join(found) or "no apex or transformer_engine, so torch's own are used",
        )
        if (wrong := device.engine_mismatch()) is not None:
            logger.warning("%s", wrong)
        try:
            yield groups
        finally:
            groups.destroy()


def _choose_kernels(model: ModelConfig) -> None:
    """Compile elementwise functions if every rank can. Collective over the world."""
    if model.deterministic_mode:
        # the compilers of two processes may choose different orders of sums
        kernel_choice.choose_kernels(compiled=False)
        return
    obstacles = gather_objects(kernel_choice.compile_obstacle())
    kernel_choice.choose_kernels(compiled=not any(obstacles))
    if device.has_cuda() and any(obstacles):
        rank = next(rank for rank, obstacle in enumerate(obstacles) if obstacle)
        logger.warning(
            "torch.compile does not work on rank %d (%s): elementwise parts run as torch's single "
            "operators on all ranks, which is slower",
            *(rank, obstacles[rank]),
        )


def recorded(main: Callable[[], int]) -> int:
    """Run ``main`` as a process of torchrun, whose report of a failure will have the traceback."""
    status = record(main)()
    # `record` returns None for SystemExit(0) of --help and --dry-run, and raises errors again
    return 0 if status is None else status


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Return a part of torchrun's store that holds nothing of an earlier attempt.

    torchrun keeps one store over restarts and, since torch 2.5, gives attempts no prefix. So a
    restarted rank may read the address of a process that has ended, and fail to connect. Counts of
    restarts differ between hosts and cannot distinguish attempts. Therefore every rank writes a new
    mark. Rank 0 writes a call with the marks that it finds and a new name. When all ranks have
    answered a call that has their marks, its name is the prefix.

    Args:
        store: the store of torchrun.
        rank: number of this process.
        world_size: number of processes.
        timeout_s: seconds to wait for other ranks.

    Raises:
        RuntimeError: some ranks did not come in time; rank 0 names them.

    Source: https://github.com/pytorch/pytorch/issues/135712
    """
    mark = uuid.uuid4().hex
    store.set(f"{_MEETING}/mark/{rank}", mark)
    deadline = time.monotonic() + timeout_s
    call, called = "", [""] * world_size
    while time.monotonic() < deadline:
        if rank == 0:
            marks = _read(store, [f"{_MEETING}/mark/{other}" for other in range(world_size)])
            if marks != called:
                call, called = uuid.uuid4().hex, marks
                store.set(f"{_MEETING}/call", json.dumps([call, called]))
            answers = _read(store, [f"{call}/{other}" for other in range(1, world_size)])
            if all(answers):
                store.set(f"{call}/go", "1")
                return dist.PrefixStore(call, store)
        elif found := _read(store, [f"{_MEETING}/call"])[0]:
            call, called = json.loads(found)
            if rank < len(called) and called[rank] == mark:
                store.set(f"{call}/{rank}", "1")
                if store.check([f"{call}/go"]):
                    return dist.PrefixStore(call, store)
        time.sleep(0.05)
    if rank == 0:
        missing = [other for other, answer in enumerate(["1", *answers]) if not answer]
        raise RuntimeError(f"ranks {missing} did not come to the start in {timeout_s:g} s")
    raise RuntimeError(f"rank {rank}: the start did not come about in {timeout_s:g} s")


def _read(store: dist.Store, keys: list[str]) -> list[str]:
    """Return the values of keys, "" for keys that are not there yet, without waiting."""
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]


_MEETING = "megashear/meeting"


@contextlib.contextmanager
def process_group(*, timeout_s: float = 60 * TIMEOUT_MINUTES) -> Iterator[None]:
    """Open torch.distributed for the block: with the processes of torchrun, or with this one alone.

    If a process group is open already, it is used and stays open.
    """
    if dist.is_initialized():
        yield
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = fresh_store(store, rank, world_size, timeout_s)
        dist.init_process_group(
            device.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        yield
        # Not after an error: destroying a group of nccl waits for peers that wait for this rank,
        # and torchrun ends them only after this process has ended.
        dist.destroy_process_group()
    else:
        # without a port, which another process may have taken
        with _own_store(device.backend()) as store:
            dist.init_process_group(
                device.backend(), store=store, rank=0, world_size=1, timeout=timeout
            )
            try:
                yield
            finally:
                dist.destroy_process_group()


@contextlib.contextmanager
def _own_store(backend: str) -> Iterator[dist.Store]:
    """Yield a store for one process: in memory under gloo, so that no file is left."""
    if backend == "gloo":
        yield dist.HashStore()
    else:  # nccl has not been tried with a store in memory
        with tempfile.TemporaryDirectory(prefix="megashear-") as folder:
            yield dist.FileStore(f"{folder}/store", 1)
