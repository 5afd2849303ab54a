"""The device seam: cuda with nccl, or cpu with gloo, under an unmodified megatron-core.

megatron-core 0.16.1 names CUDA devices outright in its schedules, pipeline sends, sequence-parallel
buffers, optimizers and random-state tracker. Without CUDA, ``install`` gives every loaded
``megatron.core`` module a stand-in for its global ``torch`` whose ``torch.cuda`` answers for the
CPU; torch as everybody else sees it stays as it is, but for the two methods named in
``_patch_tensor_methods``. On every device it puts `add_product` in the place of Apex's extension
for the gradients of weights, where that is not there; with CUDA it changes nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed

from megashear.config import ModelConfig, ParallelConfig

SUPPORTED_MEGATRON_CORE = "0.16.1"
"""The one version whose every use of CUDA below was read; another may hide new ones."""

# Modules that hold a global ``torch`` and may be imported later than the seam is installed; a
# module that comes after it would keep the real torch and fail on its first CUDA literal.
_MODULES = (
    "tensor_parallel",
    "tensor_parallel.random",
    "pipeline_parallel",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "distributed",
    "distributed.finalize_model_grads",
    "optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer_param_scheduler",
    "models.gpt",
    "models.gpt.gpt_layer_specs",
    "transformer.utils",
    "timers",
    "utils",
    "parallel_state",
    "rerun_state_machine",
    "datasets.gpt_dataset",
    "dist_checkpointing",
    "dist_checkpointing.serialization",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.tensor_aware_state_dict",
)

_compiles = False
"""Of `choose_kernels`: a state of the process, as the seam itself is."""

# torch functions that megatron-core calls with ``device="cuda"`` or the current CUDA device.
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

_CPU = torch.device("cpu")

# Parameters of glibc's mallopt, from its malloc.h: how many blocks may be maps of their own, and
# how many free bytes at the end of the heap are given back.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device on which this process holds weights and activations."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def backend() -> str:
    """Return the torch.distributed backend that fits the device: nccl or gloo."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def select(local_rank: int) -> None:
    """Make CUDA device ``local_rank`` (its index on this host) current; nothing without CUDA.

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
    """Wait until the device has done its work, so that a clock read means something."""
    if has_cuda():
        torch.cuda.synchronize()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in memory that a GPU reads while the host goes on; itself without CUDA.

    Copied from other memory, even a few kilobytes have the host wait for all work that the device
    was given before, and the device then for the host.
    """
    return tensor if not has_cuda() or tensor.is_pinned() else tensor.pin_memory()


def name() -> str | None:
    """What the driver calls this process's CUDA device; None without."""
    return torch.cuda.get_device_name() if has_cuda() else None


