"""The device seam: what it refuses, what it leaves alone, and that CUDA switches it off."""

import ast
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megashear.config import ModelConfig, ParallelConfig
from megashear.parallel import device

WITHOUT_CUDA = pytest.mark.skipif(device.has_cuda(), reason="the seam is off where CUDA is")


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the seam believe that this machine has one CUDA device."""
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def called_from(module: str, expression: str, **names: Any) -> Any:
    """``expression`` evaluated as if ``module`` contained it."""
    return eval(expression, {"__name__": module, **names})


def test_another_megatron_core_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.17\.0 is installed.*==0\.16\.1"):
        device.require_version("0.17.0")
    device.require_version("0.16.1")


def test_a_missing_megatron_core_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"cannot be imported.*pip install megatron-core=="):
        device._check_megatron_core.__wrapped__()


def test_a_broken_transformer_engine_is_told_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # what its empty package does to the import of megatron-core
    class Broken:
        @staticmethod
        def find_spec(name: str, *rest: Any) -> None:
            if name == "megatron.core":
                raise RuntimeError("Found empty `transformer-engine` meta package installed")

    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(RuntimeError, match=r"meta package.*pip uninstall transformer-engine"):
        device._check_megatron_core.__wrapped__()


@WITHOUT_CUDA
def test_transformer_engine_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a CUDA device.*--transformer-impl local"):
        device.check_settings(ParallelConfig(), ModelConfig(transformer_impl="transformer_engine"))


def test_a_missing_transformer_engine_is_refused(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(transformer_impl="transformer_engine")
    found = {"apex": False, "transformer_engine": False}
    monkeypatch.setattr(device, "find_accelerators", lambda: found)
    with pytest.raises(ValueError, match=r"not installed; install megashear\[gpu(-cu\d+)?\]"):
        device.check_settings(ParallelConfig(), model)
    found["transformer_engine"] = True
    device.check_settings(ParallelConfig(), model)


def install_core(folder: Path, monkeypatch: pytest.MonkeyPatch, line: int) -> None:
    """What pip leaves of Transformer Engine's core: its metadata."""
    info = folder / f"transformer_engine_cu{line}-2.20.2.dist-info"
    info.mkdir()
    name = f"transformer_engine_cu{line}"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.20.2\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(("line", "cuda"), [(12, "13.0"), (13, "12.8")])
def test_a_transformer_engine_for_another_cuda_is_named(
    line: int, cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_cuda: None
) -> None:
    install_core(tmp_path, monkeypatch, line)
    major = cuda.partition(".")[0]
    message = (
        rf"torch {re.escape(torch.__version__)} was built for CUDA {cuda}, and Transformer "
        rf"Engine's core transformer-engine-cu{line} 2.20.2 is for another; pip uninstall "
        rf"transformer-engine-cu{line} and install megashear\[gpu-cu{major}\]"
    )
    found = device.engine_mismatch(cuda)
    assert found is not None
    assert re.fullmatch(message, found)
    # where its layers are asked for it is refused, and so where megatron-core stumbles over it
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(device, "find_accelerators", lambda: {"transformer_engine": True})
    asking = ModelConfig(transformer_impl="transformer_engine")
    with pytest.raises(ValueError, match=f"{message}, or use --transformer-impl local"):
        device.check_settings(ParallelConfig(), asking)
    device.check_settings(ParallelConfig(), ModelConfig())

    class Broken:
        @staticmethod
        def find_spec(name: str, *rest: Any) -> None:
            if name == "megatron.core":
                raise OSError(f"libcudart.so.{line}: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(RuntimeError, match=rf"libcudart.so.{line}.*{message}"):
        device._check_megatron_core.__wrapped__()


def test_a_transformer_engine_that_fits_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.engine_mismatch("13.0") is None  # none is installed
    install_core(tmp_path, monkeypatch, 13)
    assert device.engine_mismatch("13.0") is None
    assert device.engine_mismatch(None) is None  # a torch without CUDA
    assert device.engine_mismatch("12.8") is not None


def test_every_line_of_cuda_has_an_extra_that_the_readme_names() -> None:
    root = Path(__file__).parents[3]
    extras = {
        key.value: ast.literal_eval(value)
        for node in ast.walk(ast.parse((root / "setup.py").read_text()))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values)
        if isinstance(key, ast.Constant) and str(key.value).startswith("gpu")
    }
    for line in (12, 13):
        (wanted,) = extras[f"gpu-cu{line}"]
        assert wanted.startswith(f"transformer-engine[pytorch,core_cu{line}]>=")
        assert f"gpu-cu{line}" in (root / "README.md").read_text()
        assert device._engine_extra(f"{line}.1") == f"gpu-cu{line}"
    assert extras["gpu"] == extras["gpu-cu13"]
    assert f"{device._engine_extra(None)}" in extras


