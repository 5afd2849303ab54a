"""The plain masked LLaMA that other tests compare with, held to the golden file (law 6)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from megashear.shape import ModelShape
from tests.reference_llama import forward, relative_error

GOLDEN = Path(__file__).parents[2] / "data" / "mask_a.safetensors"
OTHER_KERNELS = 2e-6  # relative, float32; measured 2e-7 logits, 4e-7 gradients
SHAPE = ModelShape(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=16,
    ffn_hidden_size=96,
    vocab_size=101,
)
GATES = {"hidden": "hidden_z", "head": "head_z", "intermediate": "intermediate_z"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def weights_and_gates(
    golden: dict[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {name[2:]: w.clone() for name, w in golden.items() if name.startswith("w.")}
    gates = {kind: golden[prefix + name] for kind, name in GATES.items()}
    return weights, gates | {"layer": golden[prefix + "mlp_z"]}


@pytest.mark.parametrize(("mode", "prefix"), [("eval", "z_eval.target."), ("train", "train.z.")])
def test_logits_equal_the_golden_ones(golden: dict[str, Tensor], mode: str, prefix: str) -> None:
    weights, gates = weights_and_gates(golden, prefix)
    logits = forward(weights, SHAPE, golden["input_ids"], gates)
    assert relative_error(logits, golden[f"{mode}.logits"]) < OTHER_KERNELS


def test_an_open_embedding_is_noticed(golden: dict[str, Tensor]) -> None:
    weights, gates = weights_and_gates(golden, "train.z.")
    logits = forward(weights, SHAPE, golden["input_ids"], gates | {"hidden": torch.ones(64)})
    assert relative_error(logits, golden["train.logits"]) > 0.01


def test_weight_gradients_equal_the_golden_ones(golden: dict[str, Tensor]) -> None:
    weights, gates = weights_and_gates(golden, "train.z.")
    for weight in weights.values():
        weight.requires_grad_()
    logits = forward(weights, SHAPE, golden["input_ids"], gates)
    targets = golden["input_ids"][:, 1:].flatten()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()
    for name, weight in weights.items():
        assert weight.grad is not None
        wanted = golden[f"train.grad.w.{name}"]
        assert relative_error(weight.grad, wanted) < OTHER_KERNELS, name