def memory_in_use() -> dict[str, float]:
    """Memory of this process, GB of 1e9 bytes.

    Returns:
        ``resident``: what it has on its host. With CUDA also ``allocated``, the most that tensors
        took on the device so far, and ``reserved``, the most that torch's allocator took for them.
    """
    found = {"resident": psutil.Process().memory_info().rss / 1e9}
    if has_cuda():
        found["allocated"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved"] = torch.cuda.max_memory_reserved() / 1e9
    return found


@contextlib.contextmanager
def waiting_inside(around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Have the host wait for collectives and messages inside ``around()`` while the block lasts.

    With CUDA nothing changes, for there the device waits and not the host.
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
    """Have the C library keep what tensors free for the next ones; nothing with CUDA.

    By default it gives a large block back to the kernel as soon as it is free, and the next step
    takes a page fault for every 4 KiB of its activations. Memory that was needed once stays with
    the process. Only glibc knows the two settings, and one that the user chose (mallopt(3),
    environment) counts more.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if has_cuda() or chosen:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left.T @ right, without writing the product down where a kernel can.

    Args:
        total: [m, n], of the factors' precision or float32.
        left: [tokens, m].
        right: [tokens, n].
    """
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif total.is_cuda and _adds_wider(left.dtype):
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left.t() @ right)


@functools.cache
def _adds_wider(factors: torch.dtype) -> bool:
    """Whether this GPU and torch add a product of ``factors`` to a float32 total, and rightly.

    Tried, not looked up: which devices and versions of torch can is nowhere said.
    """
    left, right = (torch.eye(16, device=device(), dtype=factors) for _ in range(2))
    total = torch.ones(16, 16, device=device())
    try:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # no such kernel; no such argument
        return False
    return torch.equal(total, 1.0 + torch.eye(16, device=device()))


def compiles_kernels() -> bool:
    """Whether elementwise functions run compiled in this process, see `choose_kernels`."""
    return _compiles


def compile_obstacle() -> str | None:
    """Why torch.compile makes no kernels for this process; None where it does. Tried on a tiny one.

    It needs a GPU, Triton, a C compiler and a folder to write to, and says so when it is used.
    """
    if not has_cuda():
        return "no CUDA device"

    def double(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return x + x, torch.compiler.is_compiling()

    try:
        two, was_compiled = torch.compile(double)(torch.ones(2, device=device()))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    if not was_compiled:
        return "it is switched off, as by TORCH_COMPILE_DISABLE=1"
    return None if two.eq(2).all() else "it computes 1 + 1 wrongly"


def choose_kernels(*, compiled: bool) -> None:
    """Say whether elementwise functions run compiled; alike on all ranks, for copies that they
    compute must stay bit-equal."""
    global _compiles
    _compiles = compiled


def use_deterministic_kernels() -> None:
    """Choose deterministic kernels, for runs that must repeat bit for bit on a GPU."""
    # cuBLAS is deterministic only with a workspace of fixed size, read when CUDA starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Transformer Engine checks its own, and NCCL may choose another order of sums at each start
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)


def seed_model_parallel(seed: int) -> None:
    """Seed megatron-core's random-state tracker, from which fresh weights are drawn.

    ``seed`` is the run's; ranks of one tensor group get different states from it, as in Megatron.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def find_accelerators() -> dict[str, bool]:
    """Find which optional libraries are here: NVIDIA Apex (fused Adam), Transformer Engine.

    The registry's package called ``apex`` is another project: only one with NVIDIA's optimizers
    counts.
    """
    return {
        "apex": _importable("apex.optimizers"),
        "transformer_engine": _importable("transformer_engine.pytorch"),
    }


def check_settings(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Refuse what this device cannot do, and what megatron-core 0.16.1 would corrupt silently.

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

    Packages' metadata are read and nothing is imported: a core that does not fit may fail to load.

    Args:
        cuda: version that torch was built for; None without.

    Returns:
        None where they fit, or where one of them is not here.
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
    """Name the extra of megashear that brings Transformer Engine for torch's CUDA."""
    return "gpu" if cuda is None else f"gpu-cu{cuda.partition('.')[0]}"


def pipeline_settings(parallel: ParallelConfig) -> dict[str, bool]:
    """TransformerConfig fields of the pipeline that keep its gradients right.

    Batched sends under the interleaved schedule with two stages, and deallocated outputs while
    sends overlap, both give wrong gradients without an error (docs/megatron_core.md).
    """
    return {
        "batch_p2p_comm": False,
        "overlap_p2p_comm": parallel.overlap_p2p_communication,
        "deallocate_pipeline_outputs": parallel.pipeline_model_parallel_size > 1
        and not parallel.overlap_p2p_communication,
    }


def install() -> None:
    """Make megatron-core usable on this machine; call before any of its parts is used.

    Raises:
        RuntimeError: megatron-core is missing, of another version, or cannot be imported.
    """
    _check_megatron_core()
    _install_add_product()
    if not has_cuda():
        _install_cpu()


@functools.cache
def _check_megatron_core() -> None:
    way_out = f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
    try:
        import megatron.core
    except ImportError as error:
        way_out = engine_mismatch(torch.version.cuda) or way_out
        raise RuntimeError(f"megatron-core cannot be imported ({error}); {way_out}") from error
    except OSError as error:  # a library of Transformer Engine whose own libraries are not there
        way_out = engine_mismatch(torch.version.cuda) or "see which library it names"
        raise RuntimeError(f"megatron-core cannot be imported ({error}); {way_out}") from error
    except RuntimeError as error:
        # the empty meta package of Transformer Engine raises here (docs/megatron_core.md)
        raise RuntimeError(
            f"megatron-core cannot be imported: {error}; if transformer-engine was installed "
            f"without its CUDA extra, pip uninstall transformer-engine"
        ) from error
    require_version(megatron.core.__version__)


def require_version(found: str) -> None:
    """Refuse a megatron-core other than the one this seam was written for.

    Raises:
        RuntimeError: ``found`` is another version.
    """
    if found != SUPPORTED_MEGATRON_CORE:
        raise RuntimeError(
            f"megatron-core {found} is installed; megashear knows {SUPPORTED_MEGATRON_CORE} only, "
            f"because other versions may use the device differently; "
            f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
        )


@functools.cache
def _install_add_product() -> None:
    """Have megatron-core add gradients of weights up through `add_product` without Apex."""
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    if has_cuda() and layers._grad_accum_fusion_available:
        return  # Apex's extension does it, and does not look where its tensors lie

    def add(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        add_product(main_grad, grad_output, total_input)

    stand_in: Any = types.ModuleType("fused_weight_gradient_mlp_cuda for torch alone")
    # named after the precision of the gradient that is added to
    stand_in.wgrad_gemm_accum_fp32 = stand_in.wgrad_gemm_accum_fp16 = add
    layers.fused_weight_gradient_mlp_cuda = stand_in
    layers._grad_accum_fusion_available = True


@functools.cache
def _install_cpu() -> None:
    for module in _MODULES:
        importlib.import_module(f"megatron.core.{module}")
    # Transformer Engine would make the placeholders of gradients on a CUDA device
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.HAVE_TE = False
    stand_in = _torch_for_cpu()
    for name, module_object in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module_object, "torch", None) is torch:
            module_object.torch = stand_in  # type: ignore[attr-defined]
    _replace_random_state()
    _patch_tensor_methods()
    # an advice for GPUs, from every layer
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")


class _StandIn(types.ModuleType):
    """A module that answers for ``real`` except where attributes were set on it."""

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(f"{real.__name__} for megatron-core on cpu")
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Stream:
    """A CUDA stream or event on a device that runs everything in order."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _torch_for_cpu() -> types.ModuleType:
    stand_in = _StandIn(torch)
    for name in _FACTORIES:
        setattr(stand_in, name, _on_cpu(getattr(torch, name)))
    stand_in.autocast = lambda kind, *args, **kwargs: torch.autocast(  # type: ignore[attr-defined]
        "cpu" if kind == "cuda" else kind, *args, **kwargs
    )
    stand_in.cuda = _cuda_for_cpu()  # type: ignore[attr-defined]
    return stand_in


def _cuda_for_cpu() -> types.ModuleType:
    cuda: Any = _StandIn(torch.cuda)
    for name in ("synchronize", "empty_cache", "set_device", "ipc_collect"):
        setattr(cuda, name, _nothing)
    cuda.reset_peak_memory_stats = _nothing
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("Stream", "Event", "current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Stream())
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    return cuda


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made_on_cpu(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        # an int is the index of a CUDA device
        if wanted is not None and (isinstance(wanted, int) or torch.device(wanted).type == "cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return made_on_cpu


def _replace_random_state() -> None:
    # The tracker keeps one state of "the device generator" per parallel region; here that is the
    # CPU's default generator.
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state


def _patch_tensor_methods() -> None:
    # The mixed-precision optimizers compare ``tensor.type()`` with 'torch.cuda.FloatTensor', and
    # a few places call ``tensor.cuda()``. Methods cannot be replaced for one caller, so these two
    # look who calls; every caller outside megatron.core gets the real one.
    real_type: Any = torch.Tensor.type
    real_cuda: Any = torch.Tensor.cuda

    def called_by(package: str) -> bool:
        caller = sys._getframe(2).f_globals.get("__name__", "")
        return caller.startswith(package)

    @functools.wraps(real_type)
    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(tensor, *args, **kwargs)
        if isinstance(answer, str) and called_by("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    @functools.wraps(real_cuda)
    def cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if called_by("megatron.core") else real_cuda(tensor, *args, **kwargs)

    tensor_class: Any = torch.Tensor
    tensor_class.type, tensor_class.cuda = type_, cuda


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, RuntimeError):
        return False