def test_more_processes_than_gpus_are_refused(with_cuda: None) -> None:
    with pytest.raises(ValueError, match="process 1 of this host has no GPU: 1 found"):
        device.select(1)


def test_the_registry_package_called_apex_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # another project of that name: a package without NVIDIA's optimizers
    apex = types.ModuleType("apex")
    apex.__path__ = []
    monkeypatch.setitem(sys.modules, "apex", apex)
    assert device.find_accelerators()["apex"] is False


@pytest.mark.parametrize(
    ("stages", "virtual", "overlap"),
    [(1, 1, False), (2, 1, False), (2, 2, False), (2, 2, True), (4, 2, True)],
)
def test_pipeline_settings_never_corrupt(stages: int, virtual: int, overlap: bool) -> None:
    settings = device.pipeline_settings(
        ParallelConfig(
            pipeline_model_parallel_size=stages,
            num_virtual_stages_per_pipeline_rank=virtual,
            overlap_p2p_communication=overlap,
        )
    )
    assert not settings["batch_p2p_comm"]
    assert settings["overlap_p2p_comm"] == overlap
    assert not (settings["overlap_p2p_comm"] and settings["deallocate_pipeline_outputs"])


def test_torch_stays_real_for_everybody_else() -> None:
    device.install()
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.zeros_like(torch.empty(2, device="meta")).device.type == "meta"
    assert isinstance(torch.empty, types.BuiltinFunctionType)
    assert torch.cuda.__name__ == "torch.cuda"
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


@WITHOUT_CUDA
def test_no_one_else_is_told_that_there_is_a_gpu() -> None:
    device.install()
    for call in ("torch.empty(1, device='cuda')", "torch.ones(1).cuda()"):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            called_from("elsewhere", call, torch=torch)


@WITHOUT_CUDA
def test_megatron_core_sees_the_cpu_as_its_gpu() -> None:
    device.install()
    from megatron.core.pipeline_parallel import schedules

    theirs = schedules.torch
    assert theirs.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert theirs.empty(2, device=theirs.cuda.current_device()).device.type == "cpu"
    assert theirs.empty(2, device=0).device.type == "cpu"
    assert theirs.empty(2, device="meta").device.type == "meta"
    assert theirs.float32 is torch.float32
    assert theirs.cuda.is_available() is False
    inside = "megatron.core.optimizer.optimizer"
    x = torch.ones(1, dtype=torch.bfloat16)
    assert called_from(inside, "x.type()", x=x) == "torch.cuda.BFloat16Tensor"
    assert called_from(inside, "x.cuda() is x", x=x)
    assert called_from("megatron.training", "x.type()", x=x) == "torch.BFloat16Tensor"


@WITHOUT_CUDA
def test_random_states_are_forked_and_given_back() -> None:
    device.install()
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("masked", 11)
    torch.manual_seed(5)
    outside = torch.get_rng_state()
    with tracker.fork("masked"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    with tracker.fork("masked"):
        assert not torch.equal(torch.rand(3), first)  # goes on where it stopped
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(11)), first)


PROBE = """
import json, sys, torch
from megashear.parallel import device
reports = []
for pretend in ([True, False] if not torch.cuda.is_available() else [True]):
    device.has_cuda = lambda: pretend
    before = torch.Tensor.type, torch.Tensor.cuda
    device.install()
    import megashear.models.llama, megashear.train.loop, megashear.checkpoint.store
    loaded = {n: m for n, m in sys.modules.items() if n.startswith("megatron.core")}
    own = {n: m.torch for n, m in loaded.items() if hasattr(m, "torch")}
    reports.append({
        "real": sorted(n for n, t in own.items() if t is torch),
        "replaced": sorted(n for n, t in own.items() if isinstance(t, device._StandIn)),
        "methods": before == (torch.Tensor.type, torch.Tensor.cuda),
    })
print(json.dumps(reports))
"""


