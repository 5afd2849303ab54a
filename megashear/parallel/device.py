"""The device of this process, CUDA or CPU, and the libraries that are installed for it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed

from megashear.config import ModelConfig, ParallelConfig

_CPU = torch.device("cpu")

# Parameters of mallopt, from glibc's malloc.h: the most blocks that are maps of their own, and the
# free bytes at the end of the heap above which the heap shrinks.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def has_cuda() -> bool:
    """Return whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device on which this process holds weights and activations."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def backend() -> str:
    """Return the torch.distributed backend that fits the device: nccl or gloo."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def select(local_rank: int) -> None:
    """Make CUDA device ``local_rank``, an index on this host, current. Without CUDA do nothing.

    Raises:
        ValueError: this host has fewer devices than processes.
    """
    if not has_cuda():
        return
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this host has no GPU: {torch.cuda.device_count()} found; "
            f"start at most that many processes here (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)


def synchronize() -> None:
    """Wait until the device has done its work, so that a clock can be read."""
    if has_cuda():
        torch.cuda.synchronize()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in pinned memory, which a GPU reads while the host works; ``tensor`` on a CPU.

    To copy even a few kilobytes from other memory, the host waits for all work that the device was
    given before, and the device then waits for the host.
    """
    return tensor if not has_cuda() or tensor.is_pinned() else tensor.pin_memory()


def name() -> str | None:
    """Return the driver's name of this process's CUDA device; None without CUDA."""
    return torch.cuda.get_device_name() if has_cuda() else None


def memory_in_use() -> dict[str, float]:
    """Return the memory of this process by name, GB of 1e9 bytes.

    Returns:
        ``resident``: on the host, now. With CUDA also ``allocated``, the most that tensors took on
        the device so far, and ``reserved``, the most that torch's allocator took for them.
    """
    found = {"resident": psutil.Process().memory_info().rss / 1e9}
    if has_cuda():
        found["allocated"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved"] = torch.cuda.max_memory_reserved() / 1e9
    return found


@contextlib.contextmanager
def waiting_inside(around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Put every wait of the host for a collective or a message inside a context ``around()``.

    The block of this context manager is where that holds. With CUDA nothing changes, because there
    the device waits and not the host.
    """
    if has_cuda():
        yield
        return
    # every call of torch.distributed ends in the wait of the work that it began
    work: Any = torch.distributed.Work
    real = work.wait

    @functools.wraps(real)
    def wait(*args: Any, **kwargs: Any) -> Any:
        with around():
            return real(*args, **kwargs)

    work.wait = wait
    try:
        yield
    finally:
        work.wait = real


def keep_memory() -> None:
    """Have the C library keep memory that tensors free. With CUDA do nothing.

    By default the C library gives a large block back to the kernel as soon as it is free, and the
    next step takes a page fault for every 4 KiB of its activations. Instead, memory that was needed
    once stays with the process. Only glibc has the two settings, and settings that the user made
    in the environment (mallopt(3)) are left alone.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if has_cuda() or chosen:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def seed_model_parallel(seed: int) -> None:
    """Seed megatron-core's random-state tracker, from which fresh weights are drawn.

    Ranks of one tensor group get different states from one ``seed``, as in Megatron-LM.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def find_accelerators() -> dict[str, bool]:
    """Return which optional libraries are installed: NVIDIA Apex (fused Adam), Transformer Engine.

    The registry's package called ``apex`` is another project, so only a package with NVIDIA's
    optimizers counts.
    """
    return {
        "apex": _importable("apex.optimizers"),
        "transformer_engine": _importable("transformer_engine.pytorch"),
    }


def check_settings(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Refuse layers of Transformer Engine where this machine cannot run them.

    Raises:
        ValueError: names the flag and the way out.
    """
    if model.transformer_impl == "transformer_engine":
        if not has_cuda():
            raise ValueError(
                "--transformer-impl transformer_engine needs a CUDA device and none is found; use "
                "--transformer-impl local"
            )
        if not find_accelerators()["transformer_engine"]:
            raise ValueError(
                f"--transformer-impl transformer_engine: Transformer Engine is not installed; "
                f"install megashear[{_engine_extra(torch.version.cuda)}], or use "
                f"--transformer-impl local"
            )
        if (wrong := engine_mismatch(torch.version.cuda)) is not None:
            raise ValueError(
                f"--transformer-impl transformer_engine: {wrong}, or use --transformer-impl local"
            )


def engine_mismatch(cuda: str | None = torch.version.cuda) -> str | None:
    """Return how Transformer Engine's core differs from torch's CUDA, with the way out.

    Only the metadata of packages are read: a core that does not fit may fail to be imported.

    Args:
        cuda: version of CUDA that torch was built for; None if it was built without.

    Returns:
        None where the two fit, or where one of them is missing.
    """
    found = {
        match[1]: f"{name} {part.version}"
        for part in importlib.metadata.distributions()
        if (name := str(part.metadata["Name"]).replace("_", "-"))
        and (match := re.fullmatch(r"transformer-engine-cu(\d+)", name))
    }
    if cuda is None or not found or cuda.partition(".")[0] in found:
        return None
    return (
        f"torch {torch.__version__} was built for CUDA {cuda}, and Transformer Engine's core "
        f"{' and '.join(found.values())} is for another; pip uninstall "
        f"{' '.join(f'transformer-engine-cu{line}' for line in found)} and install "
        f"megashear[{_engine_extra(cuda)}]"
    )


def _engine_extra(cuda: str | None) -> str:
    """Return the extra of megashear that installs Transformer Engine for torch's CUDA."""
    return "gpu" if cuda is None else f"gpu-cu{cuda.partition('.')[0]}"


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, RuntimeError):
        return False
