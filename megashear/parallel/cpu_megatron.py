"""megatron-core on this machine: its version, and a stand-in for CUDA where there is none.

megatron-core 0.16.1 names CUDA devices outright in its schedules, pipeline sends, sequence-parallel
buffers, optimizers and random-state tracker. Without CUDA, `install` gives every loaded
``megatron.core`` module a stand-in for its global ``torch`` whose ``torch.cuda`` answers for the
CPU. Everybody else keeps the real torch, except for the two methods that `_patch_tensor_methods`
names. On every device `install` also puts `kernel_choice.add_product` in the place of Apex's
extension for the gradients of weights, where that extension is missing. With CUDA it changes
nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from megashear.parallel import device
from megashear.parallel.kernel_choice import add_product

SUPPORTED_MEGATRON_CORE = "0.16.1"
"""The version whose every use of CUDA was read for this module; another may have new ones."""

# Modules that hold a global ``torch`` and that others import late. They are imported before the
# stand-in is installed: a module imported after it would keep the real torch and fail on its first
# CUDA literal.
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


def install() -> None:
    """Make megatron-core usable on this machine. Call it before any part of megatron-core is used.

    Raises:
        RuntimeError: megatron-core is missing, has another version, or cannot be imported.
    """
    _check_megatron_core()
    _install_add_product()
    if not device.has_cuda():
        _install_cpu()


@functools.cache
def _check_megatron_core() -> None:
    way_out = f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
    try:
        import megatron.core
    except ImportError as error:
        way_out = device.engine_mismatch(torch.version.cuda) or way_out
        raise RuntimeError(f"megatron-core cannot be imported ({error}); {way_out}") from error
    except OSError as error:  # a library of Transformer Engine needs a library that is missing
        way_out = device.engine_mismatch(torch.version.cuda) or "see which library it names"
        raise RuntimeError(f"megatron-core cannot be imported ({error}); {way_out}") from error
    except RuntimeError as error:
        # the empty meta package of Transformer Engine raises here (docs/megatron_core.md)
        raise RuntimeError(
            f"megatron-core cannot be imported: {error}; if transformer-engine was installed "
            f"without its CUDA extra, pip uninstall transformer-engine"
        ) from error
    require_version(megatron.core.__version__)


def require_version(found: str) -> None:
    """Refuse another megatron-core than the one that this module was written for.

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
    """Have megatron-core accumulate gradients of weights by `add_product` where Apex is missing."""
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    if device.has_cuda() and layers._grad_accum_fusion_available:
        return  # Apex's extension does it, for tensors of a GPU only

    def add(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        add_product(main_grad, grad_output, total_input)

    stand_in: Any = types.ModuleType("fused_weight_gradient_mlp_cuda for torch alone")
    # both names, one for each precision of the accumulated gradient
    stand_in.wgrad_gemm_accum_fp32 = stand_in.wgrad_gemm_accum_fp16 = add
    layers.fused_weight_gradient_mlp_cuda = stand_in
    layers._grad_accum_fusion_available = True


@functools.cache
def _install_cpu() -> None:
    for module in _MODULES:
        importlib.import_module(f"megatron.core.{module}")
    # with Transformer Engine, placeholders of gradients would be made on a CUDA device
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.HAVE_TE = False
    stand_in = _torch_for_cpu()
    for name, module_object in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module_object, "torch", None) is torch:
            module_object.torch = stand_in  # type: ignore[attr-defined]
    _replace_random_state()
    _patch_tensor_methods()
    # every layer would print this advice, which is for GPUs
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")


class _StandIn(types.ModuleType):
    """A module that answers for ``real`` except where attributes were set on it."""

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(f"{real.__name__} for megatron-core on cpu")
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _CudaStream:
    """A CUDA stream or event of a device that runs everything in order."""

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
        setattr(cuda, name, lambda *args, **kwargs: _CudaStream())
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
    # The tracker keeps a state of "the device's generator" for each parallel region. Here that is
    # the default generator of the CPU.
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state


def _patch_tensor_methods() -> None:
    # The mixed-precision optimizers compare ``tensor.type()`` with 'torch.cuda.FloatTensor', and
    # a few places call ``tensor.cuda()``. A method cannot be replaced for one caller alone, so
    # these two look at who calls them; callers outside megatron.core get the real method.
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
