"""The stand-in for CUDA: what it leaves alone, and that CUDA switches it off."""

import json
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from megashear.parallel import cpu_megatron, device

WITHOUT_CUDA = pytest.mark.skipif(device.has_cuda(), reason="there is no stand-in where CUDA is")


def called_from(module: str, expression: str, **names: Any) -> Any:
    """Return ``expression``, evaluated as if ``module`` contained it."""
    return eval(expression, {"__name__": module, **names})


def test_another_megatron_core_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.17\.0 is installed.*==0\.16\.1"):
        cpu_megatron.require_version("0.17.0")
    cpu_megatron.require_version("0.16.1")


def test_a_missing_megatron_core_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"cannot be imported.*pip install megatron-core=="):
        cpu_megatron._check_megatron_core.__wrapped__()


def test_a_broken_transformer_engine_is_told_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as the empty package does when megatron-core is imported
    class Broken:
        @staticmethod
        def find_spec(name: str, *rest: Any) -> None:
            if name == "megatron.core":
                raise RuntimeError("Found empty `transformer-engine` meta package installed")

    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(RuntimeError, match=r"meta package.*pip uninstall transformer-engine"):
        cpu_megatron._check_megatron_core.__wrapped__()


def test_torch_stays_real_for_everybody_else() -> None:
    cpu_megatron.install()
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.zeros_like(torch.empty(2, device="meta")).device.type == "meta"
    assert isinstance(torch.empty, types.BuiltinFunctionType)
    assert torch.cuda.__name__ == "torch.cuda"
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


@WITHOUT_CUDA
def test_no_one_else_is_told_that_there_is_a_gpu() -> None:
    cpu_megatron.install()
    for call in ("torch.empty(1, device='cuda')", "torch.ones(1).cuda()"):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            called_from("elsewhere", call, torch=torch)


@WITHOUT_CUDA
def test_megatron_core_sees_the_cpu_as_its_gpu() -> None:
    cpu_megatron.install()
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
    cpu_megatron.install()
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("masked", 11)
    torch.manual_seed(5)
    outside = torch.get_rng_state()
    with tracker.fork("masked"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    with tracker.fork("masked"):
        assert not torch.equal(torch.rand(3), first)  # continues where it stopped
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(11)), first)


PROBE = """
import json, sys, torch
from megashear.parallel import cpu_megatron, device
reports = []
for pretend in ([True, False] if not torch.cuda.is_available() else [True]):
    device.has_cuda = lambda: pretend
    before = torch.Tensor.type, torch.Tensor.cuda
    cpu_megatron.install()
    import megashear.models.llama, megashear.train.loop, megashear.checkpoint.store
    loaded = {n: m for n, m in sys.modules.items() if n.startswith("megatron.core")}
    own = {n: m.torch for n, m in loaded.items() if hasattr(m, "torch")}
    reports.append({
        "real": sorted(n for n, t in own.items() if t is torch),
        "replaced": sorted(n for n, t in own.items() if isinstance(t, cpu_megatron._StandIn)),
        "methods": before == (torch.Tensor.type, torch.Tensor.cuda),
    })
print(json.dumps(reports))
"""


def test_with_cuda_nothing_is_replaced() -> None:
    # in a process of its own: in this one the stand-in may be installed already
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=True
    )
    with_cuda, *without = json.loads(done.stdout.splitlines()[-1])
    assert with_cuda["replaced"] == []
    assert len(with_cuda["real"]) > 50
    assert with_cuda["methods"] is True
    for twin in without:  # the same probe notices the stand-in where it is installed
        assert twin["real"] == []
        assert set(twin["replaced"]) >= set(with_cuda["real"])
        assert twin["methods"] is False


APEX = """
import sys, types
if {apex}:
    sys.modules["fused_weight_gradient_mlp_cuda"] = types.ModuleType("of Apex")
from megashear.parallel import cpu_megatron, device
device.has_cuda = lambda: {cuda}
cpu_megatron.install()
from megatron.core.tensor_parallel import layers
print(layers.fused_weight_gradient_mlp_cuda.__name__, layers._grad_accum_fusion_available)
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("apex", [True, False])
def test_apex_is_stood_in_for_only_where_it_is_not(apex: bool, cuda: bool) -> None:
    probe = APEX.format(apex=apex, cuda=cuda)
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True
    )
    # Apex's extension takes tensors of a GPU alone, and does not check that
    name = "of Apex" if apex and cuda else "fused_weight_gradient_mlp_cuda for torch alone"
    assert done.stdout.splitlines()[-1] == f"{name} True"