def test_with_cuda_nothing_is_replaced() -> None:
    # a process of its own: in this one the seam may be in place already
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=True
    )
    with_cuda, *without = json.loads(done.stdout.splitlines()[-1])
    assert with_cuda["replaced"] == []
    assert len(with_cuda["real"]) > 50
    assert with_cuda["methods"] is True
    for twin in without:  # the same probe notices the seam where it is in place
        assert twin["real"] == []
        assert set(twin["replaced"]) >= set(with_cuda["real"])
        assert twin["methods"] is False


APEX = """
import sys, types
if {apex}:
    sys.modules["fused_weight_gradient_mlp_cuda"] = types.ModuleType("of Apex")
from megashear.parallel import device
device.has_cuda = lambda: {cuda}
device.install()
from megatron.core.tensor_parallel import layers
print(layers.fused_weight_gradient_mlp_cuda.__name__, layers._grad_accum_fusion_available)
"""


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("apex", [True, False])
def test_apex_is_stood_in_for_only_where_it_is_not(apex: bool, cuda: bool) -> None:
    probe = APEX.format(apex=apex, cuda=cuda)
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True
    )
    # whose extension takes tensors of a GPU alone, and does not look
    name = "of Apex" if apex and cuda else "fused_weight_gradient_mlp_cuda for torch alone"
    assert done.stdout.splitlines()[-1] == f"{name} True"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_what_is_there(precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(6, n, generator=generator).to(precision) for n in (5, 4))
    before = torch.randn(5, 4, generator=generator)
    total = before.clone()
    device.add_product(total, left, right)
    wanted = left.double().T @ right.double()
    tolerance = 1e-6 if precision == torch.float32 else 2**-8  # of sums over 6 rounded products
    assert (total - before - wanted).abs().max() < tolerance * wanted.abs().max()
    device.add_product(total, left, right)
    assert (total - before - 2 * wanted).abs().max() < 2 * tolerance * wanted.abs().max()


def test_a_gpu_that_cannot_add_a_wider_product_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def adds(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **_: Any) -> None:
        total.add_(left @ right)

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented for this dtype")

    def overwrites(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **_: Any) -> None:
        total.copy_(left @ right)

    for addmm, answer in ((adds, True), (refuses, False), (overwrites, False)):
        monkeypatch.setattr(torch, "addmm", addmm)
        assert device._adds_wider.__wrapped__(torch.float32) is answer


FAULTS = """
import resource, torch
from megashear.parallel import device
if {keep}:
    device.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24), torch.ones(2**22)  # 64 and 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory"
)
def test_freed_memory_is_kept_unless_the_user_chose() -> None:
    def faults(keep: bool, **chosen: str) -> int:
        others = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)],
            capture_output=True, text=True, timeout=120, check=True, env=others | chosen,
        )  # fmt: skip
        return int(done.stdout)

    by_default = faults(keep=False)
    assert faults(keep=True) < by_default / 10
    assert faults(keep=True, MALLOC_MMAP_MAX_="65536") > by_default / 10


def raising(error: Exception) -> Any:
    def compiler(function: Any) -> Any:
        def run(*_: Any) -> None:
            raise error

        return run

    return compiler


@pytest.mark.parametrize(
    ("compiler", "obstacle"),
    [
        (lambda function: lambda x: (x + x, True), None),
        (lambda function: lambda x: (x, True), "wrongly"),
        (lambda function: function, "switched off.*TORCH_COMPILE_DISABLE=1"),
        (raising(RuntimeError("no C compiler found")), "RuntimeError: no C compiler found"),
        (raising(PermissionError("/cache")), "PermissionError: /cache"),
    ],
)
def test_a_compiler_that_does_not_work_is_found_out(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch, compiler: Any, obstacle: str | None
) -> None:
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", compiler)
    found = device.compile_obstacle()
    assert found is None if obstacle is None else re.search(obstacle, found or "")


@WITHOUT_CUDA
def test_on_a_cpu_nothing_is_compiled() -> None:
    assert device.compile_obstacle() == "no CUDA device"
