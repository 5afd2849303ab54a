"""Settings that the device cannot run are refused; memory, and libraries that are found."""

import ast
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
from megashear.parallel import cpu_megatron, device

WITHOUT_CUDA = pytest.mark.skipif(device.has_cuda(), reason="there is a CUDA device")


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine has one CUDA device."""
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


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
    """Write the metadata that pip leaves of Transformer Engine's core."""
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
    # it is refused where its layers are asked for, and where megatron-core cannot be imported
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
        cpu_megatron._check_megatron_core.__wrapped__()


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
